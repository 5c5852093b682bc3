"""Rows in which every key is masked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from tests.graph.harness import check, specs
from tests.graph.inputs import (
    INF,
    LOWEST,
    SCALE,
    B,
    S,
    attend,
    chance,
    future,
    large,
    qkv,
    queries_and_keys,
    scores_of,
)

FILLS = {"-inf": -INF, "finfo.min": LOWEST, "-1e9": -1e9, "-10000": -1e4}


def scales(q, k):
    return q @ k.mT * SCALE


@pytest.mark.parametrize("inputs", [qkv, large], ids=["", "large scores"])
@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
@pytest.mark.parametrize("added", [False, True], ids=["filled", "added"])
def test_fills_and_dead_rows(fill, added, inputs):
    def attention(q, k, v):
        s = scales(q, k)
        if added:
            s = s + torch.where(future(0), fill, 0.0)
        else:
            s = s.masked_fill(future(0), fill)
        return attend(s, v)

    # Eager's gradients are NaN in rows that are NaN; only the outputs are compared there.
    report = check(attention, *inputs(), training=fill != -INF)
    assert [region.fused for region in report.regions] == [True]
    assert ("dead=nan" in specs(report)) == (fill == -INF)
    # A score may be lower than -1e9, so that it is no mask.
    assert ("mask=" in specs(report)) == (fill <= LOWEST)


def test_fill_left_in_place_of_a_mask():
    def filled(fill):
        def attention(q, k, v):
            return attend(scores_of(q, k).masked_fill(future(0), fill), v)

        return specs(check(attention, *qkv()))

    assert_expected_inline(filled(-INF), """attention(score=0.25*s, mask=kv <= q - 1, dead=nan)""")
    assert_expected_inline(
        filled(LOWEST),
        """attention(score=0.25*s, mask=kv <= q - 1, dead=score, fill=-3.4028234663852886e+38)""",
    )
    assert_expected_inline(
        filled(-1e9), """attention(score=where(kv >= q, -1000000000.0, 0.25*s))"""
    )


@pytest.mark.parametrize("added", [False, True], ids=["filled", "added"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dead_rows_in_half_precision(dtype, added):
    def attention(q, k, v):
        s, lowest = scores_of(q, k), torch.finfo(q.dtype).min
        if added:
            s = s + torch.where(future(0), lowest, 0.0).to(q.dtype)
        else:
            s = s.masked_fill(future(0), lowest)
        return F.softmax(s, -1, dtype=torch.float32).to(q.dtype) @ v

    assert [r.fused for r in check(attention, *qkv(dtype=dtype)).regions] == [True]


def test_lowest_half_in_float32_scores():
    # -65504 is no mask where the scores are float32: many are lower.
    def attention(q, k, v):
        s = q.float() @ k.float().mT
        s = s.masked_fill(future(0), torch.finfo(torch.float16).min)
        return s.softmax(-1).to(q.dtype) @ v

    q, k, v = qkv(dtype=torch.float16)
    check(attention, (q * 400).detach(), (k * 400).detach(), v)


def test_lowest_half_is_no_mask_for_scores_scaled_in_float32():
    def attention(q, k, v):
        s = (q @ k.mT).float() * 64
        s = s + torch.where(future(0), torch.finfo(torch.float16).min, 0.0)
        return s.softmax(-1).to(q.dtype) @ v

    q, k, v = qkv(dtype=torch.float16)
    check(attention, (q * 20).detach(), (k * 20).detach(), v)


def test_two_fills_added_overflow():
    # Masked once: finfo.min. Masked twice: -inf. Masked by one of them everywhere: uniform.
    def attention(q, k, v, padding):
        causal = torch.where(future(0), LOWEST, 0.0)
        padded = torch.where(padding[:, None, None, :], 0.0, LOWEST)
        return attend(scores_of(q, k) + causal + padded, v)

    padding = torch.arange(S) >= torch.tensor([[0], [6]])
    assert_expected_inline(
        specs(check(attention, *qkv(), padding)),
        """attention(score=0.25*s, mask=(kv <= q - 1) & (load(0, b, kv) != 0), dead=score, fill=0.25*s + where(kv >= q, -3.4028234663852886e+38, 0) + where(load(0, b, kv) != 0, 0, -3.4028234663852886e+38), aux=[bool])""",
    )


def test_two_fills_of_different_depth():
    def attention(q, k, v, padding):
        s = scores_of(q, k).masked_fill(future(0), LOWEST)
        return attend(s.masked_fill(~padding[:, None, None, :], -INF), v)

    padding = torch.arange(S) >= torch.tensor([[0], [6]])
    assert_expected_inline(
        specs(check(attention, *qkv(), padding)),
        """attention(score=0.25*s, mask=(kv <= q - 1) & (load(0, b, kv) != 0), dead=score, fill=where(load(0, b, kv) == 0, -inf, -3.4028234663852886e+38), aux=[bool])""",
    )


def test_two_fills_in_the_other_order():
    def attention(q, k, v, padding):
        s = scores_of(q, k).masked_fill(~padding[:, None, None, :], -INF)
        return attend(s.masked_fill(future(0), LOWEST), v)

    padding = torch.arange(S) >= torch.tensor([[0], [6]])
    assert_expected_inline(
        specs(check(attention, *qkv(), padding)),
        """attention(score=0.25*s, mask=(kv <= q - 1) & (load(0, b, kv) != 0), dead=score, fill=where(kv >= q, -3.4028234663852886e+38, -inf), aux=[bool])""",
    )


@pytest.mark.parametrize("last", ["lowest", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_two_fills_of_different_depth_in_half_precision(dtype, last):
    # A query without a key attends to those at the lowest number, and to none at -inf.
    def attention(q, k, v, padding):
        s = scores_of(q, k)
        fills = {future(0): torch.finfo(s.dtype).min, ~padding[:, None, None, :]: -INF}
        for mask, fill in sorted(fills.items(), key=lambda x: x[1], reverse=last == "-inf"):
            s = s.masked_fill(mask, fill)
        return attend(s, v)

    padding = torch.arange(S) >= torch.tensor([[0], [6]])
    report = check(attention, *qkv(dtype=dtype), padding)
    fill = specs(report).split("fill=")[1]
    assert "-inf" in fill and (dtype == torch.bfloat16 or "-3.4028234663852886e+38" in fill)


def test_mask_without_a_key():
    def attention(q, k, v):
        return attend(scores_of(q, k).masked_fill(torch.ones(S, S).bool(), LOWEST), v)

    assert_expected_inline(specs(check(attention, *qkv())), """lift: no-product""")


def test_nan_to_num():
    def attention(q, k, v):
        weights = scores_of(q, k).masked_fill(future(0), -INF).softmax(-1)
        return torch.nan_to_num(weights) @ v

    assert_expected_inline(
        specs(check(attention, *qkv())), """attention(score=0.25*s, mask=kv <= q - 1, dead=zero)"""
    )


def test_nan_to_num_of_the_output():
    def attention(q, k, v):
        return torch.nan_to_num(attend(scores_of(q, k).masked_fill(future(0), -INF), v))

    assert_expected_inline(
        specs(check(attention, *qkv())), """attention(score=0.25*s, mask=kv <= q - 1, dead=nan)"""
    )


def test_dead_rows_replaced_where_they_are_nan():
    def attention(q, k, v):
        weights = scores_of(q, k).masked_fill(future(0), -INF).softmax(-1)
        return torch.where(weights.isnan(), 0.0, weights) @ v

    assert_expected_inline(
        specs(check(attention, *qkv())), """attention(score=0.25*s, mask=kv <= q - 1, dead=zero)"""
    )


def test_dead_rows_masked_again():
    # `masked_fill(mask, 0)` of the weights, as fairseq and many others do.
    def attention(q, k, v):
        weights = scores_of(q, k).masked_fill(future(0), -INF).softmax(-1)
        return weights.masked_fill(future(0), 0.0) @ v

    assert_expected_inline(
        specs(check(attention, *qkv())), """attention(score=0.25*s, mask=kv <= q - 1, dead=zero)"""
    )


def test_dead_rows_of_sdpa():
    def attention(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    mask = chance(0.4, B, 1, S, S)
    mask[:, :, 3] = False
    assert_expected_inline(
        specs(check(attention, *qkv(), mask)),
        """attention(score=0.25*s, mask=load(0, b, 0, q, kv) != 0, dead=zero, aux=[bool])""",
    )
    added = torch.where(mask, 0.0, -INF)
    assert_expected_inline(
        specs(check(attention, *qkv(), added)),
        """attention(score=load(0, b, 0, q, kv) + 0.25*s, dead=zero, aux=[float])""",
    )


def test_dead_rows_of_exp_over_sum():
    def attention(q, k, v):
        e = scores_of(q, k).masked_fill(future(0), -INF).exp()
        return e / e.sum(-1, keepdim=True) @ v

    assert_expected_inline(
        specs(check(attention, *qkv())), """attention(score=0.25*s, mask=kv <= q - 1, dead=nan)"""
    )


def test_dead_rows_of_exp_times_mask():
    def attention(q, k, v):
        e = scores_of(q, k).exp() * ~future(0)
        return e / e.sum(-1, keepdim=True) @ v

    # Eager's gradients are NaN in rows that are NaN.
    assert_expected_inline(
        specs(check(attention, *qkv(), training=False)),
        """attention(score=0.25*s, mask=kv <= q - 1, dead=nan)""",
    )


def test_sum_kept_from_zero():
    # Linear attention's habit; a dead row gives zeros.
    def attention(q, k, v):
        e = scores_of(q, k).masked_fill(future(0), -INF).exp()
        return e / (e.sum(-1, keepdim=True) + 1e-6) @ v

    assert_expected_inline(
        specs(check(attention, *qkv())),
        """attention(score=0.25*s, mask=kv <= q - 1, dead=nan, sinks=[-13.815510557964274])""",
    )


class TestTwoFillsAndZeros:
    """Rows that are -inf everywhere become zeros, those that have finfo.min somewhere its mean."""

    @staticmethod
    def found(masked, keep, *, zeroed=True, **how):
        def attention(q, k, v, keep):
            weights = masked(scores_of(q, k), keep).softmax(-1)
            return (weights.masked_fill(weights.isnan(), 0.0) if zeroed else weights) @ v

        return specs(check(attention, *qkv(), keep, training=False, **how))

    @staticmethod
    def keep():
        """Of the second batch no key, or few."""
        keep = torch.ones(B, 1, 1, S)
        keep[1, ..., 3:] = 0
        return keep

    def test_filled(self):
        found = self.found(
            lambda s, x: s.masked_fill(x == 0, LOWEST).masked_fill(future(0), -INF), self.keep()
        )
        assert_expected_inline(
            found,
            """attention(score=where(load(0, b, 0, 0, kv) == 0, -3.4028234663852886e+38, 0.25*s), mask=kv <= q - 1, dead=zero, aux=[float])""",
        )

    def test_added(self):
        def added(s, x):
            return s + torch.where(future(0), -INF, 0.0) + torch.where(x == 0, LOWEST, 0.0)

        assert "dead=zero" in self.found(added, self.keep())
        assert "dead=zero" in self.found(added, torch.zeros(B, 1, 1, S))
        assert "dead=score" in self.found(added, self.keep(), zeroed=False)

    def test_the_sum_of_two_lowest_numbers(self):
        def added(s, x):
            return s + torch.where(future(0), LOWEST, 0.0) + torch.where(x == 0, LOWEST, 0.0)

        assert "dead=zero" in self.found(added, torch.zeros(B, 1, 1, S))

    def test_a_row_with_a_key_at_its_own_place_keeps_its_fill(self):
        def added(s, x):
            q, kv = queries_and_keys()
            return s + torch.where(kv > q, -INF, 0.0) + torch.where(x == 0, LOWEST, 0.0)

        assert "dead=score" in self.found(added, self.keep())

    def test_float16_is_left(self):
        found = self.found(
            lambda s, x: s.masked_fill(x == 0, torch.finfo(s.dtype).min).masked_fill(
                future(0), -INF
            ),
            self.keep(),
            dtype=torch.float16,
        )
        assert found.endswith("rows-of-fill")

    def test_twice_the_lowest_number_is_infinite(self):
        def attention(q, k, v, keep):
            return ((scores_of(q, k) + (1 - keep) * LOWEST) * 2).softmax(-1) @ v

        found = specs(check(attention, *qkv(), self.keep(), training=False))
        assert found.endswith("not-a-number")


def test_a_term_of_unknown_size_beside_a_fill():
    """In a sequence of padding alone all keys have the fill, also those with the term: it is
    absorbed."""

    def attention(q, k, v, padding, term):
        s = scores_of(q, k) + torch.where(padding[:, None, None], LOWEST, 0.0)
        return attend(s + torch.where(future(), term.clamp(min=LOWEST), 0.0), v)

    padding = torch.arange(S).expand(B, S) >= torch.tensor([S - 3, 0])[:, None]
    report = check(attention, *qkv(), padding, torch.full((), -100.0))
    assert report.fused and "mask=" not in specs(report)
