"""Softmaxes written by hand, with sinks and masks of their own, and rarer nonlinearities."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from tests.graph.harness import check, specs
from tests.graph.inputs import LOWEST, B, H, S, attend, chance, normal, qkv, scores_of

CAUSAL = "attention(score=0.25*s, mask=kv <= q, dead=nan)"
ONE = "attention(score=0.25*s, sinks=[0])"


def became(function, *args) -> str:
    return specs(check(function, *qkv(), *args))


def of_weights(normalise):
    return lambda q, k, v: normalise(scores_of(q, k)) @ v


def shifted(s):
    top = s.amax(-1, keepdim=True)
    return (s - top).exp(), top


class TestSoftmaxOne:
    """A 1 beside the exponentials is a sink of 0, where it is shifted as they are."""

    def test_unshifted(self):
        def normalise(s):
            e = s.exp()
            return e / (1 + e.sum(-1, keepdim=True))

        assert became(of_weights(normalise)) == ONE

    @pytest.mark.parametrize(("fill", "mask"), [(-500.0, True), (-100.0, False)])
    def test_fills_that_vanish_without_a_maximum(self, fill, mask):
        # exp(-500) is 0 in float32, and a row of nothing else 0 / 0; exp(-100) is not.
        def normalise(s):
            at = torch.arange(S)
            e = s.masked_fill((at[:, None] < at) | (at[:, None] > S - 2), fill).exp()
            return e / e.sum(-1, keepdim=True)

        spec = became(of_weights(normalise))
        assert (("mask=" in spec) and ("dead=nan" in spec)) == mask, spec

    def test_shifted(self):
        def normalise(s):
            e, top = shifted(s)
            return e / ((-top).exp() + e.sum(-1, keepdim=True))

        assert became(of_weights(normalise)) == ONE

    def test_shifted_by_no_less_than_zero(self):
        def normalise(s):
            top = s.amax(-1, keepdim=True).clamp(min=0)
            e = (s - top).exp()
            return e / ((-top).exp() + e.sum(-1, keepdim=True))

        assert became(of_weights(normalise)) == ONE

    def test_as_it_is_pasted(self):
        # Its sink is the largest score of the row.
        def normalise(s):
            e, _ = shifted(s)
            return e / (1 + e.sum(-1, keepdim=True))

        [region] = check(of_weights(normalise), *qkv()).regions
        assert (region.code, region.stage) == ("sink-of-the-row", "detect")
        assert "exp(sink - m)" in region.hint

    def test_any_other_number(self):
        def normalise(s):
            e = s.exp()
            return e / (e.sum(-1, keepdim=True) + 2.5)

        assert became(of_weights(normalise)) == (
            f"attention(score=0.25*s, sinks=[{math.log(2.5)!r}])"
        )

    def test_whole_numbers_of_each_key(self):
        # Every other key counts five times: log 5 is added to its score.
        def normalise(s):
            e = s.exp() * torch.where(torch.arange(S) % 2 == 0, 5, 1)
            return e / e.sum(-1, keepdim=True)

        assert repr(math.log(5)) in became(of_weights(normalise))


class TestSums:
    """What the exponentials are divided by."""

    def test_reciprocal(self):
        def normalise(s):
            e, _ = shifted(s)
            return e * (1 / e.sum(-1, keepdim=True))

        assert became(of_weights(normalise)) == "attention(score=0.25*s)"

    def test_kept_from_zero(self):
        # The largest exponential is 1: in float32 the sum does not see 1e-9.
        def added(s):
            e, _ = shifted(s)
            return e / (e.sum(-1, keepdim=True) + 1e-9)

        def clamped(s):
            e, _ = shifted(s)
            return e / e.sum(-1, keepdim=True).clamp(min=1e-6)

        assert became(of_weights(added)) == "attention(score=0.25*s)"
        assert became(of_weights(clamped)) == "attention(score=0.25*s)"

    def test_kept_from_zero_noticeably(self):
        def normalise(s):
            e, _ = shifted(s)
            return e / (e.sum(-1, keepdim=True) + 1e-2)

        assert became(of_weights(normalise)) == "detect: sink-of-the-row"

    def test_exponentials_written_twice(self):
        def normalise(s):
            return s.exp() / s.exp().sum(-1, keepdim=True)

        assert became(of_weights(normalise)) == "attention(score=0.25*s)"

    def test_powers_of_two(self):
        def normalise(s):
            e = torch.exp2(s)
            return e / e.sum(-1, keepdim=True)

        assert became(of_weights(normalise)) == (f"attention(score={0.25 * math.log(2)!r}*s)")

    def test_sum_of_another_axis(self):
        def normalise(s):
            e = s.exp()
            return e / e.sum(-2, keepdim=True)

        assert became(of_weights(normalise)) == "detect: softmax-axis"

    def test_sum_not_kept(self):
        # Broadcast along the keys: S sums of other rows.
        def normalise(s):
            e = s.exp()
            return e / e.sum(-1)[..., None, :]

        assert not any(r.fused for r in check(of_weights(normalise), *qkv()).regions)


class TestOneNorm:
    """F.normalize(w, p=1) divides by the sum of sizes."""

    def test_of_shifted_exponentials(self):
        normalise = of_weights(lambda s: F.normalize(shifted(s)[0], p=1, dim=-1))
        assert became(normalise) == "attention(score=0.25*s)"

    def test_of_exponentials_whose_sum_may_be_small(self):
        normalise = of_weights(lambda s: F.normalize(s.exp(), p=1, dim=-1))
        assert became(normalise) == "attention(normalize=sums, score=exp(0.25*s))"

    def test_of_weights_that_may_be_negative(self):
        assert became(of_weights(lambda s: F.normalize(s, p=1, dim=-1))) == "lift: row-sums"

    def test_two_norm(self):
        normalise = of_weights(lambda s: F.normalize(s.exp(), p=2, dim=-1))
        assert became(normalise) == "lift: not-pointwise"


class TestMasks:
    """Multiplied to the exponentials, or to the weights before they are normalised again."""

    def test_exponentials(self):
        def normalise(s):
            e = s.exp() * torch.ones(S, S).tril()
            return e / e.sum(-1, keepdim=True)

        assert became(of_weights(normalise)) == CAUSAL

    def test_shifted_exponentials(self):
        def normalise(s):
            e = shifted(s)[0].tril()
            return e / e.sum(-1, keepdim=True)

        assert became(of_weights(normalise)) == CAUSAL

    def test_boolean_padding(self):
        def attention(q, k, v, padding):
            e = shifted(scores_of(q, k))[0] * padding[:, None, None]
            return e / e.sum(-1, keepdim=True) @ v

        seen = chance(0.7, B, S)
        seen[:, 0] = True
        assert_expected_inline(
            became(attention, seen),
            """attention(score=0.25*s, mask=load(0, b, kv) != 0, dead=nan, aux=[bool])""",
        )

    def test_factor_that_may_be_negative(self):
        def attention(q, k, v, gate):
            e = scores_of(q, k).exp() * gate
            return e / e.sum(-1, keepdim=True) @ v

        report = check(attention, *qkv(), torch.linspace(-1, 2, S))
        assert specs(report) == (
            "attention(normalize=sums, score=exp(0.25*s)*load(0, kv), aux=[float])"
        )

    def test_masked_twice(self):
        def normalise(s):
            p = s.masked_fill(torch.ones(S, S).triu(1).bool(), LOWEST).softmax(-1)
            p = p * (torch.arange(S) >= torch.arange(S)[:, None] - 5)
            return p / p.sum(-1, keepdim=True)

        assert became(of_weights(normalise)) == (
            "attention(score=0.25*s, mask=(kv <= q) & (kv >= q - 5), dead=nan)"
        )


NONLINEAR = {
    "gelu": F.gelu,
    "gelu tanh": lambda s: F.gelu(s, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "selu": F.selu,
    "erfc": torch.erfc,
    "asinh": torch.asinh,
    "hypot": lambda s: torch.hypot(s, torch.ones_like(s)),
    "celu": F.celu,
    "softsign": F.softsign,
    "logsigmoid": F.logsigmoid,
}


@pytest.mark.parametrize("function", NONLINEAR.values(), ids=NONLINEAR)
def test_nonlinear_scores(function):
    def attention(q, k, v):
        return attend(function(scores_of(q, k)), v)

    assert [r.fused for r in check(attention, *qkv()).regions] == [True]


def test_softmin():
    assert became(of_weights(lambda s: F.softmin(s, -1))) == "attention(score=-0.25*s)"


def test_temperature_in_a_logarithm():
    report = became(of_weights(lambda s: F.log_softmax(s / 0.5, -1).exp()))
    assert report == "attention(score=0.5*s)"


def test_logarithm_of_a_gate():
    """exp(s + log(g)) is g exp(s) to sympy."""

    def attention(q, k, v, gate):
        s = scores_of(q, k) + F.logsigmoid(gate) + torch.sigmoid(gate).log()
        e = (s - s.amax(-1, keepdim=True).detach()).exp()
        return e / e.sum(-1, keepdim=True) @ v

    report = check(attention, *qkv(), normal(1))
    assert "log(sigmoid(load(0, 0)))" in specs(report)


def test_softmax_of_a_logarithm_of_the_softmax():
    # The logsumexp of a row cancels; that of a column, or beside a sink, does not.
    gate = normal(B, H, 1, S, seed=5)

    def mixed(dim):
        return lambda s: (F.log_softmax(s, dim) / 0.5 + F.logsigmoid(gate)).softmax(-1)

    def by_hand(s):
        e = (F.log_softmax(s, -1) + gate).exp()
        return e / e.sum(-1, keepdim=True)

    def with_sink(s):
        return F.pad(F.log_softmax(s, -1) + gate, (0, 1)).softmax(-1)[..., :-1]

    assert became(of_weights(mixed(-1))).startswith("attention(score=load(0, b, h, 0, kv) + 0.5*s")
    assert became(of_weights(by_hand)).startswith("attention(score=load(0, b, h, 0, kv) + 0.25*s")
    for near_miss in (mixed(-2), with_sink):
        assert check(of_weights(near_miss), *qkv()).fused == []


def test_power_of_a_softmax_is_none():
    report = check(of_weights(lambda s: (F.log_softmax(s, -1) * 0.5).exp()), *qkv())
    assert not any(r.fused for r in report.regions)


def test_head_dimension_of_one():
    report = check(lambda q, k, v: attend(q @ k.mT, v), *qkv(B, H, S, 1))
    assert specs(report) == "attention(score=s)"


def test_tensordot():
    def attention(q, k, v):
        s = torch.tensordot(q, k, dims=([1], [1]))
        return torch.tensordot(s.softmax(-1), v, dims=1)

    assert [r.fused for r in check(attention, *qkv(S, 16)).regions] == [True]


def beside(scores, sink):
    """The scores with a sink's column, which a shift of the scores alone does not move."""
    return torch.cat((scores, sink[:, None, None].expand(B, H, S, 1)), -1)


