"""Masks after the softmax: multiplied in, filled with 0, whole rows of the output."""

from __future__ import annotations

import re

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from tests.graph.harness import check, specs
from tests.graph.inputs import (
    INF,
    LOWEST,
    B,
    D,
    H,
    S,
    chance,
    future,
    normal,
    qkv,
    queries_and_keys,
    scores_of,
    weights_of,
)


class TestMasks:
    """Filled with 0 or multiplied in, after the softmax."""

    def test_same_as_before(self):
        def filled(q, k, v):
            p = scores_of(q, k).masked_fill(future(), -INF).softmax(-1)
            return p.masked_fill(future(), 0.0) @ v

        def multiplied(q, k, v):
            return scores_of(q, k).masked_fill(future(), LOWEST).softmax(-1).tril() @ v

        causal = "attention(score=0.25*s, mask=kv <= q, dead=nan)"
        assert specs(check(filled, *qkv())) == causal
        assert specs(check(multiplied, *qkv())) == causal

    @pytest.mark.parametrize("fill", [-INF, LOWEST], ids=str)
    def test_rows_without_keys_become_zeros(self, fill):
        def attention(q, k, v):
            p = scores_of(q, k).masked_fill(future(0), fill).softmax(-1)
            return p.masked_fill(future(0), 0.0) @ v

        report = check(attention, *(x.detach() for x in qkv()), training=False)
        assert specs(report) == "attention(score=0.25*s, mask=kv <= q - 1, dead=zero)"

    def test_rows_of_infinity_beside_rows_of_a_fill(self):
        """NaN, and the mean of V, before weights are filled."""
        seen, rows = chance(0.5, B, 1, 1, S), chance(0.6, B, 1, S, 1)
        seen[1] = False
        inputs = [x.detach() for x in qkv()]

        def attention(both):
            def function(q, k, v, seen, rows):
                scores = scores_of(q, k).masked_fill(~seen, LOWEST)
                p = torch.where(rows, scores, -INF).softmax(-1)
                p = p.masked_fill(~seen, 0.0) if both else p
                return p.masked_fill(~rows, 0.0) @ v

            return function

        report = check(attention(True), *inputs, seen, rows, training=False)
        assert "dead=zero" in specs(report)
        report = check(attention(False), *inputs, seen, rows, training=False)
        assert specs(report) == "lift: mask-after-softmax"

    def test_rows_without_keys_times_a_mask(self):
        def attention(fill):
            def function(q, k, v):
                p = scores_of(q, k).masked_fill(future(0), fill).softmax(-1)
                return p * ~future(0) @ v

            return function

        inputs = [x.detach() for x in qkv()]
        # NaN times 0 is NaN.
        assert_expected_inline(
            specs(check(attention(-INF), *inputs, training=False)),
            """attention(score=0.25*s, mask=kv <= q - 1, dead=nan)""",
        )
        assert_expected_inline(
            specs(check(attention(LOWEST), *inputs, training=False)),
            """attention(score=0.25*s, mask=kv <= q - 1, dead=zero)""",
        )

    def test_without_one_before(self):
        assert_expected_inline(
            specs(check(lambda q, k, v: weights_of(q, k).tril() @ v, *qkv())),
            """attention(score=0.25*s, weight=where(kv <= q, 1, 0))""",
        )

    def test_another_than_before(self):
        def attention(q, k, v, padding):
            p = scores_of(q, k).masked_fill(future(), LOWEST).softmax(-1)
            return p.masked_fill(padding[:, None, None], 0.0) @ v

        padding = chance(0.3, B, S)
        assert_expected_inline(
            specs(check(attention, *qkv(), padding)),
            """attention(score=0.25*s, mask=kv <= q, dead=nan, weight=where(load(0, b, kv) == 0, 1, 0), aux=[bool])""",
        )

    def test_rows_of_nan_filled_in_part(self):
        def attention(q, k, v, padding):
            p = scores_of(q, k).masked_fill(future(0), -INF).softmax(-1)
            return p.masked_fill(padding[:, None, None], 0.0) @ v

        report = check(attention, *qkv(), chance(0.3, B, S), training=False)
        assert specs(report) == "lift: mask-after-softmax"

    def test_padding_before_and_after_beside_a_mask_of_rows(self):
        """As flash-attention's own reference: a window counted from the end of each sequence, rows
        without a key in it are zeros, and so are padded queries."""

        def attention(q, k, v, queries, keys, window):
            s = scores_of(q, k).masked_fill(~keys[:, None, None], -INF)
            rows, columns = queries_and_keys(20, S)
            ends = (x.sum(-1)[:, None, None, None] for x in (keys, queries))
            last = rows + next(ends) - next(ends)
            hidden = (columns > last) | (columns < last - window)
            p = s.masked_fill(hidden, -INF).softmax(-1)
            p = p.masked_fill(~queries[:, None, :, None], 0.0).masked_fill(
                ~keys[:, None, None], 0.0
            )
            return p.masked_fill(hidden.all(-1, keepdim=True), 0.0) @ v

        queries, keys = (torch.arange(n) < torch.tensor([[n - 7], [n]]) for n in (20, S))
        keys[0] = False
        q, k, v = normal(B, H, 20, D), *qkv()[1:]
        for window in (S, 4):
            report = check(attention, q, k, v, queries, keys, window)
            assert "dead=zero" in specs(report) and "weight" not in specs(report)

    def test_rows_of_nan_beside_a_sequence_of_padding(self):
        def attention(q, k, v, keys, hidden):
            s = scores_of(q, k).masked_fill(~keys, -INF).masked_fill(hidden, -INF)
            return s.softmax(-1).masked_fill(~keys, 0.0) @ v

        inputs = [x.detach() for x in qkv()]
        keys = torch.arange(S) >= torch.tensor([3, S]).view(B, 1, 1, 1)
        # Queries 0 to 2 see padding alone: NaN, but where all is padding, and filled.
        report = check(attention, *inputs, keys, future(), training=False)
        assert_expected_inline(
            specs(report),
            """attention(score=0.25*s, mask=(load(0, b, 0, 0, kv) != 0) & (load(1, q, kv) == 0), dead=zero, aux=[bool, bool])""",
        )
        # Whether a row of these keeps a key takes a mask of queries and keys.
        keys = chance(0.3, S, S)
        report = check(attention, *inputs, keys, future(), training=False)
        assert specs(report) == "lift: mask-after-softmax"

    @pytest.mark.parametrize("rest", ["dropped", "padded"])
    def test_a_row_without_a_key_keeps_none(self, rest):
        def attention(q, k, v, keys, kept):
            p = scores_of(q, k).masked_fill(~keys, -INF).softmax(-1)
            return p.masked_fill(~keys, 0.0).masked_fill(~kept, 0.0) @ v

        keys = chance(0.5, B, 1, 1, S)
        keys[1] = False
        kept = chance(0.7, B, H, S, S) if rest == "dropped" else chance(0.7, B, 1, S, 1)
        report = check(attention, *(x.detach() for x in qkv()), keys, kept, training=False)
        assert re.search(r"mask=load\(\d, b, 0, 0, kv\) != 0, dead=zero", specs(report))

    @pytest.mark.parametrize("fill", [-1e9, LOWEST], ids=str)
    def test_filled_by_numbers_before(self, fill):
        """A row whose every key has the fill is a mean before, and zeros after."""

        def attention(q, k, v, hidden, bias):
            p = (scores_of(q, k) + bias).masked_fill(hidden.bool(), fill).softmax(-1)
            return p.masked_fill(hidden.bool(), 0.0) @ v

        hidden = chance(0.3, B, 1, S, S).float()
        hidden[0, :, :2] = 1
        bias = normal(H, S, S).detach()
        # A bias of -inf leaves the row its filled keys, which are no NaN.
        bias[:, 3] = -INF
        report = check(attention, *(x.detach() for x in qkv()), hidden, bias, training=False)
        assert "weight=where(load(0, b, 0, q, kv) == 0, 1, 0)" in specs(report)
        assert report.fused

    def test_filled_by_numbers_beside_rows_of_nan(self):
        def attention(q, k, v, padding):
            scores = scores_of(q, k).masked_fill(padding[:, None, None], -1e9)
            p = scores.masked_fill(future(0), -INF).softmax(-1)
            return p.masked_fill(padding[:, None, None], 0.0) @ v

        report = check(attention, *qkv(), chance(0.3, B, S), training=False)
        assert specs(report) == "lift: mask-after-softmax"

    @pytest.mark.parametrize("bias", ["table", "product", "given"])
    def test_rows_without_keys_beside_a_bias(self, bias):
        """As WeNet's conformers have it: a position term, -inf before the softmax, 0 after it."""

        class Attention(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Parameter(normal(H, S, S).detach())
                self.positions = nn.Parameter(normal(H, S, D).detach())

            def forward(self, q, k, v, padding, given):
                more = {"table": self.table, "product": q @ self.positions.mT, "given": given}
                p = (scores_of(q, k) + more[bias]).masked_fill(padding, -INF).softmax(-1)
                return p.masked_fill(padding, 0.0) @ v

        padding = torch.arange(S) >= torch.tensor([S, 0]).view(B, 1, 1, 1)
        given = normal(H, S, S).detach()
        # Such a row is NaN, but where all keys are padding, and filled.
        given[:, 3] = -INF
        inputs = [x.detach() for x in qkv()]
        report = check(Attention(), *inputs, padding, given, training=bias != "given")
        assert "dead=zero" in specs(report)
        # Whether a row of these keeps a key takes a mask of queries and keys.
        hidden = padding | chance(0.3, S, S)
        report = check(Attention(), *inputs, hidden, given, training=bias != "given")
        assert ("dead=zero" in specs(report)) == (bias != "given")
        assert (specs(report) == "lift: mask-after-softmax") == (bias == "given")

    def test_normalised_again(self):
        def attention(q, k, v):
            p = weights_of(q, k).tril()
            return p / p.sum(-1, keepdim=True) @ v

        report = check(attention, *qkv())
        assert specs(report) == "attention(score=0.25*s, mask=kv <= q, dead=nan)"

    def test_zeroed_nan_and_a_mask(self):
        def attention(q, k, v):
            p = scores_of(q, k).masked_fill(future(0), -INF).softmax(-1)
            return torch.nan_to_num(p * ~future(0)) @ v

        report = check(attention, *qkv(), training=False)
        assert specs(report) == "attention(score=0.25*s, mask=kv <= q - 1, dead=zero)"


def hidden():
    """[B, 1, S, S], some rows all hidden."""
    made = chance(0.5, B, 1, S, S)
    made[0, 0, 3] = made[1, 0, 5] = True
    return made


ROWS = {
    "all": lambda p, m: p.masked_fill(m.all(-1, keepdim=True), 0.0),
    "any": lambda p, m: torch.where(m.logical_not().any(-1, keepdim=True), p, 0.0),
    "all, unsqueezed": lambda p, m: p.masked_fill(m.all(-1)[..., None], 0.0),
}


@pytest.mark.parametrize("fill", [-INF, LOWEST])
@pytest.mark.parametrize("name", ROWS)
def test_rows_without_a_key_are_filled(name, fill):
    def attention(q, k, v, m):
        p = scores_of(q, k).masked_fill(m, fill).softmax(-1)
        return ROWS[name](p, m) @ v

    spec = "attention(score=0.25*s, mask=load(0, b, 0, q, kv) == 0, dead=zero, aux=[bool])"
    assert specs(check(attention, *qkv(), hidden())) == spec


OTHER_ROWS = {
    "of another mask": lambda p, m: p.masked_fill(m.roll(1, -2).all(-1, keepdim=True), 0.0),
    "with any hidden": lambda p, m: p.masked_fill(m.any(-1, keepdim=True), 0.0),
    "with a key": lambda p, m: p.masked_fill(~m.all(-1, keepdim=True), 0.0),
    "two masks": lambda p, m: p.masked_fill(
        m.all(-1, keepdim=True) | (m.sum(-1, True) > S // 2), 0.0
    ),
}


@pytest.mark.parametrize("name", OTHER_ROWS)
def test_other_rows_are_filled(name):
    """Whole rows: what is left of those without a key is NaN."""

    def attention(q, k, v, m):
        p = scores_of(q, k).masked_fill(m, -INF).softmax(-1)
        return OTHER_ROWS[name](p, m) @ v

    # Eager spreads the NaN of rows that are left to the gradients of V.
    report = check(attention, *qkv(), hidden(), training=name == "with any hidden")
    spec = "attention(score=0.25*s, mask=load(0, b, 0, q, kv) == 0, dead=zero, aux=[bool])"
    assert specs(report) == spec


def test_columns_are_filled():
    def attention(q, k, v, m):
        p = scores_of(q, k).masked_fill(m, -INF).softmax(-1)
        return p.masked_fill(m.all(-2, keepdim=True), 0.0) @ v

    assert specs(check(attention, *qkv(), hidden())) == "lift: mask-after-softmax"


def test_padded_queries_and_keys():
    """As the reference of flash-attn's tests has them: zeros for queries of padding, NaN for other
    queries of a sequence without a key."""

    def attention(q, k, v, queries, keys):
        scores = scores_of(q, k).masked_fill(~keys[:, None, None, :], -INF)
        return scores.softmax(-1).masked_fill(~queries[:, None, :, None], 0.0) @ v

    padding = torch.arange(S) < torch.tensor([S - 5, 0]).view(B, 1)
    queries = padding.clone()
    assert_expected_inline(
        specs(check(attention, *qkv(), queries, padding)),
        """attention(score=0.25*s, mask=load(0, b, kv) != 0, dead=zero, aux=[bool])""",
    )
    queries[1, 0] = True
    report = check(attention, *qkv(), queries, padding, training=False)
    assert report.fused


def test_rows_multiplied_by_whether_they_have_a_key():
    # NaN times 0 is NaN: no row is filled.
    def attention(q, k, v, m):
        p = scores_of(q, k).masked_fill(m, -INF).softmax(-1)
        return p * m.logical_not().any(-1, keepdim=True) @ v

    spec = "attention(score=0.25*s, mask=load(0, b, 0, q, kv) == 0, dead=nan, aux=[bool])"
    assert specs(check(attention, *qkv(), hidden())) == spec


def test_weights_filled_after_two_fills_that_are_infinite_together():
    """The first row is NaN, and filled everywhere."""

    def attention(q, k, v):
        hidden = future() | torch.eye(S).bool()
        scores = scores_of(q, k).masked_fill(hidden, LOWEST)
        scores = scores + torch.where(hidden | (torch.arange(S) < 2), LOWEST, 0.0)
        return scores.softmax(-1).masked_fill(hidden, 0.0) @ v

    check(attention, *qkv(), training=False)


def test_weights_filled_after_a_mask_that_is_divided_by():
    def attention(q, k, v, seen):
        scores = scores_of(q, k) - (1 / seen.float() - 1)
        return scores.softmax(-1).masked_fill(~seen, 0.0) @ v

    seen = ~future()
    seen[0] = False
    check(attention, *qkv(), seen, training=False)
