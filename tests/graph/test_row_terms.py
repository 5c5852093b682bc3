"""What is taken off a row before its softmax, and rows that have nothing but fills."""

from __future__ import annotations

import math

import pytest
import torch

from tests.graph.harness import check, specs
from tests.graph.inputs import LOWEST, B, H, S, attend, future, normal, qkv, scores_of


def less_maximum(scores, times=32):
    """CogView: (x / c - max(x / c)) * c stays in half precision."""
    scores = scores / times
    return (scores - scores.amax(-1, keepdim=True)) * times


def padding(*lengths):
    return (torch.arange(S) >= torch.tensor(lengths)[:, None])[:, None, None]


def test_padding_and_a_gated_bias_after_the_maximum():
    # BEATs and WavLM, as microsoft/unilm has them.
    def attention(q, k, v, hidden, gate, bias):
        scores = less_maximum(scores_of(q, k)).masked_fill(hidden, -math.inf)
        return attend(scores + gate.sigmoid() * bias, v)

    gate, bias = normal(B, H, S, 1, seed=4), normal(H, S, S)
    report = check(attention, *qkv(), padding(S, 9), gate, bias)
    assert "mask=load(0, b, 0, 0, kv) == 0" in specs(report)


def test_rows_that_padding_hides_after_the_maximum():
    def attention(q, k, v, hidden, bias):
        return attend(less_maximum(scores_of(q, k)).masked_fill(hidden, -math.inf) + bias, v)

    hidden, bias = padding(S, 0), normal(H, S, S).detach()
    assert check(attention, *qkv(), hidden, bias, training=False).fused


@pytest.mark.parametrize("fill", [LOWEST, -1e9])
def test_a_finite_fill_after_the_maximum_and_a_bias(fill):
    def attention(q, k, v, hidden, bias):
        return attend(less_maximum(scores_of(q, k)).masked_fill(hidden, fill) + bias, v)

    assert not check(attention, *qkv(), padding(S, 9), normal(H, S, S)).fused


@pytest.mark.parametrize("fill", [LOWEST, -1e9])
def test_a_bias_that_a_row_of_fills_less_its_maximum_keeps(fill):
    def attention(q, k, v, bias):
        scores = scores_of(q, k).masked_fill(future().triu(0) | torch.eye(S).bool(), fill)
        return attend(less_maximum(scores) + bias, v)

    assert specs(check(attention, *qkv(), normal(H, S, S))) == "lift: rows-of-fill"


@pytest.mark.parametrize("fill", [-math.inf, LOWEST])
def test_fills_that_are_scaled_less_their_maximum(fill):
    """The first row is the mean of V where 32 * (fill - fill) is 0."""

    def attention(q, k, v):
        scores = scores_of(q, k).masked_fill(future() | torch.eye(S).bool(), fill)
        return attend((scores - scores.amax(-1, keepdim=True)) * 32, v)

    assert bool(check(attention, *qkv()).fused) == (fill == -math.inf)


@pytest.mark.parametrize("bounded", [False, True])
def test_a_tensor_that_may_be_a_mask_is_added_before_the_maximum_and_a_bias(bounded):
    def attention(q, k, v, added, bias):
        scores = scores_of(q, k) + (added.tanh() if bounded else added)
        return attend(scores - scores.amax(-1, keepdim=True) + bias, v)

    added = torch.where(future() | torch.eye(S).bool(), LOWEST, 0.0)
    assert bool(check(attention, *qkv(), added, normal(H, S, S)).fused) == bounded


def test_a_tensor_that_may_be_a_mask_is_added_before_the_maximum():
    # LayoutLMv3.
    def attention(q, k, v, added):
        return attend(less_maximum(scores_of(q, k) + added), v)

    added = torch.where(future() | torch.eye(S).bool(), LOWEST, 0.0)
    assert check(attention, *qkv(), added).fused


def by_hand(exponent, v):
    e = exponent.exp()
    return e / e.sum(-1, keepdim=True) @ v


@pytest.mark.parametrize("fill", [LOWEST, -1e9])
def test_the_maximum_of_scores_that_are_not_filled(fill):
    """A row of fills is 0 / 0."""

    def attention(q, k, v):
        scores = scores_of(q, k)
        hidden = future() | torch.eye(S).bool()
        return by_hand(scores.masked_fill(hidden, fill) - scores.amax(-1, keepdim=True), v)

    assert check(attention, *qkv(), training=False).fused


