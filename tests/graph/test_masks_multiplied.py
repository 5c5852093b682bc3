"""Masks that multiply the scores, and logarithms of masks that are added."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from tests.graph.harness import check, specs
from tests.graph.inputs import (
    INF,
    LOWEST,
    B,
    H,
    S,
    attend,
    chance,
    future,
    qkv,
    scores_of,
    triangle,
    uniform,
)

LOGARITHMS_OF_MASKS = {
    "product": (lambda x: x * triangle(), "(kv <= q) & (load(0, b, 0, 0, kv) != 0)"),
    "difference": (lambda x: 1 - (1 - x) * future(), "(kv <= q) | (load(0, b, 0, 0, kv) != 0)"),
    "smaller": (lambda x: torch.minimum(x, triangle()), "(kv <= q) & (load(0, b, 0, 0, kv) != 0)"),
    "clamped sum": (
        lambda x: (x + triangle()).clamp(max=1),
        "(kv <= q) | (load(0, b, 0, 0, kv) != 0)",
    ),
}


@pytest.mark.parametrize("name", LOGARITHMS_OF_MASKS)
def test_logarithm_of_masks(name):
    of, mask = LOGARITHMS_OF_MASKS[name]

    def attention(q, k, v, seen):
        return attend(scores_of(q, k) + of(seen.float()).log(), v)

    seen = chance(0.8, B, 1, 1, S)
    spec = f"attention(score=0.25*s, mask={mask}, dead=nan, aux=[bool])"
    assert specs(check(attention, *qkv(), seen)) == spec


@pytest.mark.parametrize("learns", [False, True])
def test_logarithm_of_numbers_under_a_mask(learns):
    # What is no mask is read, as the program computes it.
    def attention(q, k, v, weights):
        return attend(scores_of(q, k) + (weights * triangle()).log(), v)

    weights = uniform(B, 1, 1, S).requires_grad_(learns)
    assert_expected_inline(
        specs(check(attention, *qkv(), weights)),
        """attention(score=load(0, b, 0, q, kv) + 0.25*s, mask=kv <= q, dead=nan, aux=[float])""",
    )


def test_mask_that_multiplies_the_scores():
    # 0 is not -inf: a hidden key keeps the weight exp(0).
    def attention(q, k, v):
        return attend(scores_of(q, k) * triangle(), v)

    assert_expected_inline(
        specs(check(attention, *qkv())), """attention(score=where(kv <= q, 0.25*s, 0))"""
    )


@pytest.mark.parametrize(
    "divided",
    [
        lambda s, t: s / t[:, None, None],
        lambda s, t: s * (1 / t)[:, None, None],
        lambda s, t: s / (t.abs()[:, None, None] * torch.arange(S) + 1),
    ],
)
@pytest.mark.parametrize("weigh", [lambda s: s.softmax(-1), torch.sigmoid])
def test_mask_that_multiplies_scores_with_a_temperature(divided, weigh):
    def attention(q, k, v, t):
        scores = divided(q @ k.mT, t) * triangle() + (1 - triangle()) * LOWEST
        return weigh(scores) @ v

    temperatures = uniform(H, seed=4).add_(3).requires_grad_()
    assert "mask=kv <= q" in specs(check(attention, *qkv(), temperatures))


def test_mask_that_multiplies_a_quotient_by_0():
    # 0 / 0 is NaN for the keys that the mask hides, and so is all of their rows.
    def attention(q, k, v, lengths):
        hidden = (lengths == 0).float()
        return attend(scores_of(q, k) / lengths * (1 - hidden) + hidden * LOWEST, v)

    report = check(attention, *qkv(), torch.arange(S).float(), training=False)
    assert specs(report) == "lift: not-pointwise"


def test_zero_times_infinity():
    # (1 - mask) * -inf is NaN where the mask is 1, and so is everything after it.
    def attention(q, k, v):
        return attend(scores_of(q, k) + (1 - triangle()) * -INF, v)

    assert_expected_inline(
        specs(check(attention, *qkv())),
        """attention(score=load(0, kv - q + 23) + 0.25*s, aux=[float])""",
    )
