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


class TestExponentialsMasked:
    """A mask that multiplies or fills exponentials leaves rows of zeros, whatever the maximum is."""

    def guarded(self, mask, shift=lambda s: s.amax(-1, keepdim=True), fill=None, late=False):
        def attention(q, k, v, seen):
            scores = scores_of(q, k)
            scores = scores if fill is None else scores.masked_fill(~seen, fill)
            e = mask(torch.exp(scores - shift(scores)), seen)
            total = e.sum(-1, keepdim=True)
            total = total + (total == 0).to(total.dtype)
            return e @ v / total if late else e / total @ v

        return check(attention, *qkv(), hidden_in_part())

    @pytest.mark.parametrize("mask", [torch.mul, lambda e, seen: e.masked_fill(~seen, 0.0)])
    @pytest.mark.parametrize("late", [False, True])
    def test_rows_without_keys(self, mask, late):
        for fill in (None, -1e9):
            assert "dead=zero" in specs(self.guarded(mask, fill=fill, late=late))

    def test_filled_with_infinity_too(self):
        """-inf less -inf is NaN, which the fill of the exponentials hides."""
        report = self.guarded(lambda e, seen: e.masked_fill(~seen, 0.0), fill=-INF)
        assert "dead=zero" in specs(report)

    def test_filled_with_infinity_and_multiplied(self):
        """Then it is NaN times 0."""

        def attention(q, k, v, seen):
            scores = scores_of(q, k).masked_fill(~seen, -INF)
            e = torch.exp(scores - scores.amax(-1, keepdim=True)) * seen
            total = e.sum(-1, keepdim=True)
            return e / torch.where(total == 0, 1.0, total) @ v

        inputs = [x.detach() for x in qkv()]
        check(attention, *inputs, hidden_in_part(), training=False)

    def test_no_maximum(self):
        report = self.guarded(torch.mul, shift=lambda s: 0.5)
        assert "dead=zero" in specs(report)

        def attention(q, k, v, seen):
            e = torch.exp(scores_of(q, k).masked_fill(~seen, -INF))
            total = e.sum(-1, keepdim=True)
            return e / torch.where(total == 0, 1.0, total) @ v

        assert "dead=zero" in specs(check(attention, *qkv(), hidden_in_part()))

    def test_maximum_of_what_has_a_bias(self):
        """Which may empty rows as well: those are NaN, and the others zeros."""

        def attention(q, k, v, seen, bias):
            scores = scores_of(q, k) + bias
            e = torch.exp(scores - scores.amax(-1, keepdim=True)) * seen
            total = e.sum(-1, keepdim=True)
            return e / torch.where(total == 0, 1.0, total) @ v

        bias = torch.zeros(S, S)
        bias[7] = -INF
        inputs = [x.detach() for x in qkv()]
        check(attention, *inputs, hidden_in_part(), bias, training=False)


def test_maximum_that_is_not_made_finite():
    def function(m):
        return torch.nan_to_num(m, posinf=INF, neginf=-INF)

    inputs = [x.detach() for x in qkv()]
    check(attention(function, POSITIVE["added"]), *inputs, hidden_in_part(), training=False)
