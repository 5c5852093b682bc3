"""Softmaxes by hand that are made safe for rows without keys, which become zeros."""

from __future__ import annotations

import pytest
import torch

from tests.graph.harness import check, specs
from tests.graph.inputs import INF, B, S, chance, qkv, scores_of

# A row's maximum, made finite for rows without keys.
FINITE = {
    "isfinite": lambda m: torch.where(torch.isfinite(m), m, torch.zeros_like(m)),
    "isinf": lambda m: m.masked_fill(m.isinf(), 0.0),
    "equal": lambda m: torch.where(m == -INF, 0.0, m),
    "nan_to_num": lambda m: torch.nan_to_num(m, neginf=0.0),
    "detached": lambda m: m.detach().masked_fill(m.detach() == -INF, 0.0),
}
# Their sum, made other than 0.
POSITIVE = {
    "clamp": lambda s: s.clamp_min(torch.finfo(s.dtype).tiny),
    "added": lambda s: s + 1e-9,
    "where": lambda s: torch.where(s == 0, torch.ones_like(s), s),
    "maximum": lambda s: torch.maximum(s, torch.full_like(s, 1e-6)),
}


def attention(finite, positive, again=None):
    def function(q, k, v, seen):
        scores = scores_of(q, k).masked_fill(~seen, -INF)
        e = torch.exp(scores - finite(scores.amax(-1, keepdim=True)))
        if again is not None:
            e = again(e, seen)
        return e / positive(e.sum(-1, keepdim=True)) @ v

    return function


def hidden_in_part():
    seen = chance(0.6, B, 1, S, S)
    seen[0, :, 3] = False
    return seen


@pytest.mark.parametrize("finite", FINITE)
def test_maximum_made_finite(finite):
    function = attention(FINITE[finite], POSITIVE["clamp"])
    spec = "attention(score=0.25*s, mask=load(0, b, 0, q, kv) != 0, dead=zero, aux=[bool])"
    assert specs(check(function, *qkv(), hidden_in_part())) == spec


@pytest.mark.parametrize("positive", POSITIVE)
def test_sum_made_positive(positive):
    def filled(e, seen):
        return e.masked_fill(~seen, 0.0)

    for again in (None, filled, torch.mul):
        function = attention(FINITE["isfinite"], POSITIVE[positive], again)
        assert "dead=zero" in specs(check(function, *qkv(), hidden_in_part()))


def test_sum_of_zero():
    function = attention(FINITE["isfinite"], lambda s: s)
    report = check(function, *(x.detach() for x in qkv()), hidden_in_part(), training=False)
    assert "dead=nan" in specs(report)
    # 1e-9 is 0 in float16.
    function = attention(FINITE["isfinite"], POSITIVE["added"])
    inputs = [x.detach() for x in qkv()]
    report = check(function, *inputs, hidden_in_part(), training=False, dtype=torch.float16)
    assert "dead=nan" in specs(report)


def test_hidden_by_another_mask():
    """So that a row may have little left of its sum."""
    function = attention(FINITE["isfinite"], lambda s: s.clamp_min(1e-6), lambda e, seen: e.tril())
    assert not check(function, *qkv(), hidden_in_part()).fused


@pytest.mark.parametrize("dims", [None, (-2, -1)])
def test_maximum_of_several_rows(dims):
    """A row far below it has a small sum, which is not what it is divided by."""

    def function(q, k, v):
        scores = 20 * scores_of(q, k)
        largest = scores.max() if dims is None else scores.amax(dims, keepdim=True)
        e = torch.exp(scores - largest)
        return e / e.sum(-1, keepdim=True).clamp_min(1e-6) @ v

    assert not check(function, *qkv()).fused


def test_a_number_taken_off_is_no_maximum():
    def function(q, k, v):
        e = torch.exp(scores_of(q, k) - 0.5)
        return e / e.sum(-1, keepdim=True) @ v

    assert check(function, *qkv()).fused
