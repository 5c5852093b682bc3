"""What joins the softmax without a value, and rows in which every key is masked."""

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
    D,
    H,
    S,
    attend,
    chance,
    large,
    normal,
    qkv,
    queries_and_keys,
    scores_of,
)


def hidden():
    """Above the diagonal and on it, so that the first query has no key."""
    rows, columns = queries_and_keys()
    return columns >= rows


def test_sinks_of_gpt_oss():
    def attention(q, k, v, sinks):
        s = scores_of(q, k)
        s = torch.cat([s, sinks.reshape(1, -1, 1, 1).expand(B, -1, S, -1)], dim=-1)
        s = s - s.max(dim=-1, keepdim=True).values
        return F.softmax(s, dim=-1, dtype=s.dtype)[..., :-1] @ v

    assert_expected_inline(
        specs(check(attention, *qkv(), normal(H))),
        """attention(score=0.25*s, sinks=[load(0, h)], aux=[float])""",
    )


def test_sink_in_the_first_column():
    def attention(q, k, v, sinks):
        s = torch.cat([sinks.view(1, H, 1, 1).expand(B, H, S, 1), scores_of(q, k)], dim=-1)
        return s.softmax(-1)[..., 1:] @ v

    assert_expected_inline(
        specs(check(attention, *qkv(), normal(H))),
        """attention(score=0.25*s, sinks=[load(0, h)], aux=[float])""",
    )


def test_two_sinks_and_a_mask():
    def attention(q, k, v, sinks):
        s = scores_of(q, k).masked_fill(hidden(), -INF)
        s = torch.cat([s, sinks.view(1, H, 1, 2).expand(B, H, S, 2)], dim=-1)
        return s.softmax(-1)[..., :-2] @ v

    assert_expected_inline(
        specs(check(attention, *qkv(), normal(H, 2))),
        """attention(score=0.25*s, mask=kv <= q - 1, dead=nan, sinks=[load(0, h, 0), load(0, h, 1)], aux=[float])""",
    )


def test_sink_of_zero():
    # softmax1: exp(s) / (1 + sum exp(s)), by a column of zeros.
    def attention(q, k, v):
        return F.pad(scores_of(q, k), (0, 1)).softmax(-1)[..., :S] @ v

    assert_expected_inline(
        specs(check(attention, *qkv())), """attention(score=0.25*s, sinks=[0])"""
    )


def test_sink_for_each_query():
    def attention(q, k, v, sinks):
        s = torch.cat([scores_of(q, k), sinks], dim=-1)
        return s.softmax(-1)[..., :-1] @ v

    assert_expected_inline(
        specs(check(attention, *qkv(), normal(B, H, S, 1))),
        """attention(score=0.25*s, sinks=[load(0, b, h, q, 0)], aux=[float])""",
    )


def test_softmax_one_as_it_is_pasted():
    # The maximum is taken off first, so that the sink is the row's largest score and not 0.
    def attention(q, k, v):
        s = scores_of(q, k)
        e = (s - s.max(-1, keepdim=True).values).exp()
        return e / (1 + e.sum(-1, keepdim=True)) @ v

    assert_expected_inline(specs(check(attention, *qkv())), """detect: sink-of-the-row""")


def test_softmax_one_as_it_is_meant():
    def attention(q, k, v):
        e = scores_of(q, k).exp()
        return e / (e.sum(-1, keepdim=True) + 1) @ v

    assert_expected_inline(
        specs(check(attention, *qkv())), """attention(score=0.25*s, sinks=[0])"""
    )


def test_kept_column_has_a_value():
    # add_bias_kv: a key and value more, no sink.
    def attention(q, k, v, bias_k, bias_v):
        k = torch.cat([k, bias_k.expand(B, H, 1, D)], 2)
        v = torch.cat([v, bias_v.expand(B, H, 1, D)], 2)
        return attend(scores_of(q, k), v)

    report = check(attention, *qkv(), normal(1, H, 1, D), normal(1, H, 1, D, seed=7))
    assert_expected_inline(specs(report), """attention(score=0.25*s)""")


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
            s = s + torch.where(hidden(), fill, 0.0)
        else:
            s = s.masked_fill(hidden(), fill)
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
            return attend(scores_of(q, k).masked_fill(hidden(), fill), v)

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
            s = s + torch.where(hidden(), lowest, 0.0).to(q.dtype)
        else:
            s = s.masked_fill(hidden(), lowest)
        return F.softmax(s, -1, dtype=torch.float32).to(q.dtype) @ v

    assert [r.fused for r in check(attention, *qkv(dtype=dtype)).regions] == [True]


def test_lowest_half_in_float32_scores():
    # -65504 is no mask where the scores are float32: many are lower.
    def attention(q, k, v):
        s = q.float() @ k.float().mT
        s = s.masked_fill(hidden(), torch.finfo(torch.float16).min)
        return s.softmax(-1).to(q.dtype) @ v

    q, k, v = qkv(dtype=torch.float16)
    check(attention, (q * 400).detach(), (k * 400).detach(), v)


def test_lowest_half_is_no_mask_for_scores_scaled_in_float32():
    def attention(q, k, v):
        s = (q @ k.mT).float() * 64
        s = s + torch.where(hidden(), torch.finfo(torch.float16).min, 0.0)
        return s.softmax(-1).to(q.dtype) @ v

    q, k, v = qkv(dtype=torch.float16)
    check(attention, (q * 20).detach(), (k * 20).detach(), v)


