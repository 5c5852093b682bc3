"""Fills that are finite: masks where they are provably out of reach, biases otherwise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from tests.graph.harness import check, specs
from tests.graph.inputs import (
    INF,
    LOWEST,
    SCALE,
    B,
    H,
    S,
    attend,
    chance,
    future,
    normal,
    qkv,
    scores_of,
)


def cosine(q, k):
    return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT


CAUSAL = "mask=kv <= q, dead=nan"


class TestCosine:
    """The product of two rows of norm 1 is bounded, and a fill of -1e9 is a mask."""

    def test_plain(self):
        def attention(q, k, v):
            return attend((10 * cosine(q, k)).masked_fill(future(), -1e9), v)

        assert specs(check(attention, *qkv())) == f"attention(score=10*s, {CAUSAL})"

    def test_by_hand(self):
        def attention(q, k, v):
            k = k / k.norm(dim=-1, keepdim=True)
            s = (F.normalize(q, dim=-1) / 0.5) @ k.mT
            return attend(s.masked_fill(future(), -1e9), v)

        assert specs(check(attention, *qkv())) == f"attention(score=2*s, {CAUSAL})"

    def test_only_one_side_normalised(self):
        def attention(q, k, v):
            return attend((F.normalize(q, dim=-1) @ k.mT).masked_fill(future(), -1e9), v)

        assert "mask=" not in specs(check(attention, *qkv()))

    def test_normalised_along_the_keys(self):
        def attention(q, k, v):
            s = F.normalize(q, dim=-2) @ F.normalize(k, dim=-2).mT
            return attend(s.masked_fill(future(), -1e9), v)

        assert "mask=" not in specs(check(attention, *qkv()))

    def test_unbounded_temperature(self):
        def attention(q, k, v, scale):
            return attend((cosine(q, k) * scale).masked_fill(future(), -1e9), v)

        assert "mask=" not in specs(check(attention, *qkv(), normal(H, 1, 1)))

    def test_fill_within_reach(self):
        def attention(q, k, v):
            return attend((100 * cosine(q, k)).masked_fill(future(), -150.0), v)

        assert "mask=" not in specs(check(attention, *qkv()))


class TestBiasOfMinusInfinity:
    """Where a bias hides every visible key, eager weighs the keys that a finite fill hides."""

    def test_hides_what_the_fill_does_not(self):
        def attention(q, k, v, bias):
            s = (scores_of(q, k) + bias).masked_fill(torch.arange(S) >= S // 2, LOWEST)
            return attend(s, v)

        bias = torch.zeros(S, S)
        bias[3, : S // 2] = -INF
        report = check(attention, *qkv(), bias)
        assert [r.fused for r in report.regions] == [True]
        assert "mask=" not in specs(report)

    def test_beside_a_mask_of_minus_infinity(self):
        def attention(q, k, v, bias):
            s = (scores_of(q, k) + bias).masked_fill(torch.arange(S) >= S // 2, LOWEST)
            return attend(s.masked_fill(future(), -INF), v)

        bias = torch.where(chance(0.5, S, S), -INF, 0.0)
        bias[:, 0] = 0
        report = check(attention, *qkv(), bias)
        assert [r.fused for r in report.regions] == [True]
        assert "mask=kv <= q" in specs(report)

    def test_of_parameters_is_finite(self):
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.bias = torch.nn.Parameter(normal(H, S, S).detach())

            def forward(self, q, k, v):
                return attend((scores_of(q, k) + self.bias).masked_fill(future(), LOWEST), v)

        assert CAUSAL in specs(check(Model(), *qkv()))

    def test_made_of_integers_is_finite(self):
        def attention(q, k, v, padding):
            bias = (1.0 - padding[:, None, None].to(q.dtype)) * LOWEST
            return attend((scores_of(q, k) + bias).masked_fill(future(), LOWEST), v)

        check(attention, *qkv(), chance(0.9, B, S).long())


class TestHints:
    """The report says what keeps blocks from being skipped."""

    def hint(self, attention, *args):
        [region] = check(attention, *qkv(), *args).regions
        assert region.fused
        return region.hint

    def test_moderate_fill(self):
        assert_expected_inline(
            self.hint(lambda q, k, v: attend(scores_of(q, k).masked_fill(future(), -1e9), v)),
            """Scores are filled with -1e+09, which a score could be below, so that no block of keys is skipped: fill with -inf or torch.finfo(dtype).min.""",
        )
        assert "-10000" in self.hint(
            lambda q, k, v: attend(scores_of(q, k) + torch.where(future(), -1e4, 0.0), v)
        )

    def test_mask_of_integers(self):
        def attention(q, k, v, padding):
            s = scores_of(q, k) + torch.where(future(), LOWEST, 0.0)
            return attend(s + (1 - padding[:, None, None].to(q.dtype)) * LOWEST, v)

        assert "boolean" in self.hint(attention, chance(0.9, B, S).long())

    def test_none_where_blocks_are_skipped(self):
        assert not self.hint(
            lambda q, k, v: attend(scores_of(q, k).masked_fill(future(), LOWEST), v)
        )
        assert not self.hint(lambda q, k, v: attend(F.leaky_relu(q @ k.mT * SCALE), v))


class TestBeyondFloat32:
    def test_the_least_number_twice_is_infinite(self):
        def attention(q, k, v, lengths):
            at = torch.arange(S)
            s = scores_of(q, k).masked_fill(at >= lengths[:, None, None, None], -INF)
            bias = torch.where(at > at[:, None], LOWEST, 0.0)
            return attend(s + bias + bias, v)

        spec = specs(check(attention, *qkv(), torch.tensor([S, 0])))
        assert_expected_inline(
            spec,
            """attention(score=0.25*s, mask=(kv < load(0, b)) & (kv <= q), dead=score, fill=where(kv >= load(0, b), -inf, 0.25*s) + where(kv >= q + 1, -inf, 0), aux=[int])""",
        )
