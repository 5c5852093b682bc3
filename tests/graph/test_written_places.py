"""Scores and masks written at rows and columns, x[..., rows, columns] = number, and at slices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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


TRIANGLES = {
    "kv <= q": lambda rows, columns: torch.triu_indices(rows, columns, offset=1),
    "kv >= q + 1": torch.tril_indices,
}


@pytest.mark.parametrize("mask", TRIANGLES)
def test_places_of_a_triangle(mask):
    # pbloem's former.
    def attention(q, k, v):
        scores = scores_of(q, k)
        places = TRIANGLES[mask](scores.size(-2), scores.size(-1))
        scores[..., places[0], places[1]] = -INF
        return attend(scores, v)

    assert f"mask={mask}" in specs(check(attention, *qkv()))


def test_places_of_a_smaller_triangle():
    def attention(q, k, v):
        i, j = torch.triu_indices(8, 10, 2)
        scores = scores_of(q, k)
        scores[..., i, j] = -INF
        return attend(scores, v)

    report = check(attention, *qkv())
    assert "mask=(kv <= q + 1) | (kv >= 10) | (q >= 8)" in specs(report)


def test_places_of_a_triangle_exchanged():
    def attention(q, k, v):
        i, j = torch.triu_indices(S, S, 1)
        scores = scores_of(q, k)
        scores[..., j, i] = -INF
        return attend(scores, v)

    assert "mask=kv >= q" in specs(check(attention, *qkv()))


def test_half_of_the_places_of_a_triangle():
    def attention(q, k, v):
        i, _ = torch.triu_indices(S, S, 1)
        scores = scores_of(q, k)
        scores[..., i, i] = -INF
        return attend(scores, v)

    assert not check(attention, *qkv(), training=False).fused


SLICES = {
    "(kv <= 19) | (kv >= 23)": slice(-4, -1),
    "kv >= 3": slice(-40, 3),
    "kv <= 20": slice(-3, None),
    "(kv <= 19) | (kv >= 22)": slice(20, -2),
}


@pytest.mark.parametrize("mask", SLICES)
def test_slices_counted_from_the_end(mask):
    def attention(q, k, v):
        scores = scores_of(q, k)
        scores[..., SLICES[mask]] = -INF
        return attend(scores, v)

    assert specs(check(attention, *qkv())) == f"attention(score=0.25*s, mask={mask}, dead=nan)"


def newest(scores: Tensor) -> Tensor:
    """The causal mask is added to the newest keys, as in MiniMind; those before are a cache."""
    n = scores.size(-2)
    scores[..., -n:] += torch.full((n, n), -INF).triu(1)
    return scores


@pytest.mark.parametrize("cached", [0, 5])
def test_causal_mask_added_to_the_newest_keys(cached):
    def attention(q, k, v):
        return attend(newest(scores_of(q, k)), v)

    q, k, v = qkv()
    q = q[:, :, cached:].detach().requires_grad_()
    seen = f"(kv <= {cached - 1}) | (kv <= q + {cached})" if cached else "kv <= q"
    assert specs(check(attention, q, k, v)) == f"attention(score=0.25*s, mask={seen}, dead=nan)"
    assert "kv <= " in specs(check(attention, q, k, v, dynamic=True))


def test_every_other_key_of_a_slice():
    def attention(q, k, v):
        scores = scores_of(q, k)
        scores[..., ::2] += 1.5
        return attend(scores, v)

    assert specs(check(attention, *qkv())) == "lift: not-pointwise"