def test_two_fills_added_overflow():
    # Masked once: finfo.min. Masked twice: -inf. Masked by one of them everywhere: uniform.
    def attention(q, k, v, padding):
        causal = torch.where(hidden(), LOWEST, 0.0)
        padded = torch.where(padding[:, None, None, :], 0.0, LOWEST)
        return attend(scores_of(q, k) + causal + padded, v)

    padding = torch.arange(S) >= torch.tensor([[0], [6]])
    assert_expected_inline(
        specs(check(attention, *qkv(), padding)),
        """attention(score=0.25*s, mask=(kv <= q - 1) & (load(0, b, kv) != 0), dead=score, fill=0.25*s + where(kv >= q, -3.4028234663852886e+38, 0) + where(load(0, b, kv) != 0, 0, -3.4028234663852886e+38), aux=[bool])""",
    )


def test_two_fills_of_different_depth():
    def attention(q, k, v, padding):
        s = scores_of(q, k).masked_fill(hidden(), LOWEST)
        return attend(s.masked_fill(~padding[:, None, None, :], -INF), v)

    padding = torch.arange(S) >= torch.tensor([[0], [6]])
    assert_expected_inline(
        specs(check(attention, *qkv(), padding)),
        """attention(score=0.25*s, mask=(kv <= q - 1) & (load(0, b, kv) != 0), dead=score, fill=where(load(0, b, kv) == 0, -inf, -3.4028234663852886e+38), aux=[bool])""",
    )


def test_two_fills_in_the_other_order():
    def attention(q, k, v, padding):
        s = scores_of(q, k).masked_fill(~padding[:, None, None, :], -INF)
        return attend(s.masked_fill(hidden(), LOWEST), v)

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
        fills = {hidden(): torch.finfo(s.dtype).min, ~padding[:, None, None, :]: -INF}
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
        weights = scores_of(q, k).masked_fill(hidden(), -INF).softmax(-1)
        return torch.nan_to_num(weights) @ v

    assert_expected_inline(
        specs(check(attention, *qkv())), """attention(score=0.25*s, mask=kv <= q - 1, dead=zero)"""
    )


def test_nan_to_num_of_the_output():
    def attention(q, k, v):
        return torch.nan_to_num(attend(scores_of(q, k).masked_fill(hidden(), -INF), v))

    assert_expected_inline(
        specs(check(attention, *qkv())), """attention(score=0.25*s, mask=kv <= q - 1, dead=nan)"""
    )


def test_dead_rows_replaced_where_they_are_nan():
    def attention(q, k, v):
        weights = scores_of(q, k).masked_fill(hidden(), -INF).softmax(-1)
        return torch.where(weights.isnan(), 0.0, weights) @ v

    assert_expected_inline(
        specs(check(attention, *qkv())), """attention(score=0.25*s, mask=kv <= q - 1, dead=zero)"""
    )


def test_dead_rows_masked_again():
    # `masked_fill(mask, 0)` of the weights, as fairseq and many others do.
    def attention(q, k, v):
        weights = scores_of(q, k).masked_fill(hidden(), -INF).softmax(-1)
        return weights.masked_fill(hidden(), 0.0) @ v

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
        e = scores_of(q, k).masked_fill(hidden(), -INF).exp()
        return e / e.sum(-1, keepdim=True) @ v

    assert_expected_inline(
        specs(check(attention, *qkv())), """attention(score=0.25*s, mask=kv <= q - 1, dead=nan)"""
    )


def test_dead_rows_of_exp_times_mask():
    def attention(q, k, v):
        e = scores_of(q, k).exp() * ~hidden()
        return e / e.sum(-1, keepdim=True) @ v

    # Eager's gradients are NaN in rows that are NaN.
    assert_expected_inline(
        specs(check(attention, *qkv(), training=False)),
        """attention(score=0.25*s, mask=kv <= q - 1, dead=nan)""",
    )


def test_sum_kept_from_zero():
    # Linear attention's habit; a dead row gives zeros.
    def attention(q, k, v):
        e = scores_of(q, k).masked_fill(hidden(), -INF).exp()
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
            lambda s, x: s.masked_fill(x == 0, LOWEST).masked_fill(hidden(), -INF), self.keep()
        )
        assert_expected_inline(
            found,
            """attention(score=where(load(0, b, 0, 0, kv) == 0, -3.4028234663852886e+38, 0.25*s), mask=kv <= q - 1, dead=zero, aux=[float])""",
        )

    def test_added(self):
        def added(s, x):
            return s + torch.where(hidden(), -INF, 0.0) + torch.where(x == 0, LOWEST, 0.0)

        assert "dead=zero" in self.found(added, self.keep())
        assert "dead=zero" in self.found(added, torch.zeros(B, 1, 1, S))
        assert "dead=score" in self.found(added, self.keep(), zeroed=False)

    def test_the_sum_of_two_lowest_numbers(self):
        def added(s, x):
            return s + torch.where(hidden(), LOWEST, 0.0) + torch.where(x == 0, LOWEST, 0.0)

        assert "dead=zero" in self.found(added, torch.zeros(B, 1, 1, S))

    def test_a_row_with_a_key_at_its_own_place_keeps_its_fill(self):
        def added(s, x):
            q, kv = queries_and_keys()
            return s + torch.where(kv > q, -INF, 0.0) + torch.where(x == 0, LOWEST, 0.0)

        assert "dead=score" in self.found(added, self.keep())

    def test_float16_is_left(self):
        found = self.found(
            lambda s, x: s.masked_fill(x == 0, torch.finfo(s.dtype).min).masked_fill(
                hidden(), -INF
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
