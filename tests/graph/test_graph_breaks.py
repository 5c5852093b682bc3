"""Attention that a graph break cuts in two is left alone, and the report says what broke it."""

from __future__ import annotations

import pytest
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


def by_a_factor_in_a_tensor(q, k, v):
    """GPT-NeoX of transformers before 4.48: PyTorch has to know what alpha is."""
    q, k = q.flatten(0, 1), k.flatten(0, 1)
    scores = torch.zeros(len(q), q.shape[1], k.shape[1])
    scores = torch.baddbmm(scores, q, k.mT, alpha=torch.ones(()) / v.new_tensor(16.0).sqrt())
    return scores.view(v.shape[0], -1, *scores.shape[1:]).softmax(-1) @ v


@torch.compiler.disable
def scores_of_eager(q, k):
    return scores_of(q, k)


def by_an_eager_function(q, k, v):
    q, k = 0.5 * q, 0.5 * k
    return scores_of_eager(q, k).softmax(-1) @ v  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("function", [by_a_factor_in_a_tensor, by_an_eager_function])
def test_at_the_product(function):
    # Lengths of its own: what the breaks before have left is known by its shape.
    [(code, reason)] = reasons(function, *qkv(2, 3, 20, 8))
    assert code == "graph-break"
    assert "at the product of queries and keys, at " in reason and "test_graph_breaks.py" in reason


def test_scores_that_come_from_elsewhere_are_no_attention():
    def function(x, y):
        y = y * 2
        torch._dynamo.graph_break()
        return x.softmax(-1) @ y

    assert not reasons(function, normal(2, 24, 24), normal(2, 24, 16))


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
