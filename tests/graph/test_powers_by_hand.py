"""Softmaxes by hand of powers: base ** s over its row's sum is a softmax of s * log(base)."""

from __future__ import annotations

import math

import pytest
import torch

from tests.graph.harness import check, specs
from tests.graph.inputs import LOWEST, S, future, normal, qkv, scores_of


@pytest.mark.parametrize("base", [2, 10.0, 0.7])
def test_powers_of_a_number(base):
    def attention(q, k, v):
        e = base ** scores_of(q, k)
        return e / e.sum(-1, keepdim=True) @ v

    score = specs(check(attention, *qkv())).removeprefix("attention(score=").removesuffix("*s)")
    assert math.isclose(float(score), 0.25 * math.log(base))


@pytest.mark.parametrize("fill", [-math.inf, LOWEST])
def test_powers_of_a_number_less_the_maximum(fill):
    def attention(q, k, v):
        scores = scores_of(q, k).masked_fill(future(), fill)
        e = torch.pow(2, scores - scores.amax(-1, keepdim=True))
        return e / e.sum(-1, keepdim=True) @ v

    assert "mask=kv <= q" in specs(check(attention, *qkv()))


def test_powers_of_fills_vanish():
    """The first row is 0 / 0."""

    def attention(q, k, v):
        hidden = future() | torch.eye(S).bool()
        e = 2 ** scores_of(q, k).masked_fill(hidden, -1e9)
        return e / e.sum(-1, keepdim=True) @ v

    assert check(attention, *qkv(), training=False).fused


def test_powers_of_what_is_given_are_no_softmax():
    """Where the base is below 0, they are NaN."""

    def attention(q, k, v, base):
        e = base ** scores_of(q, k)
        return e / e.sum(-1, keepdim=True) @ v

    assert "normalize=sums" in specs(check(attention, *qkv(), normal(1).abs()))


@pytest.mark.parametrize("base", [0.5, 1.0])
def test_powers_that_are_infinite_at_a_fill_or_none(base):
    def attention(q, k, v):
        e = torch.pow(base, scores_of(q, k).masked_fill(future(), LOWEST))
        return e / e.sum(-1, keepdim=True) @ v

    assert not check(attention, *qkv(), training=False).fused
