"""Attention that a graph break cuts in two is left alone, and the report says what broke it."""

from __future__ import annotations

import torch

from tests.graph.harness import check, specs
from tests.graph.inputs import normal, qkv, scores_of


def reasons(function, *args, **options):
    return [(x.code, x.reason) for x in check(function, *(args or qkv()), **options).regions]


def before_v(q, k, v):
    weights = scores_of(q, k).softmax(-1)
    torch._dynamo.graph_break()
    return weights.mul(1.0) @ v


def before_the_softmax(q, k, v):
    scores = scores_of(q, k)
    torch._dynamo.graph_break()
    return scores.masked_fill(torch.ones(24, 24).triu(1).bool(), -1e9).softmax(-1) @ v


def on_a_value(q, k, v):
    weights = scores_of(q, k).softmax(-1)
    if weights.max() > 2:
        weights = weights * 0
    return weights @ v


def in_three(q, k, v):
    scores = scores_of(q, k)
    torch._dynamo.graph_break()
    weights = scores.softmax(-1)
    print(end="")
    return weights @ v


def test_between_the_softmax_and_v():
    [(code, reason)] = reasons(before_v)
    assert code == "graph-break" and "the softmax and V" in reason
    line = before_v.__code__.co_firstlineno + 2
    assert f"test_graph_breaks.py:{line}: torch._dynamo.graph_break()" in reason


def test_between_the_product_and_the_softmax():
    [(code, reason)] = reasons(before_the_softmax, dynamic=True)
    assert code == "graph-break" and "Q K^T and the softmax" in reason


def test_branch_on_the_weights():
    [(_, reason)] = reasons(on_a_value)
    assert "if weights.max() > 2" in reason


def test_two_breaks_are_one_attention_and_the_later_one_is_named():
    [(_, reason)] = reasons(in_three)
    assert "the softmax and V" in reason and 'print(end="")' in reason


def broken_elsewhere(q, k, v):
    out = scores_of(q, k).softmax(-1) @ v
    torch._dynamo.graph_break()
    return scores_of(out, k).softmax(-1) @ v


def with_weights_returned(q, k, v):
    weights = scores_of(q, k).softmax(-1)
    out = weights @ v
    torch._dynamo.graph_break()
    return out, weights * 2


def of_no_product(x, y):
    weights = x.softmax(-1)
    torch._dynamo.graph_break()
    return weights @ y


def test_what_is_cut_by_no_break_is_fused():
    plain = "attention(score=0.25*s)"
    assert specs(check(broken_elsewhere, *qkv())) == f"{plain}\n{plain}"
    assert specs(check(with_weights_returned, *qkv())) == plain


def test_what_is_no_attention_is_no_region():
    assert not reasons(of_no_product, normal(2, 24, 24), normal(2, 24, 16))
