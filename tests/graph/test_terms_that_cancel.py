"""What is added and taken off again: infinity less infinity is NaN, and stays it."""

from __future__ import annotations

import pytest
import torch

from tests.graph.harness import check, specs
from tests.graph.inputs import INF, S, attend, chance, future, normal, qkv, scores_of


@pytest.mark.parametrize("times", [0.3, 1.0, 2.0])
def test_a_bias_that_is_taken_off(times):
    def attention(q, k, v, bias):
        return attend(scores_of(q, k) + bias - times * bias, v)

    bias = normal(S, S).detach()
    report = check(attention, *qkv(), bias)
    assert "load(1, q, kv)" in specs(report)
    check(attention, *qkv(), bias.masked_fill(chance(0.05, S, S), -INF))


def test_the_gradient_of_a_bias_that_is_taken_off():
    def attention(q, k, v, bias):
        return attend(scores_of(q, k) + bias - 0.3 * bias, v)

    assert check(attention, *qkv(), normal(S, S)).fused


def test_straight_through_beside_scores():
    def attention(q, k, v, soft):
        hard = (soft > 0).float()
        return attend(scores_of(q, k) + hard - soft.detach() + soft, v)

    assert check(attention, *qkv(), normal(S, S)).fused
    assert check(attention, *qkv(), normal(S, S), training=False).fused


def test_a_bias_that_is_taken_off_what_a_mask_leaves():
    def attention(q, k, v, bias):
        scores = (scores_of(q, k) + bias).masked_fill(future(), -INF)
        return attend(scores - bias, v)

    bias = normal(S, S).detach()
    bias[5, 2] = -INF
    assert check(attention, *qkv(), bias).fused


def test_a_bias_that_is_added_twice_is_read_once():
    def attention(q, k, v, bias):
        return attend(scores_of(q, k) + bias + bias, v)

    assert specs(check(attention, *qkv(), normal(S, S).detach())) == (
        "attention(score=2*load(0, q, kv) + 0.25*s, aux=[float])"
    )


def test_what_a_function_bounds_cancels():
    """Read twice it would leave the difference of two roundings where eager has 0."""

    def attention(q, k, v, bias):
        bounded = (scores_of(q, k) * bias).tanh()
        return (bounded - bounded).relu() @ v

    report = check(attention, *qkv(), normal(S, S).detach())
    assert "aux" not in specs(report)


@pytest.mark.parametrize("times", [1.0, 0.3])
def test_weights_that_are_nan_by_a_bias_that_is_taken_off_are_replaced(times):
    def attention(q, k, v, bias):
        scores = scores_of(q, k) + bias - times * bias
        return scores.softmax(-1).nan_to_num() @ v

    bias = normal(S, S).detach()
    bias[3] = bias[5, 2] = -INF
    assert specs(check(attention, *qkv(), bias, training=False)) == "lift: rows-of-nan"


def test_weights_that_are_nan_by_a_fill_of_inf_are_replaced():
    def attention(q, k, v):
        return scores_of(q, k).masked_fill(future(), INF).softmax(-1).nan_to_num() @ v

    assert specs(check(attention, *qkv(), training=False)) == "lift: rows-of-nan"


def test_two_biases_whose_rows_without_keys_are_replaced():
    def attention(q, k, v, bias, other):
        return (scores_of(q, k) + bias + other).softmax(-1).nan_to_num() @ v

    bias, other = normal(S, S).detach(), normal(S, S).detach()
    bias[3] = other[5, 2] = -INF
    assert check(attention, *qkv(), bias, other, training=False).fused


@pytest.mark.parametrize(("hidden", "is_fused"), [(-INF, True), (INF, False)])
def test_a_minimum_with_inf_is_not_infinite(hidden, is_fused):
    # Where what is hidden is inf too, so may be what is left.
    def attention(q, k, v, bias):
        padded = (scores_of(q, k) + bias).masked_fill(torch.arange(S) == 2, hidden)
        seen = torch.zeros(S, S).masked_fill(future(), -INF).masked_fill(~future(), INF)
        return torch.minimum(padded, seen).softmax(-1).nan_to_num() @ v

    bias = normal(S, S).detach()
    bias[3] = -INF
    report = check(attention, *qkv(), bias, training=False)
    assert (specs(report) != "lift: rows-of-nan") == is_fused == bool(report.fused)
