"""Between the softmax and V: dropout, gates, masks multiplied in or filled with 0, differences."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

from fa3_compile.report import collect
from tests.graph.dropout import check_dropout
from tests.graph.harness import check, rewrite_only, specs
from tests.graph.inputs import (
    INF,
    LOWEST,
    SCALE,
    B,
    D,
    H,
    S,
    attend,
    chance,
    future,
    normal,
    qkv,
    queries_and_keys,
    scores_of,
    uniform,
    weights_of,
)


def nothing_but_itself():
    """Row 0 sees nothing, the others every earlier key."""
    return torch.ones(S, S, dtype=torch.bool).triu(0)


def report_of(function, *args):
    torch._dynamo.reset()
    with collect() as report:
        torch.compile(function, backend=rewrite_only)(*args)
    return report


DROPPED = "weight=where(uniform(load(0, 0), b, h, q, kv) < 0.25, 0, 1.3333333333333333), aux=[int]"


class TestDropout:
    """Its mask is the fused op's own, drawn from a seed; all else is eager's."""

    def test_function(self):
        def made(drop):
            return lambda q, k, v: drop(weights_of(q, k), 0.25) @ v

        assert specs(check_dropout(made, *qkv())) == f"attention(score=0.25*s, {DROPPED})"

    def test_causal_in_merged_heads(self):
        def made(drop):
            def attention(x):
                q, k, v = x.view(B, S, 3, H, D).permute(2, 0, 3, 1, 4)
                p = scores_of(q, k).masked_fill(future(), -INF).softmax(-1)
                return (drop(p, 0.25) @ v).transpose(1, 2).reshape(B, S, H * D)

            return attention

        assert_expected_inline(
            specs(check_dropout(made, normal(B, S, 3 * H * D))),
            """attention(score=0.25*s, mask=kv <= q, dead=nan, weight=where(uniform(load(0, 0), b, h, q, kv) < 0.25, 0, 1.3333333333333333), aux=[int], out_order=bqhd)""",
        )

    def test_grouped_heads(self):
        def made(drop):
            def attention(q, k, v):
                k, v = (x.repeat_interleave(2, 1) for x in (k, v))
                return drop(weights_of(q, k), 0.25) @ v

            return attention

        q = normal(B, H, S, D)
        k, v = (normal(B, H // 2, S, D, seed=i) for i in (4, 5))
        assert specs(check_dropout(made, q, k, v)) == f"attention(score=0.25*s, {DROPPED})"

    def test_cast_in_between(self):
        def made(drop):
            def attention(q, k, v):
                p = F.softmax(scores_of(q, k), -1, dtype=torch.float32).to(q.dtype)
                return drop(p, 0.25) @ v

            return attention

        assert specs(check_dropout(made, *qkv())) == f"attention(score=0.25*s, {DROPPED})"

    def test_module_in_training(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.drop = nn.Dropout(0.25)

            def forward(self, q, k, v):
                return self.drop(weights_of(q, k)) @ v

        report = report_of(Model(), *qkv())
        assert specs(report) == f"attention(score=0.25*s, {DROPPED})"
        assert specs(report_of(Model().eval(), *qkv())) == "attention(score=0.25*s)"

    def test_in_place(self):
        def made(drop):
            def attention(q, k, v):
                p = weights_of(q, k)
                if drop is F.dropout:
                    F.dropout(p, 0.25, True, True)
                else:
                    p = drop(p, 0.25)
                return p @ v

            return attention

        assert specs(check_dropout(made, *qkv())) == f"attention(score=0.25*s, {DROPPED})"

    def test_of_sdpa(self):
        def made(drop):
            if drop is F.dropout:
                return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.25)
            return lambda q, k, v: drop(weights_of(q, k), 0.25) @ v

        report = check_dropout(made, *qkv())
        assert specs(report) == f"attention(score=0.25*s, {DROPPED})"

    def test_of_multihead_attention(self):
        layer = nn.MultiheadAttention(32, 2, dropout=0.25, batch_first=True)
        x = normal(B, S, 32)

        def attention(x, need_weights):
            return layer(x, x, x, need_weights=need_weights)[0]

        for need_weights in (False, True):
            assert "uniform" in specs(report_of(attention, x, need_weights))

    def test_everything_dropped(self):
        report = check(lambda q, k, v: F.dropout(weights_of(q, k), 1.0) @ v, *qkv())
        assert [r.fused for r in report.regions] in ([], [False])

    def test_two_of_one_program_differ(self):
        def attention(q, k, v):
            eye = torch.eye(S).expand(B, H, S, S)
            first = F.dropout(weights_of(q, k), 0.5) @ eye
            return first, F.dropout(weights_of(q, k), 0.5) @ eye

        torch._dynamo.reset()
        first, second = torch.compile(attention, backend=rewrite_only)(*qkv())
        assert ((first == 0) != (second == 0)).float().mean() > 0.4

    def test_statistics_and_seed(self):
        def attention(q, k):
            eye = torch.eye(64).expand(2, 8, 64, 64)
            return F.dropout((q @ k.mT).softmax(-1), 0.1) @ eye

        q, k = (normal(2, 8, 64, D, seed=i).detach() for i in (1, 2))
        weights = (q @ k.mT).softmax(-1)
        compiled = torch.compile(attention, backend=rewrite_only)

        def run(seed):
            torch.manual_seed(seed)
            return compiled(q, k), compiled(q, k)

        (a, b), (again, _) = run(1), run(1)
        assert torch.equal(a, again) and not torch.equal(a, b)
        kept = a != 0
        torch.testing.assert_close(a[kept], weights[kept] / 0.9)
        # 65,536 draws: five standard deviations are 0.006.
        assert abs(kept.double().mean() - 0.9) < 0.006
        for axis in (0, 1, 2, 3):
            rest = [d for d in range(4) if d != axis]
            spread = kept.double().mean(rest)
            draws = kept.numel() // kept.shape[axis]
            assert (spread - 0.9).abs().max() < 5 * (0.09 / draws) ** 0.5, axis

    def test_random_numbers_afterwards_are_still_drawn(self):
        def attention(q, k, v):
            y = F.dropout(weights_of(q, k), 0.5) @ v
            return y + torch.rand(S, D), torch.rand(3)

        torch._dynamo.reset()
        compiled = torch.compile(attention, backend=rewrite_only)
        torch.manual_seed(0)
        first = compiled(*qkv())
        torch.manual_seed(0)
        assert all(map(torch.equal, first, compiled(*qkv())))


class TestNearDropout:
    """Random numbers that are no dropout of the weights, or not of them alone."""

    def declined(self, function, *args):
        report = report_of(function, *(args or qkv()))
        assert not any(r.fused for r in report.regions), str(report)
        assert all(r.hint and r.node for r in report.regions), str(report)
        return specs(report)

    def test_of_the_scores(self):
        assert_expected_inline(
            self.declined(lambda q, k, v: attend(F.dropout(scores_of(q, k), 0.5), v)),
            """detect: dropout-of-scores""",
        )

    def test_of_whole_heads(self):
        assert_expected_inline(
            self.declined(lambda q, k, v: F.dropout2d(weights_of(q, k), 0.5) @ v),
            """lift: random-numbers""",
        )

    def test_alpha(self):
        self.declined(lambda q, k, v: F.alpha_dropout(weights_of(q, k), 0.5, True) @ v)

    def test_shared_by_all_heads(self):
        def attention(q, k, v):
            return F.dropout(weights_of(q[:, :1], k[:, :1]), 0.5) @ v

        assert_expected_inline(self.declined(attention), """detect: dropout-shared""")

    def test_returned_too(self):
        def attention(q, k, v):
            p = F.dropout(weights_of(q, k), 0.5)
            return p @ v, p

        assert_expected_inline(self.declined(attention), """check: dropped-weights-used""")

    def test_of_two_values(self):
        def attention(q, k, v):
            p = F.dropout(weights_of(q, k), 0.5)
            return p @ v, p @ q

        assert_expected_inline(self.declined(attention), """check: dropped-weights-used""")

    def test_returned_before_it_is_dropped(self):
        def made(drop):
            def attention(q, k, v):
                p = weights_of(q, k)
                return drop(p, 0.25) @ v + p.sum(-1, keepdim=True)

            return attention

        assert specs(check_dropout(made, *qkv())) == f"attention(score=0.25*s, {DROPPED})"

    def test_of_the_values(self):
        report = report_of(lambda q, k, v: weights_of(q, k) @ F.dropout(v, 0.5), *qkv())
        assert specs(report) == "attention(score=0.25*s)"

    def test_of_the_output(self):
        report = report_of(lambda q, k, v: F.dropout(weights_of(q, k) @ v, 0.5), *qkv())
        assert specs(report) == "attention(score=0.25*s)"

    def test_mask_drawn_apart(self):
        # Its numbers are read, so that they are eager's own.
        def attention(q, k, v):
            keep = torch.rand(B, H, S, S) < 0.9
            return weights_of(q, k) * keep / 0.9 @ v

        torch.manual_seed(0)
        expected = attention(*qkv())
        torch.manual_seed(0)
        torch.testing.assert_close(torch.compile(attention, backend=rewrite_only)(*qkv()), expected)
        assert [r.fused for r in report_of(attention, *qkv()).regions] == [True]


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
            p = scores_of(q, k).masked_fill(nothing_but_itself(), fill).softmax(-1)
            return p.masked_fill(nothing_but_itself(), 0.0) @ v

        report = check(attention, *(x.detach() for x in qkv()), training=False)
        assert specs(report) == "attention(score=0.25*s, mask=kv <= q - 1, dead=zero)"

    def test_rows_without_keys_times_a_mask(self):
        def attention(fill):
            def function(q, k, v):
                p = scores_of(q, k).masked_fill(nothing_but_itself(), fill).softmax(-1)
                return p * ~nothing_but_itself() @ v

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
            p = scores_of(q, k).masked_fill(nothing_but_itself(), -INF).softmax(-1)
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
            p = scores.masked_fill(nothing_but_itself(), -INF).softmax(-1)
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
            p = scores_of(q, k).masked_fill(nothing_but_itself(), -INF).softmax(-1)
            return torch.nan_to_num(p * ~nothing_but_itself()) @ v

        report = check(attention, *qkv(), training=False)
        assert specs(report) == "attention(score=0.25*s, mask=kv <= q - 1, dead=zero)"


class TestGates:
    """Factors that are no dropout."""

    def test_of_query_and_key(self):
        report = check(lambda q, k, v, g: weights_of(q, k) * g @ v, *qkv(), normal(H, S, S))
        assert_expected_inline(
            specs(report), """attention(score=0.25*s, weight=load(0, h, q, kv), aux=[float])"""
        )

    def test_of_the_query_alone_is_a_factor_of_the_output(self):
        report = check(
            lambda q, k, v, g: weights_of(q, k) * g.sigmoid() @ v, *qkv(), normal(B, 1, S, 1)
        )
        assert specs(report) == "attention(score=0.25*s)"

    def test_numbers(self):
        report = check(lambda q, k, v: weights_of(q, k) * 0.5 @ v, *qkv())
        assert specs(report) == "attention(score=0.25*s)"

    def test_decay_with_distance(self):
        def attention(q, k, v, slope):
            rows, columns = queries_and_keys()
            return weights_of(q, k) * (-slope * (rows - columns).abs()).exp() @ v

        report = check(attention, *qkv(), normal(H, 1, 1))
        assert [r.fused for r in report.regions] == [True]

    def test_of_the_scores_themselves(self):
        def attention(q, k, v):
            s = scores_of(q, k)
            return s.softmax(-1) * s.sigmoid() @ v

        report = check(attention, *qkv())
        assert_expected_inline(specs(report), """check: scores-read""")

    def test_of_the_head_dimension(self):
        # V weighed element by element: no product of matrices.
        def attention(q, k, v):
            return (weights_of(q, k)[..., None] * v[:, :, None]).sum(-2)

        assert specs(check(attention, *qkv())) == "detect: no-product"


class TestDifferences:
    """Differential attention: several softmaxes, one V."""

    def test_two_halves(self):
        def attention(q, k, v):
            (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
            return (weights_of(q1, k1) - 0.3 * weights_of(q2, k2)) @ v

        assert_expected_inline(
            specs(check(attention, *qkv())),
            """\
