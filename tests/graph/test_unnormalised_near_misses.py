"""What only looks like attention without a softmax: layers, linear attention, products of products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

from tests.graph.harness import check, specs, weighed
from tests.graph.inputs import (
    B,
    D,
    H,
    S,
    normal,
    qkv,
)
from tests.graph.inputs import scores_of as scores


def silent(function: Callable, *args) -> None:
    """Nothing is fused, and nothing is said of it."""
    assert check(function, *args).regions == []


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(normal(*shape).detach())


class Layers(nn.Module):
    """A program with two parameters."""

    def __init__(self, function: Callable, a: tuple[int, ...], b: tuple[int, ...]):
        super().__init__()
        self.a, self.b, self.function = parameter(*a), parameter(*b), function

    def forward(self, x):
        return self.function(x, self.a, self.b)


class TestNoAttention:
    MLPS = {
        "linear": (lambda x, a, b: F.linear(F.gelu(F.linear(x, a)), b), (32, D), (D, 32)),
        "matmul": (lambda x, a, b: torch.relu(x @ a) @ b, (D, 32), (32, D)),
        "squared": (lambda x, a, b: torch.relu(x @ a.mT).square() @ b, (32, D), (32, D)),
        "gated": (lambda x, a, b: F.silu(x @ a) * (x @ a) @ b, (D, 32), (32, D)),
        "experts": (lambda x, a, b: torch.bmm(F.relu(torch.bmm(x, a)), b), (B, D, 9), (B, 9, D)),
        "experts, einsum": (
            lambda x, a, b: torch.einsum(
                "bsf,bfd->bsd", torch.einsum("bsd,bdf->bsf", x, a).relu(), b
            ),
            (B, D, 9),
            (B, 9, D),
        ),
        "cast weights": (lambda x, a, b: torch.relu(x @ (a * 2)) @ (b + 1), (D, 32), (32, D)),
        "low rank": (lambda x, a, b: (x @ a * 0.5) @ b, (D, 4), (4, D)),
        "low rank, batched": (lambda x, a, b: torch.bmm(torch.bmm(x, a) * 2, b), (B, D, 4), (B, 4, D)),
        "bilinear": (lambda x, a, b: torch.tanh(x @ a) @ x.mT, (D, D), (1,)),
        "table of values": (lambda x, a, b: torch.relu(x @ x.mT) @ a, (S, D), (1,)),
    }  # fmt: skip

    @pytest.mark.parametrize("name", MLPS)
    def test_parameters(self, name):
        silent(Layers(*self.MLPS[name]), normal(B, S, D))

    def test_weights_as_buffers(self):
        class Quantised(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("a", normal(D, 32).detach())
                self.register_buffer("b", normal(32, D).detach())

            def forward(self, x):
                return torch.relu(x @ (self.a * 0.1)) @ (self.b * 0.1)

        silent(Quantised(), normal(S, D))

    def test_given_matrices(self):
        silent(lambda x, a, b: torch.relu(x @ a) @ b, normal(B, S, D), normal(D, 32), normal(32, D))
        silent(lambda x, a, b: torch.relu(x @ a) @ b, normal(S, D), normal(D, 32), normal(32, D))

    CHAINS = {
        "plain": lambda q, k, v: (q @ k.mT) @ v,
        "moved": lambda q, k, v: (q @ k.mT).contiguous().view(B, H, S, S) @ v,
        "state": lambda q, k, v: F.elu(q) @ ((F.elu(k).mT @ v) / S),
        "gram": lambda q, k, v: ((q.mT @ q / S - k.mT @ k / S) ** 2).sum(),
        "covariance": lambda q, k, v: (q - q.mean(-2, keepdim=True)) @ (q.mT @ q / S),
        "outer": lambda q, k, v: torch.relu(q[..., :1] * k[..., :1].mT).sum(-1),
        "Newton-Schulz": lambda q, k, v: (2 * (a := q @ q.mT) - a @ a) @ q,
        "rows of the weights": lambda q, k, v: torch.relu(q @ k.mT).mT.sum(-1),
    }

    @pytest.mark.parametrize("function", CHAINS.values(), ids=CHAINS)
    def test_chains(self, function):
        assert check(function, *qkv()).fused == []

    def test_rotary_frequencies(self):
        def rotated(q, k, v, inverse, positions):
            angles = (inverse[None, :, None].expand(B, -1, 1) @ positions[:, None, :]).mT
            cos = torch.cat((angles, angles), -1).cos()[:, None]
            return (q * cos) @ (k * cos).mT

        given = (torch.rand(D // 2), torch.arange(S).float().expand(B, S))
        silent(rotated, *qkv(), *given)

    MIXED = {
        "cumulative": lambda s: s.sigmoid().cumsum(-1),
        "sorted": lambda s: s.sigmoid().sort(-1).values,
        "rolled": lambda s: s.sigmoid().roll(1, -1),
        "flipped": lambda s: s.sigmoid().flip(-1),
        "sums of sizes": lambda s: s.tanh() / (s.tanh().abs().sum(-1, keepdim=True) + 1),
        "sums of other weights": lambda s: F.relu(s) / (s.sigmoid().sum(-1, keepdim=True) + 1),
        "sums and factors": lambda s: (
            F.relu(s) / (F.relu(s).sum(-1, keepdim=True) + torch.arange(S))
        ),
        "sums times factors": lambda s: (
            F.relu(s) / (F.relu(s).sum(-1, keepdim=True) * torch.arange(1, S + 1))
        ),
        "sums of other rows": lambda s: F.relu(s) / (F.relu(s).sum(-1)[:, :, None] + 1),
        "sums of all": lambda s: F.relu(s) / (F.relu(s).sum((-1, -2), keepdim=True) + 1),
        "column sums off": lambda s: F.relu(s) / (F.relu(s).sum(-2, keepdim=True) + 1),
        "row maximum off": lambda s: (s - s.amax(-1, keepdim=True)).sigmoid(),
        "normalised": lambda s: F.normalize(F.relu(s), dim=-1),
        "heads mixed": lambda s: s.sigmoid() + s.mean(1, keepdim=True),
        "detached": lambda s: s.sigmoid().detach(),
    }

    @pytest.mark.parametrize("name", MIXED)
    def test_keys_mixed(self, name):
        weights = self.MIXED[name]
        report = check(lambda q, k, v: weights(scores(q, k)) @ v, *qkv())
        assert report.fused == []

    def test_what_is_left_says_why(self):
        report = check(lambda q, k, v: scores(q, k).sigmoid().cumsum(-1) @ v, *qkv())
        [region] = report.regions
        assert region.code == "not-pointwise" and "cumsum" in region.reason

    def test_weights_of_the_other_axis(self):
        report = check(lambda q, k, v: scores(q, k).sigmoid().mT @ v, *qkv())
        # The keys weigh the queries: attention with q and k exchanged.
        assert_expected_inline(
            specs(report), """attention(normalize=none, score=sigmoid(0.25*s))"""
        )

    def test_values_of_another_batch(self):
        report = check(lambda q, k, v: scores(q, k).sigmoid() @ v.flip(0), *qkv())
        assert len(report.fused) == 1  # v.flip(0) is a tensor of the program
        mixed = check(lambda q, k, v: scores(q, k).sigmoid().flip(0) @ v, *qkv())
        assert mixed.fused == []

    @pytest.mark.parametrize("parts", ["chunk", "unbind"])
    def test_weights_that_are_given(self, parts):
        def shared(x, w, weights):
            y = x @ w
            v = y.chunk(3, -1)[2] if parts == "chunk" else y.unflatten(-1, (3, D)).unbind(-2)[2]
            return weights.softmax(-1) @ v

        assert specs(check(shared, normal(S, D), normal(D, 3 * D), normal(S, S))) == ""

    def test_values_made_of_the_weights(self):
        def attention(q, k, v):
            w = scores(q, k).sigmoid()
            return w @ (w @ v)

        # The second's values are made of its weights, as the first's output is.
        assert len(check(attention, *qkv()).fused) == 1


def test_sums_of_other_weights_are_told():
    def softpick(s):
        e = s.exp() - 1
        return e.relu() / (e.abs().sum(-1, keepdim=True) + 1e-6)

    assert weighed(softpick) == "lift: not-pointwise"


def test_sums_over_experts_are_not():
    def mixture(x, up, down, gate):
        h = torch.einsum("td,edf->etf", x, up).relu() * gate.mT[..., None]
        return torch.einsum("etf,efd->etd", h, down).sum(0)

    tensors = normal(S, D), normal(3, D, 8), normal(3, 8, D), normal(S, 3)
    assert not check(mixture, *tensors).regions