def test_maximum_taken_off_the_scores_but_not_off_the_sink():
    def attention(q, k, v, sink):
        scores = scores_of(q, k)
        scores = scores - scores.amax(-1, keepdim=True)
        return beside(scores, sink).softmax(-1)[..., :-1] @ v

    assert not check(attention, *qkv(), normal(H)).fused


def test_maximum_times_a_number():
    # CogView: (x / c - max(x / c)) * c stays in half precision.
    def attention(q, k, v):
        scores = scores_of(q, k) / 32
        return attend((scores - scores.amax(-1, keepdim=True)) * 32, v)

    assert specs(check(attention, *qkv())).startswith("attention(score=0.25*s")


def test_a_row_of_fills_less_two_maxima():
    """CogView's, by hand, where the first row sees nothing: the mean of V."""

    def attention(q, k, v):
        scores = scores_of(q, k) / 4
        scores = (scores - scores.amax(-1, keepdim=True)) * 4
        seen = torch.arange(S)[:, None] > torch.arange(S)
        scores = scores + torch.where(seen, 0.0, LOWEST)
        e = (scores - scores.amax(-1, keepdim=True)).exp()
        return e / e.sum(-1, keepdim=True) @ v

    assert check(attention, *qkv()).fused


def test_a_row_of_two_fills_less_its_maxima():
    """CogView's, by hand: where one mask is -inf and the other a number, a row that they hide
    together is the mean of what the number hides."""

    def attention(q, k, v, hidden):
        scores = scores_of(q, k) / 4
        scores = ((scores - scores.amax(-1, keepdim=True)) * 4).masked_fill(hidden, -math.inf)
        seen = torch.arange(S)[:, None] >= torch.arange(S)
        scores = scores + torch.where(seen, 0.0, LOWEST)
        e = (scores - scores.amax(-1, keepdim=True)).exp()
        return e / e.sum(-1, keepdim=True) @ v

    hidden = torch.zeros(S, S, dtype=torch.bool)
    hidden[3, :4] = True  # all that is seen
    check(attention, *qkv(), hidden)


