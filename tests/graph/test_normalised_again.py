"""Weights that are divided by what is made of their row's sum, after factors on a softmax.

The sum of a row is its output for V of ones, which V gets as columns of its own.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from fa3_compile.report import collect
from tests.graph.harness import check, rewrite_only, specs
from tests.graph.inputs import INF, B, D, H, S, chance, normal, qkv, scores_of, uniform, weights_of


def renormalised(p, eps=1e-8):
    return p / (p.sum(-1, keepdim=True) + eps)


class TestFused:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gate(self, dtype):
        def attention(q, k, v, gate):
            return renormalised(weights_of(q, k) * gate) @ v

        report = check(attention, *qkv(), uniform(B, 1, S, S), dtype=dtype)
        assert_expected_inline(
            specs(report), """attention(score=0.25*s, weight=load(0, b, 0, q, kv), aux=[float])"""
        )

    def test_masked_softmax_of_allennlp(self):
        """The small number counts: hidden keys have a score of 0, which may be the largest."""

        def attention(q, k, v, mask):
            p = (scores_of(q, k) * mask).softmax(-1) * mask
            return p / (p.sum(-1, keepdim=True) + 1e-13) @ v

        q, k, v = qkv()
        mask = torch.arange(S) < torch.tensor([S, 5]).view(B, 1, 1, 1)
        for given in (mask.float(), chance(0.5, B, 1, 1, S).float()):
            report = check(attention, 6 * q.detach(), k, v, given)
            assert report.fused and "weight=load" in specs(report)

    def test_rows_that_the_mask_empties(self):
        def attention(q, k, v, mask):
            scores = scores_of(q, k).masked_fill(mask == 0, torch.finfo(q.dtype).min)
            p = scores.softmax(-1) * mask
            return p / p.sum(-1, keepdim=True).clamp_min(1e-12) @ v

        mask = (torch.arange(S) < torch.tensor([S, 0]).view(B, 1, 1, 1)).int()
        assert check(attention, *qkv(), mask).fused

    def test_rows_without_keys(self):
        def attention(q, k, v, hidden, gate):
            p = scores_of(q, k).masked_fill(hidden, -INF).softmax(-1)
            p = torch.nan_to_num(p) * gate
            return p / (p.sum(-1, keepdim=True) + 1e-6) @ v

        hidden = chance(0.3, B, 1, S, S)
        hidden[:, :, 2] = True
        report = check(attention, *(x.detach() for x in qkv()), hidden, uniform(S), training=False)
        assert "dead=zero" in specs(report)

    def test_factors_of_both_signs_and_of_rows(self):
        def attention(q, k, v, gate, row):
            p = 0.5 * row * weights_of(q, k) * gate
            return 3 * p / p.sum(-1, keepdim=True).abs().add(0.5) @ v

        assert check(attention, *qkv(), normal(S, S), uniform(H, S, 1)).fused

    @pytest.mark.parametrize(
        ("changed", "weight"),
        [
            (lambda p, gate: p, ""),
            (lambda p, gate: p.tril(), ", weight=where(kv <= q, 1, 0)"),
            (
                lambda p, gate: p.masked_fill(gate < 0, 0),
                ", weight=where(load(0, q, kv) == 0, 1, 0)",
            ),
            (lambda p, gate: p * (gate > 0), ", weight=where(load(0, q, kv) != 0, 1, 0)"),
            (lambda p, gate: p * gate.sigmoid(), ", weight=sigmoid(load(0, q, kv))"),
            (lambda p, gate: p.nan_to_num() * gate.exp(), ", weight=exp(load(0, q, kv))"),
        ],
        ids=["as they are", "a triangle", "filled", "masked", "gated", "by exponentials"],
    )
    def test_by_their_sizes(self, changed, weight):
        # A softmax times what is not negative is its own size.
        def attention(q, k, v, gate):
            return F.normalize(changed(weights_of(q, k), gate), p=1, dim=-1) @ v

        spec = specs(check(attention, *qkv(), normal(S, S)))
        assert spec.startswith("attention(score=0.25*s" + weight)

    def test_grouped_heads(self):
        def attention(q, k, v, gate):
            k, v = (x.repeat_interleave(2, 1) for x in (k, v))
            return renormalised(weights_of(q, k) * gate) @ v

        q, k, v = normal(B, H, S, D), normal(B, H // 2, S, D), normal(B, H // 2, S, D)
        assert check(attention, q, k, v, uniform(H, S, S)).fused

    def test_dynamic_lengths(self):
        def attention(q, k, v, gate):
            return renormalised(weights_of(q, k) * gate) @ v

        assert check(attention, *qkv(), uniform(B, 1, S, S), dynamic=True).fused


class TestLeft:
    def left(self, function, *args, **kwargs):
        report = check(function, *args, **kwargs)
        assert report.fused == []
        return [r.code for r in report.regions]

    def test_sums_over_the_queries(self):
        def attention(q, k, v, gate):
            p = weights_of(q, k) * gate
            return p / (p.sum(-2, keepdim=True) + 1e-8) @ v

        self.left(attention, *qkv(), uniform(S, S))

    def test_sums_of_other_weights(self):
        def attention(q, k, v, gate, other):
            p = weights_of(q, k)
            return p * gate / ((p * other).sum(-1, keepdim=True) + 1e-8) @ v

        codes = self.left(attention, *qkv(), uniform(S, S), uniform(S, S))
        assert "row-sums" in codes

    def test_sizes_of_weights_of_both_signs(self):
        def attention(q, k, v, gate):
            return F.normalize(weights_of(q, k) * gate, p=1, dim=-1) @ v

        self.left(attention, *qkv(), normal(S, S))

    def test_sums_over_some_keys(self):
        def attention(q, k, v, gate):
            p = weights_of(q, k) * gate
            return p / (p[..., 1:].sum(-1, keepdim=True) + 1e-8) @ v

        self.left(attention, *qkv(), uniform(S, S))

    def test_sums_of_the_next_row(self):
        def attention(q, k, v, gate):
            p = weights_of(q, k) * gate
            return p / (p.sum(-1, keepdim=True).roll(1, -2) + 1e-8) @ v

        self.left(attention, *qkv(), uniform(S, S))

    def test_sums_held_constant(self):
        def attention(q, k, v, gate):
            p = weights_of(q, k) * gate
            return p / (p.sum(-1, keepdim=True).detach() + 1e-8) @ v

        self.left(attention, *qkv(), uniform(S, S))

    def test_sums_of_dropped_weights(self):
        def attention(q, k, v):
            return renormalised(F.dropout(weights_of(q, k), 0.5)) @ v

        torch._dynamo.reset()
        with collect() as report:
            torch.compile(attention, backend=rewrite_only)(*qkv())
        assert report.fused == []

    def test_few_queries(self):
        """A copy of V would be larger than the scores are."""

        def attention(q, k, v, gate):
            return renormalised(weights_of(q, k) * gate) @ v

        q, k, v = qkv()
        assert self.left(attention, q[:, :, :2], k, v, uniform(S)) == ["values-copied"]
