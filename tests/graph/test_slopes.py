"""Gradients of scores and learned biases that lie exactly where a function has a corner.

Zero-padded keys and projections that start at zero have scores of exactly 0, new biases are 0.
"""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F

from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.derivative import derivative
from fa3_compile.spec.expr import S
from tests.graph.harness import check, specs

FUNCTIONS = {
    "softplus": F.softplus,
    "elu": F.elu,
    "selu": F.selu,
    "asinh": torch.asinh,
    "sinc": torch.sinc,
    "logaddexp": lambda s: torch.logaddexp(s, torch.zeros(())),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "root of relu": lambda s: s.relu().sqrt(),
}
BOUNDS = {
    "clamp": lambda x: x.clamp(min=0),
    "clamp on both sides": lambda x: x.clamp(-1, 0),
    "relu": F.relu,
    "maximum": lambda x: torch.maximum(x, torch.zeros(())),
    "minimum": lambda x: torch.minimum(x, torch.zeros(())),
}


def whole_numbers(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-2, 3, shape, generator=generator).float()


def qkv() -> list[torch.Tensor]:
    return [whole_numbers(1, 2, 7, 4).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_scores(name: str) -> None:
    function = FUNCTIONS[name]
    report = check(lambda q, k, v: function(q @ k.mT).softmax(-1) @ v, *qkv())
    assert report.fused
    # What the kernels print is no other slope.
    slope = derivative(AttentionSpec.parse(specs(report)).score, S)
    s = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    [expected] = torch.autograd.grad(function(s).sum(), s)
    found = [float(sympy.N(slope.subs(S, x))) for x in s.tolist()]
    assert found == pytest.approx(expected.tolist(), abs=1e-7)


@pytest.mark.parametrize("shape", [(2, 1, 1), (7, 7), (2, 1, 7)], ids=["head", "both", "key"])
@pytest.mark.parametrize("name", BOUNDS)
def test_a_bias_that_is_zero(name: str, shape: tuple[int, ...]) -> None:
    bias = torch.zeros(shape).requires_grad_()

    def attention(q, k, v, bias):
        return ((q @ k.mT) * 0.1 + BOUNDS[name](bias) * 2).softmax(-1) @ v

    assert check(attention, *qkv(), bias).fused
