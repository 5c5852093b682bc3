"""`F.linear` of two activations is a product; `F.linear` of a layer's weights is a layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.harness import check, specs
from tests.graph.inputs import D, S, normal

KEYS = 20
PLAIN = "attention(score=0.25*s, out_order=qbhd)"


def values() -> tuple[Tensor, Tensor]:
    return normal(KEYS, D, seed=2), normal(KEYS, D, seed=3)


def both(q, k, v):
    k, v = k.tanh(), v.tanh()
    return F.linear((F.linear(q, k) / 4).softmax(-1), v.T)


def with_bias(q, k, v, bias):
    return torch.nn.functional.linear(weight=k.sin(), bias=bias, input=q).softmax(-1) @ v


class Reader(nn.Module):
    """Queries that are learned, and keys from layers."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(normal(5, D, seed=7))
        self.keys, self.values = nn.Linear(D, D), nn.Linear(D, D)
        self.out = nn.Linear(D, D)

    def forward(self, memory):
        weights = (F.linear(self.queries, self.keys(memory)) / 4).softmax(-1)
        return self.out(weights @ self.values(memory))


class Retrieval(nn.Module):
    """Keys and values that a model is given, as it has parameters of its own."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Linear(D, D)

    def forward(self, x, keys, values):
        return F.linear((F.linear(self.queries(x), keys) / 4).softmax(-1), values.T)


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.choice = nn.Linear(D, 5)
        self.experts = nn.Parameter(normal(5, D, seed=7))

    def forward(self, x):
        return F.linear(self.choice(x).softmax(-1), self.experts.t())


@pytest.mark.parametrize("shape", [(S, D), (2, S, D), (2, 3, S, D)], ids=str)
@pytest.mark.parametrize("dynamic", [None, True])
def test_queries_of_any_rank(shape, dynamic):
    report = check(both, normal(*shape), *values(), dynamic=dynamic)
    assert specs(report) == PLAIN


def test_bias_of_each_key():
    report = check(with_bias, normal(2, S, D), *values(), normal(KEYS, seed=5))
    assert specs(report) == "attention(score=load(0, kv) + s, aux=[float], out_order=qbhd)"


def test_in_half_precision():
    given = (normal(2, S, D, dtype=torch.bfloat16), *(x.detach().bfloat16() for x in values()))
    assert specs(check(both, *given)) == PLAIN


def test_learned_queries():
    assert specs(check(Reader(), values()[0])) == PLAIN


def test_keys_that_a_model_is_given():
    assert specs(check(Retrieval(), normal(2, S, D), *values())) == PLAIN


def made_layers(x, w, u):
    """A network whose weights another one makes, and a softmax elsewhere."""
    return F.linear(F.relu(F.linear(x, w * 2)), u * 2), x.softmax(-1)


def similarities(q, k, v):
    return F.linear(q, k.tanh()).log_softmax(-1), v


def classifier(x, layer, table):
    """Layers as a function is called with them."""
    return F.linear(x, layer[:, :D]).softmax(-1) @ table


@pytest.mark.parametrize(
    "function, args",
    [
        (Router(), (normal(2, S, D),)),
        (made_layers, (normal(S, D), normal(32, D, seed=1), normal(D, 32, seed=2))),
        (similarities, (normal(2, S, D), *values())),
        (classifier, (normal(S, D), *values())),
    ],
    ids=["router", "layers", "no product with V", "layers that are given"],
)
def test_what_is_no_attention(function, args):
    assert not check(function, *args).regions
