"""The sum of a row of a softmax is 1, and NaN where the row has no key: what is made of it there,
and of weights whose NaN is replaced in one place and not in another."""

from __future__ import annotations

import pytest
import torch

from tests.graph.harness import check, specs
from tests.graph.inputs import INF, B, S, chance, qkv, scores_of, uniform


def softmax(q, k, seen, scale=1.0):
    return (scale * scores_of(q, k)).masked_fill(~seen, -INF).softmax(-1)


def total(p):
    return p.sum(-1, keepdim=True)


def checked(of_weights):
    """The specs of `of_weights(p, seen, gate) @ v`, some of whose rows have no key."""
    seen = chance(0.6, B, 1, S, S)
    seen[0, :, 3] = False

    def attention(q, k, v, seen, gate):
        return of_weights(softmax(q, k, seen), seen, gate) @ v

    inputs = [x.detach() for x in qkv()]
    return specs(check(attention, *inputs, seen, uniform(S, S), training=False))


# Conditions that are false where the sum is NaN.
CONDITIONS = {
    "positive": lambda p: torch.where(total(p) > 0, p, 0.0),
    "itself": lambda p: torch.where(total(p) == total(p), p, 0.0),
    "a number": lambda p: p.masked_fill(total(p).isnan(), 0.0),
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditions(condition):
    assert "attention" not in checked(lambda p, seen, gate: CONDITIONS[condition](p))


FUSED = {
    "divided": lambda p, seen, gate: p / total(p),
    "mean off": lambda p, seen, gate: p - total(p) / S,
    "factor": lambda p, seen, gate: p * total(p),
    "condition as a factor": lambda p, seen, gate: p * (total(p) > 0),
}


@pytest.mark.parametrize("of_weights", FUSED)
def test_fused(of_weights):
    assert "attention" in checked(FUSED[of_weights])


# NaN replaced in some of the places where a softmax stands.
REPLACED_IN_PART = {
    "one addend": lambda p, seen, gate: 0.5 * p.nan_to_num() + 0.3 * gate * p,
    "the weights": lambda p, seen, gate: p.nan_to_num() / (total(p) + 1e-6),
    "the sum": lambda p, seen, gate: p / (total(p.nan_to_num()) + 1e-6),
    "weights with a gate": lambda p, seen, gate: p.nan_to_num() * gate / (total(p * gate) + 1e-6),
    "weights that are filled": lambda p, seen, gate: p.masked_fill(~seen, 0.0) * total(p),
    "beside the mean": lambda p, seen, gate: p.nan_to_num() - p.mean(-1, keepdim=True),
}


@pytest.mark.parametrize("place", REPLACED_IN_PART)
def test_replaced_in_part(place):
    checked(REPLACED_IN_PART[place])


def test_replaced_throughout():
    def of_weights(p, seen, gate):
        p = p.nan_to_num() * gate
        return p / (total(p) + 1e-6)

    assert "dead=zero" in checked(of_weights)


def test_a_difference_replaced():
    """One of whose softmaxes may have keys where the other has none."""
    seen = chance(0.6, B, 1, S, S)
    seen[0, :, 3] = False

    def attention(q, k, v, seen):
        p = softmax(q, k, seen) - 0.5 * softmax(q, k, torch.ones_like(seen), 0.5)
        return p.masked_fill(p.isnan(), 0.0) @ v

    check(attention, *(x.detach() for x in qkv()), seen, training=False)
