"""Weights filled with 0 in rows of which the program finds that all scores are -inf."""

from __future__ import annotations

import pytest
import torch

from tests.graph.harness import check, specs
from tests.graph.inputs import INF, S, chance, normal, qkv, scores_of

FILLED = {
    "equal": lambda s, p: p.masked_fill((s == -INF).all(-1, keepdim=True), 0),
    "isneginf": lambda s, p: torch.where(s.isneginf().all(-1, True), 0.0, p),
    "isinf": lambda s, p: torch.where(s.isinf().all(-1)[..., None], torch.zeros_like(p), p),
    "isfinite": lambda s, p: p.masked_fill(~s.isfinite().any(-1, keepdim=True), 0),
    "above": lambda s, p: torch.where((s > -INF).any(-1, keepdim=True), p, 0.0),
    "largest": lambda s, p: torch.where(s.amax(-1, keepdim=True) == -INF, 0.0, p),
    "maximum": lambda s, p: p.masked_fill(s.max(-1, keepdim=True).values.isinf(), 0),
    "logsumexp": lambda s, p: p.masked_fill(s.logsumexp(-1, keepdim=True) == -INF, 0),
}
OTHERS = {
    "other rows": lambda s, p: p.masked_fill((s.roll(1, -2) == -INF).all(-1, keepdim=True), 0),
    "columns": lambda s, p: p.masked_fill((s == -INF).mT.all(-1, keepdim=True), 0),
    "columns of keys": lambda s, p: p.masked_fill((s == -INF).all(-1).unsqueeze(-2), 0),
    "some key": lambda s, p: p.masked_fill((s == -INF).any(-1, keepdim=True), 0),
    "ones": lambda s, p: p.masked_fill((s == -INF).all(-1, keepdim=True), 1),
    "rows with keys": lambda s, p: torch.where((s > -INF).any(-1, keepdim=True), 0.0, p),
    "what overflows": lambda s, p: p.masked_fill((s * 1e38).isinf().all(-1, keepdim=True), 0),
}


def attention(filled):
    def attend(q, k, v, hidden, bias):
        s = (scores_of(q, k) + bias).masked_fill(hidden, -INF)
        return filled(s, s.softmax(-1)) @ v

    hidden = chance(0.5, S, S)
    hidden[3], hidden[:, 5] = True, True
    return attend, (*qkv(), hidden, normal(S, S, seed=8))


@pytest.mark.parametrize("name", FILLED)
def test_rows_without_keys(name):
    function, inputs = attention(FILLED[name])
    assert specs(check(function, *inputs)) == (
        "attention(score=load(1, q, kv) + 0.25*s, mask=load(0, q, kv) == 0, dead=zero, "
        "aux=[bool, float])"
    )


def test_weights_in_half_precision():
    # Scores beyond 65504 are infinite for the condition, and none for the softmax.
    def attend(q, k, v):
        s = scores_of(q, k) - 1e5
        return s.softmax(-1).masked_fill((s.half() == -INF).all(-1, keepdim=True), 0) @ v

    assert check(attend, *qkv()).fused == []


@pytest.mark.parametrize("name", OTHERS)
def test_other_rows(name):
    function, inputs = attention(OTHERS[name])
    assert check(function, *inputs).fused == []
