"""A graph without a softmax, or a product of a product, costs one look at its nodes: not even the
shadow is traced."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fa3_compile.frontend.shadow import trace
from fa3_compile.options import Options
from fa3_compile.pipeline import rewrite_attention
from tests.graph.inputs import S, normal


@pytest.fixture
def traced(monkeypatch):
    """How often a shadow was traced."""
    calls = []
    original = trace.make_fx

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(trace, "make_fx", counted)
    return calls


def compile_only(function, *args) -> int:
    fused = []

    def backend(gm, example_inputs):
        fused.append(rewrite_attention(gm, Options(kernels=("reference",), strict=True), "graph"))
        return gm

    torch.compile(function, backend=backend)(*args)
    return sum(fused)


WITHOUT = {
    "products": lambda x: x @ x.T @ x,
    "perceptron": lambda x: F.gelu(F.linear(x, x)),
    "normalised": lambda x: F.layer_norm(x, (S,)),
    "expanded": lambda x: x.expand(2, S, S) + 1,
    "moved": lambda x: (x @ x.T).contiguous().view(S, S).T @ x,
    "reduced": lambda x: torch.relu((x @ x.T).sum(-1, keepdim=True)) * x,
    "layers": lambda x: F.linear(F.relu(F.linear(x, x)), x),
}
WITH = {
    "sigmoid": lambda x: (x @ x.T).sigmoid() @ x,
    "masked": lambda x: (x @ x.T).tril() @ x,
    "method": lambda x: (x @ x.T).softmax(-1) @ x,
    "function": lambda x: F.softmax(x @ x.T, -1) @ x,
    "by hand": lambda x: (e := (x @ x.T).exp()) / e.sum(-1, keepdim=True) @ x,
    "sdpa": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0],
}


@pytest.mark.parametrize("function", WITHOUT.values(), ids=WITHOUT)
def test_no_attention(traced, function):
    assert compile_only(function, normal(S, S)) == 0
    assert not traced


@pytest.mark.parametrize("function", WITH.values(), ids=WITH)
def test_attention(traced, function):
    assert compile_only(function, normal(S, S)) == 1
    assert len(traced) == 1


def test_only_what_leads_to_the_softmax_is_traced():
    # Fifty layers beside the attention do not reach the shadow.
    def model(x):
        y = x
        for _ in range(50):
            y = F.relu(y) + 1
        return (x @ x.T).softmax(-1) @ x, y

    sizes = []

    def backend(gm, example_inputs):
        shadow = trace.shadow(gm)
        assert shadow is not None
        sizes.append(len(shadow.graph.nodes))
        return gm

    torch.compile(model, backend=backend)(normal(S, S))
    assert sizes[0] < 20
