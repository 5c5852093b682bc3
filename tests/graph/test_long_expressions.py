"""Scores and biases that are made by very many operators: read where they can be, else declined."""

from __future__ import annotations

import torch

from tests.graph.harness import check, specs
from tests.graph.inputs import S, attend, normal, qkv, scores_of


def chained(x):
    for _ in range(40):
        x = torch.tanh(x * 1.01 + 0.01)
    return x


def bias_of_many_operators(q, k, v, bias):
    return attend(scores_of(q, k) + chained(bias), v)


def scores_of_many_operators(q, k, v):
    return attend(chained(scores_of(q, k)), v)


def selects_that_double_the_score(q, k, v):
    scores = scores_of(q, k)
    for i in range(1, 14):
        scores = torch.where(scores > 0.01 * i, scores * 1.01, scores - 0.01)
    return attend(scores, v)


def test_bias_is_read():
    report = check(bias_of_many_operators, *qkv(), normal(S, S, seed=4))
    assert specs(report) == "attention(score=load(0, q, kv) + 0.25*s, aux=[float])"


def test_scores_are_declined():
    assert [x.code for x in check(scores_of_many_operators, *qkv()).regions] == ["not-pointwise"]


def test_expression_that_grows_with_each_select():
    assert [x.code for x in check(selects_that_double_the_score, *qkv()).regions] == [
        "not-pointwise"
    ]