def test_two_masks_added_after_the_maximum():
    def attention(q, k, v, hidden):
        scores = less_maximum(scores_of(q, k)) + torch.where(hidden, LOWEST, 0.0)
        return by_hand(scores + torch.where(future(), LOWEST, 0.0), v)

    check(attention, *qkv(), torch.arange(S) < 4, training=False)


def test_a_mask_of_a_row_of_fills_less_its_maximum():
    def attention(q, k, v, seen):
        scores = scores_of(q, k).masked_fill(future(), -1e9)
        e = (scores - scores.amax(-1, keepdim=True)).exp() * seen
        return e / e.sum(-1, keepdim=True) @ v

    check(attention, *qkv(), torch.arange(S) >= 4, training=False)


def own_diagonal():
    return torch.eye(S).bool()


@pytest.mark.parametrize("statistic", [torch.amax, torch.logsumexp])
@pytest.mark.parametrize("fill", [-math.inf, LOWEST])
def test_something_taken_off_that_is_of_other_keys(statistic, fill):
    """The first row has a key, and what is taken off it is of fills alone."""

    def attention(q, k, v):
        scores = scores_of(q, k)
        others = scores.masked_fill(future() | own_diagonal(), fill)
        return attend(scores - statistic(others, -1, keepdim=True), v)

    assert specs(check(attention, *qkv())) == "detect: rows-of-fill"


def test_maximum_of_another_row():
    def attention(q, k, v):
        scores = scores_of(q, k).masked_fill(future() | own_diagonal(), -math.inf)
        return attend(scores - scores.amax(-1, keepdim=True)[:, :, :1], v)

    assert not check(attention, *qkv(), training=False).fused


def test_maximum_of_a_tensor_that_may_be_a_mask():
    def attention(q, k, v, added):
        scores = scores_of(q, k)
        return attend(scores - (scores + added).amax(-1, keepdim=True), v)

    added = torch.where(future() | own_diagonal(), -math.inf, 0.0)
    assert not check(attention, *qkv(), added).fused


@pytest.mark.parametrize("fill", [LOWEST, -1e9])
def test_fills_less_a_maximum_of_nothing(fill):
    def attention(q, k, v):
        scores, hidden = scores_of(q, k), future() | own_diagonal()
        largest = scores.masked_fill(hidden, -math.inf).amax(-1, keepdim=True)
        return attend(scores.masked_fill(hidden, fill) - largest, v)

    assert not check(attention, *qkv(), training=False).fused


def test_another_mask_after_the_maximum():
    def attention(q, k, v, hidden):
        scores = scores_of(q, k).masked_fill(future(), -math.inf)
        scores = scores - scores.amax(-1, keepdim=True)
        return attend(scores.masked_fill(hidden, -math.inf), v)

    report = check(attention, *qkv(), padding(S, 9))
    assert "mask=(kv <= q) & (load(0, b, 0, 0, kv) == 0)" in specs(report)


def with_sink(scores, sink):
    return torch.cat([scores, sink[:, None, None].expand(B, H, S, 1)], -1)


@pytest.mark.parametrize("fill", [-math.inf, LOWEST])
def test_weights_beside_a_sink_over_their_sum(fill):
    """A row of fills is 0 / 0 beside a sink."""

    def attention(q, k, v, sink):
        scores = scores_of(q, k).masked_fill(future() | own_diagonal(), fill)
        p = with_sink(scores, sink).softmax(-1)[..., :-1]
        return p / p.sum(-1, keepdim=True) @ v

    check(attention, *qkv(), normal(H, seed=4), training=False)


def test_the_maximum_of_the_keys_beside_a_sink():
    def attention(q, k, v, sink):
        scores = scores_of(q, k).masked_fill(future() | own_diagonal(), -math.inf)
        both = with_sink(scores, sink) - scores.amax(-1, keepdim=True)
        return both.softmax(-1)[..., :-1] @ v

    assert not check(attention, *qkv(), normal(H, seed=4), training=False).fused


def test_the_maximum_of_the_keys_and_a_sink():
    def attention(q, k, v, sink):
        both = with_sink(scores_of(q, k).masked_fill(future(), -math.inf), sink)
        return (both - both.amax(-1, keepdim=True)).softmax(-1)[..., :-1] @ v

    assert check(attention, *qkv(), normal(H, seed=4)).fused


def test_weights_behind_a_sink_over_their_sum():
    def attention(q, k, v, sink):
        first = sink[:, None, None].expand(B, H, S, 1)
        p = torch.cat([first, scores_of(q, k)], -1).softmax(-1)[..., 1:]
        return p / p.sum(-1, keepdim=True) @ v

    assert specs(check(attention, *qkv(), normal(H, seed=4))) == "attention(score=0.25*s)"