attention(score=0.25*s)
attention(score=0.25*s)""",
        )

    def test_one_softmax_of_twice_the_heads(self):
        def attention(q, k, v, a, b):
            p = scores_of(q, k) + torch.zeros(S, S).masked_fill(future(), -INF)
            p = torch.nan_to_num(p).softmax(-1, dtype=torch.float32).view(B, H, 2, S, S)
            factor = a.exp() - b.exp() + 0.2
            return (p[:, :, 0] - factor * p[:, :, 1]) @ v

        q, k, _ = qkv(B, 2 * H, S, D)
        report = check(attention, q, k, normal(B, H, S, 2 * D), normal(1), normal(1, seed=9))
        assert_expected_inline(
            specs(report),
            """\
attention(score=0.25*s, mask=kv <= q, dead=nan)
attention(score=0.25*s, mask=kv <= q, dead=nan)""",
        )

    def test_factor_of_each_head(self):
        def attention(q, k, v, factor):
            (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
            return (weights_of(q1, k1) - factor * weights_of(q2, k2)) @ v

        report = check(attention, *qkv(), normal(H, 1, 1))
        assert [r.fused for r in report.regions] == [True, True]

    def test_two_products(self):
        def attention(q, k, v):
            (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
            return attend(scores_of(q1, k1), v) - 0.3 * attend(scores_of(q2, k2), v)

        assert [r.fused for r in check(attention, *qkv()).regions] == [True, True]

    def test_mixture_of_three(self):
        def attention(q, k, v, mix):
            s, c = scores_of(q, k), mix.softmax(0)
            causal = s.masked_fill(future(), -INF)
            return (
                c[0] * s.softmax(-1) + c[1] * causal.softmax(-1) + c[2] * (2 * s).softmax(-1)
            ) @ v

        report = check(attention, *qkv(), normal(3))
        assert sorted(specs(report).split("\n")) == [
            "attention(score=0.25*s)",
            "attention(score=0.25*s, mask=kv <= q, dead=nan)",
            "attention(score=0.5*s)",
        ]

    def test_dropout_of_each(self):
        def made(drop):
            def attention(q, k, v):
                (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
                first, second = drop(weights_of(q1, k1), 0.25), drop(weights_of(q2, k2), 0.25)
                return (first - 0.3 * second) @ v

            return attention

        assert [r.fused for r in check_dropout(made, *qkv()).regions] == [True, True]

    def test_dropout_of_the_difference(self):
        # Both lose the same elements.
        def made(drop):
            def attention(q, k, v):
                (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
                return drop(weights_of(q1, k1) - 0.3 * weights_of(q2, k2), 0.25) @ v

            return attention

        assert [r.fused for r in check_dropout(made, *qkv()).regions] == [True, True]

    def test_product_of_two(self):
        def attention(q, k, v):
            (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
            return (weights_of(q1, k1) * weights_of(q2, k2)) @ v

        check(attention, *qkv())

    def test_softmax_of_another_axis_in_the_sum(self):
        def attention(q, k, v):
            s = scores_of(q, k)
            return (s.softmax(-1) - s.softmax(-2)) @ v

        assert not any(r.fused for r in check(attention, *qkv()).regions)


class TestOtherWeightsAdded:
    """A softmax and a function of the same scores without one, as Adapt-or-Perish restores images
    by: each is an attention of its own."""

    def test_dense_and_sparse(self):
        def attention(q, k, v, w, bias):
            s = scores_of(q, k) + bias
            dense, sparse = s.softmax(-1), s.relu() ** 2
            first, second = w[0].exp() / w.exp().sum(), w[1].exp() / w.exp().sum()
            return (dense * first + sparse * second) @ v

        report = check(attention, *qkv(), normal(2), normal(H, S, S))
        assert_expected_inline(
            "\n".join(r.spec.split(", score")[0] for r in report.regions),
            """\
