"""Scores and masks written at rows and columns: x[..., rows, columns] = number."""

from __future__ import annotations

import pytest
import torch

from tests.graph.harness import check, specs
from tests.graph.inputs import INF, S, attend, qkv, scores_of

AT = slice(None), slice(None)


def written(places, value=-INF, **options) -> str:
    """What is found where the scores at `places(positions)` are a number."""

    def attention(q, k, v):
        scores = scores_of(q, k)
        scores[(*AT, *places(torch.arange(k.size(2))))] = value
        return attend(scores, v)

    return specs(check(attention, *qkv(), **options))


COMPUTED = {
    "q != kv": lambda i: (i, i),
    "(kv <= 0) | (kv >= 24) | (q != kv - 1)": lambda i: (i[:-1], i[1:]),
    "kv != -q + 23": lambda i: (i, S - 1 - i),
    "(kv <= 2) | (kv >= 10) | (q >= 4)": lambda i: (i[:4, None], i[:7] + 3),
    "(kv >= 5) | (q != 3)": lambda i: (torch.full((1,), 3), i[:5]),
}


@pytest.mark.parametrize("mask", COMPUTED)
def test_places_that_are_counted(mask):
    assert written(COMPUTED[mask]) == f"attention(score=0.25*s, mask={mask}, dead=nan)"


def test_a_query_is_its_own_key_with_a_low_score():
    """As in Reformer (Kitaev et al. 2020, section 2, "Causal masking for shared-QK attention")."""
    assert "q == kv" in written(lambda i: (i, i), -5e4, dynamic=True)


def test_a_mask_is_written():
    def attention(q, k, v):
        mask = torch.zeros(S, S, dtype=torch.bool)
        mask[torch.arange(S), torch.arange(S)] = True
        return attend(scores_of(q, k).masked_fill(mask, -INF), v)

    assert specs(check(attention, *qkv())) == "attention(score=0.25*s, mask=q != kv, dead=nan)"


READ = {
    "every other": lambda i: (2 * i[:12], 2 * i[:12]),
    "from the end": lambda i: (i - 3, i - 3),
    "not in order": lambda i: ((5 * i) % 7, i),
    "given": lambda i: (torch.tensor([1, 5]), torch.tensor([1, 5])),
}


@pytest.mark.parametrize("places", READ.values(), ids=READ)
def test_other_places(places):
    assert "s, mask" not in written(places, -9.0)