@pytest.mark.parametrize("value", [LOWEST, -1e9])
def test_rows_of_fill_less_their_logsumexp(value):
    def attention(q, k, v, keep):
        scores = scores_of(q, k).masked_fill(keep[:, None, None, :] == 0, value)
        scores = scores.masked_fill(torch.ones(S, S).triu(1).bool(), value)
        return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v

    keep = torch.arange(S) >= torch.tensor([[0], [8]])
    assert specs(check(attention, *qkv(), keep)) == "lift: rows-of-fill"


def test_rows_of_a_given_fill_less_their_logsumexp():
    """A number that is known when it runs, and a mask that is added."""

    def of_scores(scores, v):
        return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v

    def filled(q, k, v, fill):
        return of_scores(scores_of(q, k).masked_fill(torch.ones(S, S).triu().bool(), fill), v)

    def added(q, k, v, mask):
        return of_scores(scores_of(q, k) + mask, v)

    mask = torch.where(torch.ones(S, S).triu().bool(), LOWEST, 0.0)
    for function, given in ((filled, -1e9), (added, mask)):
        report = check(function, *qkv(), given, dynamic=True)
        assert specs(report) == "lift: rows-of-fill"


def test_exponentials_beside_a_sink_without_a_maximum():
    def attention(q, k, v, sink):
        e = beside(scores_of(q, k), sink).exp()
        return (e / e.sum(-1, keepdim=True))[..., :-1] @ v

    assert "sinks=[load(0, h)]" in specs(check(attention, *qkv(), normal(H)))
