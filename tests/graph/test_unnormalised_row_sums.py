"""Weights without a softmax that are divided by what is made of their sum, and linear attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from tests.graph.harness import check, specs, weighed
from tests.graph.inputs import (
    B,
    D,
    H,
    S,
    future,
    normal,
    qkv,
    queries_and_keys,
)
from tests.graph.inputs import scores_of as scores


def decay() -> Tensor:
    q, kv = queries_and_keys()
    rates = 1 - torch.exp2(-5 - torch.arange(H).float())
    return torch.where(kv <= q, rates[:, None, None] ** (q - kv).clamp(0), 0.0)


class TestLinear:
    def test_causal(self):
        assert_expected_inline(
            weighed(lambda s: s.tril()),
            """attention(normalize=none, score=0.25*s, mask=kv <= q)""",
        )

    def test_retention(self):
        # Sun et al. 2023, equation 5.
        assert_expected_inline(
            specs(check(lambda q, k, v: (q @ k.mT * decay()) @ v, *qkv())),
            """attention(normalize=none, score=load(0, h, kv - q + 23)*s, mask=kv <= q, aux=[float])""",
        )

    def test_decay_that_is_an_exponential_is_computed(self):
        def attention(q, k, v, rates):
            i, j = queries_and_keys()
            decays = torch.exp(-rates.view(H, 1, 1).abs() * (i - j))
            return torch.where(~future(), q @ k.mT * decays, 0.0) @ v

        assert_expected_inline(
            specs(check(attention, *qkv(), normal(H))),
            """attention(normalize=none, score=exp((kv - q)*abs(load(0, h)))*s, mask=kv <= q, aux=[float])""",
        )

    def test_decay_that_is_given(self):
        assert_expected_inline(
            weighed(lambda s, x: s * x, normal(H, S, S)),
            """attention(normalize=none, score=0.25*load(0, h, q, kv)*s, aux=[float])""",
        )

    def test_without_a_mask_it_is_cheaper_by_associativity(self):
        report = check(lambda q, k, v: scores(q, k) @ v, *qkv())
        assert_expected_inline(specs(report), """lift: linear""")
        assert "q @ (k.mT @ v)" in report.regions[0].hint

    def test_factors_of_rows_and_keys_leave_it_linear(self):
        found = weighed(lambda s, x, y: s * x * y, normal(H, S, 1), normal(H, 1, S))
        assert_expected_inline(found, """lift: linear""")


class TestRowSums:
    """Weights divided by something of their own row's sum, which is the op's second output."""

    NORMALISED = {
        "before": lambda w, v: (w / w.sum(-1, keepdim=True)) @ v,
        "after": lambda w, v: (w @ v) / (w.sum(-1, keepdim=True) + 1e-2),
        "reciprocal": lambda w, v: (w * (1 / (w.sum(-1, keepdim=True) + 1e-2))) @ v,
        "clamped": lambda w, v: (w / w.sum(-1).clamp(min=1).unsqueeze(-1)) @ v,
        "sizes": lambda w, v: (w / (w.abs().sum(-1, keepdim=True) + 1).sqrt()) @ v,
        "and a factor": lambda w, v: (w / (w.sum(-1, keepdim=True) * (1 + v[..., :1] ** 2))) @ v,
    }

    @pytest.mark.parametrize("name", NORMALISED)
    def test_relu(self, name):
        def attention(q, k, v):
            return self.NORMALISED[name]((F.relu(scores(q, k)) + 0.1).tril(), v)

        [region] = check(attention, *qkv()).regions
        assert (
            region.spec.startswith("attention(normalize=sums, score=") and region.mask == "kv <= q"
        )

    SIZES = {
        "clamped": lambda w: w / w.sum(-1, keepdim=True).abs().clamp(min=1),
        "the larger": lambda w: w / torch.maximum(w.sum(-1, keepdim=True).abs(), torch.ones(S, 1)),
        "square root": lambda w: w / (w.sum(-1, keepdim=True) ** 2 + 1).sqrt(),
        "root of the square": lambda w: w / ((w.sum(-1, keepdim=True) ** 2).sqrt() + 1),
    }

    @pytest.mark.parametrize("name", SIZES)
    def test_sizes_of_sums_of_either_sign(self, name):
        """As mLSTM (Beck et al. 2024, equation 27) and retention are normalised."""
        report = check(lambda q, k, v: self.SIZES[name](scores(q, k).tril()) @ v, *qkv())
        assert len(report.fused) == 1

    HELD = {
        "before": lambda w: w / w.detach().sum(-1, keepdim=True).abs().clamp(min=1),
        "of sizes": lambda w: w / w.relu().detach().abs().sum(-1, keepdim=True).clamp(min=1),
        "sizes held": lambda w: w / w.abs().detach().sum(-1, keepdim=True).clamp(min=1),
    }

    @pytest.mark.parametrize("name", HELD)
    def test_sums_that_are_constant_to_the_gradient(self, name):
        """As torchscale's retention divides; sizes of weights of both signs are no sum of them."""
        report = check(lambda q, k, v: self.HELD[name](scores(q, k).tril()) @ v, *qkv())
        assert bool(report.fused) == (name == "before")

    def test_sizes_of_weights_of_one_sign_that_are_constant_to_the_gradient(self):
        def attention(q, k, v):
            w = F.relu(scores(q, k)) ** 2
            return (w / w.abs().detach().sum(-1, keepdim=True).clamp(min=1)) @ v

        assert len(check(attention, *qkv()).fused) == 1

    def test_rows_of_zeros(self):
        # 0 / 0 is NaN in both.
        def attention(q, k, v):
            w = F.relu(scores(q, k)).tril(-1)
            return (w / w.sum(-1, keepdim=True)) @ v

        assert len(check(attention, *qkv(), training=False).fused) == 1

    @pytest.mark.parametrize("size", [1e-22, 1e22])
    def test_sums_whose_square_is_beyond_float32(self, size):
        def attention(q, k, v, gate):
            w = F.relu(scores(q, k)) * gate
            return (w / w.sum(-1, keepdim=True)) @ v

        gate = torch.linspace(1, 2, S) * size
        assert len(check(attention, *qkv(), gate).fused) == 1

    def test_sums_are_returned_too(self):
        def attention(q, k, v):
            w = scores(q, k).sigmoid()
            return w @ v, w.sum(-1)

        [region] = check(attention, *qkv()).regions
        assert region.fused and region.hint == ""

    def test_no_sum_is_made_that_nobody_reads(self):
        def attention(q, k, v):
            w = scores(q, k).sigmoid()
            return w @ v + 0 * w.sum(-1).shape[0]

        assert_expected_inline(
            specs(check(attention, *qkv())),
            """attention(normalize=none, score=sigmoid(0.25*s))""",
        )

    def test_half_precision_grouped(self):
        def attention(q, k, v):
            k, v = (x.repeat_interleave(2, 1) for x in (k, v))
            w = F.relu(q @ k.mT) ** 2
            return (w / (w.sum(-1, keepdim=True) + 1)) @ v

        shapes = ((B, H, S, D), (B, 2, S, D), (B, 2, S, D))
        given = [normal(*x, seed=i, dtype=torch.bfloat16) for i, x in enumerate(shapes)]
        assert len(check(attention, *given).fused) == 1
