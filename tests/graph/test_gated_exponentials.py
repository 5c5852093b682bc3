"""A softmax by hand whose exponentials are multiplied, key by key, by numbers that are read.

They may have any sign, so that they are no part of the score: the softmax is taken without, times
them, and divided by its row's sum once more, as in test_normalised_again.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.graph.harness import check, specs
from tests.graph.inputs import S, chance, future, normal, qkv, scores_of, triangle, uniform


def gated(scores: Tensor, gate: Tensor) -> Tensor:
    return (scores - scores.amax(-1, keepdim=True)).exp() * gate


def normalised(e: Tensor) -> Tensor:
    return e / e.sum(-1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "gate",
    [uniform(S), uniform(S) - 0.1, triangle(), chance(0.7, S).float()],
    ids=["quadrature weights", "of both signs", "queries and keys", "a mask of floats"],
)
def test_gate(gate, dtype):
    """Quadrature weights are those of attention on the sphere (Bonev et al. 2025)."""

    def attention(q, k, v, gate):
        return normalised(gated(scores_of(q, k), gate)) @ v

    spec = specs(check(attention, *qkv(), gate, dtype=dtype))
    assert spec.startswith("attention(score=0.25*s, weight=load(0, ")


def test_gate_beside_fills():
    """The first row has fills alone, of which the gates are left."""

    def attention(q, k, v, gate):
        return normalised(gated(scores_of(q, k).masked_fill(future(0), -1e9), gate)) @ v

    assert "weight=load(0, kv)" in specs(check(attention, *qkv(), uniform(S)))


def test_gate_that_leaves_no_key():
    def attention(q, k, v, gate):
        return normalised(gated(scores_of(q, k), gate)) @ v

    gate = uniform(S, S)
    gate[3] = 0
    assert "weight=load(0, q, kv)" in specs(check(attention, *qkv(), gate))


def test_divided_late():
    def attention(q, k, v, gate):
        e = gated(scores_of(q, k), gate)
        return e @ v / e.sum(-1, keepdim=True)

    assert "weight=load(0, kv)" in specs(check(attention, *qkv(), uniform(S)))


@pytest.mark.parametrize(
    "other",
    [
        lambda e: F.normalize(e, p=1, dim=-1),
        lambda e: e / e.sum(-1, keepdim=True).detach(),
        lambda e: e / (e.sum(-1, keepdim=True) + 1e-6),
        lambda e: e / e[..., 1:].sum(-1, keepdim=True),
        lambda e: e / e.sum(-1, keepdim=True).roll(1, -2),
        lambda e: e / e.sum(-2, keepdim=True),
        lambda e: normalised(e) * e,
    ],
    ids=["sizes", "constant", "more", "some keys", "next row", "queries", "twice"],
)
def test_other_sums(other):
    def attention(q, k, v, gate):
        return other(gated(scores_of(q, k), gate)) @ v

    report = check(attention, *qkv(), normal(S))
    assert report.fused == [] and report.regions
