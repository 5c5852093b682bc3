"""Attention and the bodies of higher-order operators: fused in there, or told."""

from __future__ import annotations

import pytest
import torch
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.utils.checkpoint import checkpoint

from tests.graph.harness import check, specs
from tests.graph.inputs import attend, plain, qkv, scores_of

PLAIN = "attention(score=0.25*s)"
SPLIT = "detect: split-attention"


class Softmax(torch.autograd.Function):
    """With the gradient written out."""

    @staticmethod
    def forward(ctx, s):
        p = s.softmax(-1)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx, g):
        (p,) = ctx.saved_tensors
        return p * (g - (g * p).sum(-1, keepdim=True))


class Attention(torch.autograd.Function):
    """With its gradients written out (Dao et al. 2022, algorithm 4), from the logsumexp."""

    @staticmethod
    def forward(ctx, q, k, v):
        scores = scores_of(q, k)
        out = attend(scores, v)
        ctx.save_for_backward(q, k, v, out, scores.logsumexp(-1, keepdim=True))
        return out

    @staticmethod
    def backward(ctx, g):
        q, k, v, out, lse = ctx.saved_tensors
        p = (scores_of(q, k) - lse).exp()
        ds = p * (g @ v.mT - (g * out).sum(-1, keepdim=True)) * q.size(-1) ** -0.5
        return ds @ k, ds.mT @ q, p.mT @ g


class Clamped(torch.autograd.Function):
    """A clamp with the gradient of the identity."""

    @staticmethod
    def forward(ctx, s):
        return s.clamp(-1, 1)

    @staticmethod
    def backward(ctx, g):
        return g


class Entmax(torch.autograd.Function):
    """1.5-entmax by bisection (Peters et al. 2019, algorithm 2)."""

    @staticmethod
    def forward(ctx, s):
        p = bisected(s)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx, g):
        (p,) = ctx.saved_tensors
        slope = p.sqrt()
        mean = (g * slope).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True)
        return (g - mean) * slope / 2


def bisected(s):
    x = s / 2
    low = x.amax(-1, keepdim=True) - 1
    for step in (0.5, 0.25, 0.125):
        p = (x - low - step).clamp(min=0) ** 2
        low = torch.where(p.sum(-1, keepdim=True) >= 1, low + step, low)
    p = (x - low).clamp(min=0) ** 2
    return p / p.sum(-1, keepdim=True)


def branches(q, k, v):
    return torch.cond(q.sum() > 0, plain, lambda q, k, v: attend(2 * scores_of(q, k), v), (q, k, v))


def steps(q, k, v):
    def step(carry, x):
        y = plain(carry, k, v) + x
        return y.clone(), y.clone()

    return scan(step, q, torch.stack([q, q]), dim=0)[1]


def loop(q, k, v):
    def again(i, x):
        return i < 3

    def body(i, x):
        return i + 1, plain(x, k, v)

    return while_loop(again, body, (torch.tensor(0), q.clone()))[1]


def test_products_of_gradients_are_not_of_results():
    """Dynamo has one value for the gradient that a backward is given and for the result it is of."""
    assert check(Attention.apply, *qkv()).fused


@pytest.mark.parametrize("function", [branches, steps, loop])
def test_whole_in_a_body(function):
    fused = specs(check(function, *qkv(), training=False)).split("\n")
    assert fused[0] == PLAIN and len(fused) == 1 + (function is branches)


def softmax_of_a_branch(q, k, v):
    s = scores_of(q, k)
    branches = lambda s: s.softmax(-1), lambda s: (2 * s).softmax(-1)
    return torch.cond(q.sum() > 0, *branches, (s,)) @ v


HALVES = {
    "function": lambda q, k, v: Softmax.apply(scores_of(q, k)) @ v,
    "checkpoint": lambda q, k, v: (
        checkpoint(lambda q, k: scores_of(q, k).softmax(-1), q, k, use_reentrant=False) @ v
    ),
    "checkpoint of V too": lambda q, k, v: checkpoint(
        lambda s, v: s.softmax(-1) @ v, scores_of(q, k), v, use_reentrant=False
    ),
}


@pytest.mark.parametrize("name", HALVES)
def test_half_in_a_body(name):
    [region] = check(HALVES[name], *qkv()).regions
    assert (region.code, region.fused) == ("split-attention", False)
    assert "test_bodies.py" in region.where


def test_half_in_a_branch():
    assert specs(check(softmax_of_a_branch, *qkv(), training=False)) == SPLIT


def test_scores_through_a_body():
    def attention(q, k, v):
        return attend(Clamped.apply(scores_of(q, k)), v)

    assert specs(check(attention, *qkv())) == "detect: opaque-scores"


def test_weights_made_by_a_function():
    [region] = check(lambda q, k, v: Entmax.apply(scores_of(q, k)) @ v, *qkv()).regions
    assert (region.code, region.fused) == ("opaque-weights", False)
    assert "test_bodies.py" in region.where


def test_weights_of_a_bisection():
    [region] = check(lambda q, k, v: bisected(scores_of(q, k)) @ v, *qkv()).regions
    assert (region.code, region.fused) == ("not-pointwise", False)
    assert region.reason.startswith("the sum of a row")


NO_ATTENTION = {
    "function of a layer": lambda q, k, v: Entmax.apply(q @ torch.eye(16)) @ k.mT,
    "function of the output": lambda q, k, v: Entmax.apply(plain(q, k, v)) * v,
    "router": lambda q, k, v: (
        checkpoint(lambda x: x.softmax(-1), q[..., :3], use_reentrant=False) @ k[:, :, :3]
    ),
    "gate": lambda q, k, v: plain(q, k, v) * checkpoint(lambda x: x.exp(), q, use_reentrant=False),
}


@pytest.mark.parametrize("name", NO_ATTENTION)
def test_no_attention_in_a_body(name):
    left = specs(check(NO_ATTENTION[name], *qkv()))
    assert SPLIT not in left and "opaque-weights" not in left