attention(score=load(0, h, q, kv) + 0.25*s, aux=[float])
attention(normalize=none""",
        )

    def test_masked_and_halved_by_a_row_factor(self):
        def attention(q, k, v, gate):
            s = scores_of(q, k)
            p = s.masked_fill(future(), -INF).softmax(-1) - s.sigmoid().masked_fill(future(), 0)
            return (gate * p) @ v

        report = check(attention, *qkv(), uniform(H, S, 1))
        assert_expected_inline(
            specs(report),
            """\
attention(score=0.25*s, mask=kv <= q, dead=nan)
attention(normalize=none, score=sigmoid(0.25*s), mask=kv <= q)""",
        )

    def test_dropout_of_the_sum(self):
        # Both lose the same elements.
        def made(drop):
            def attention(q, k, v):
                s = scores_of(q, k)
                return drop(s.softmax(-1) + s.relu(), 0.25) @ v

            return attention

        assert [r.fused for r in check_dropout(made, *qkv()).regions] == [True, True]

    def test_factors_of_the_sum(self):
        def attention(q, k, v, mask, gate):
            s = scores_of(q, k)
            return ((s.softmax(-1) + s.relu()) * gate).masked_fill(mask < 0, 0) @ v

        report = check(attention, *qkv(), normal(S, S), uniform(S))
        assert [r.fused for r in report.regions] == [True, True]

    def test_two_softmaxes_and_other_weights(self):
        def attention(q, k, v):
            (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
            s = scores_of(q1, k1)
            return (s.softmax(-1) - 0.3 * weights_of(q2, k2) + s.tanh()) @ v

        assert [r.fused for r in check(attention, *qkv()).regions] == [True, True, True]

    @pytest.mark.parametrize("other", [lambda s: s.cumsum(-1), lambda s: s.softmax(-2).sqrt()])
    def test_weights_that_are_no_function_of_a_score(self, other):
        def attention(q, k, v):
            s = scores_of(q, k)
            return (s.softmax(-1) + other(s)) @ v

        [region] = check(attention, *qkv()).regions
        assert not region.fused and region.code == "softmax-result-changed"

    def test_scores_themselves(self):
        def attention(q, k, v):
            s = scores_of(q, k)
            return (s.softmax(-1) + s) @ v

        [region] = check(attention, *qkv()).regions
        assert not region.fused


def test_scale_is_not_lost_where_one_factor_is_a_sum():
    def attention(q, k, v, g):
        p = weights_of(q, k)
        return (p * g + 0.5 * p) @ v

    report = check(attention, *qkv(), uniform(S))
    assert [r.fused for r in report.regions] == [True]


def test_scaled_product_with_v():
    def attention(q, k, v):
        p = (q @ k.mT * SCALE).softmax(-1)
        return torch.baddbmm(torch.empty(()), p, v, beta=0, alpha=0.5)

    assert specs(check(attention, *qkv(H, S, D))) == "attention(score=0.25*s, out_order=bqhd)"


def test_product_with_v_that_adds_to_something():
    def attention(q, k, v, x):
        return torch.baddbmm(x, (q @ k.mT).softmax(-1), v, beta=0.5)

    report = check(attention, *qkv(H, S, D), normal(H, S, D))
    assert_expected_inline(specs(report), """detect: product-adds""")


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


@pytest.mark.parametrize(
    "factor",
    [
        lambda n, small: 1 / n[:, None, None, None],
        lambda n, small: 1 / torch.arange(1, S + 1)[:, None],
        lambda n, small: (small.long() * 200)[:, None],
    ],
    ids=["lengths", "positions", "8 bits"],
)
def test_factors_of_integers_are_neither_rounded_nor_wrapped(factor):
    def attention(q, k, v, n, small):
        return (scores_of(q, k).softmax(-1) * factor(n, small)) @ v

    lengths, small = torch.arange(3, B + 3), torch.arange(S, dtype=torch.int8) - 3
    assert check(attention, *qkv(), lengths, small).fused
