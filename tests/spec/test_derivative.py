"""Derivatives of scores: sympy's where it has one to print, torch's at the corners."""

# A parsed text is an Expr or a Boolean.
# pyright: reportArgumentType=false

import pytest
import sympy
import torch

from fa3_compile.lower.printers.elements import Shape, elements
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.derivative import derivative
from fa3_compile.spec.expr import S, load
from fa3_compile.spec.text import parse, text

SHAPE = Shape(1, 1, 1, 5)
SCORES = [
    "0.25*s",
    "20.0*tanh(0.05*s)",
    "exp(0.1*s) + pow(s, 2)",
    "pow(abs(s) + 1.0, 1.5)",
    "log(pow(s, 2) + 1.0)*sin(s)",
    "atan(s) + erf(s) - cosh(0.1*s) + sinh(0.1*s)*cos(s)",
    "s*sigmoid(0.5*s)",
    "where(s > 0.0, s, 0.1*s)",
    "max(min(s, 1.0), -1.0)",
    "max(s, -s)",
    "min(s, 2.0*s, 0.5)",
    "abs(s) + sign(s) + floor(s) + round(s)",
    "pow(2.0, s)",
]


@pytest.mark.parametrize("score", SCORES)
def test_is_what_torch_differentiates(score: str) -> None:
    """At corners too: 0 is a corner of abs and of max(s, -s), 1 of hardtanh."""
    s = torch.tensor([-2.5, -1.0, 0.0, 1.0, 1.7], dtype=torch.float64).view(1, 1, 1, 5)
    s.requires_grad_()
    expr = parse(score)
    arguments = (AttentionSpec(), SHAPE, s, [], [], torch.float64, s.device)
    [value] = elements([expr], *arguments)
    [expected] = torch.autograd.grad(value.expand(s.shape).sum(), s)
    found = derivative(expr, S)
    assert not found.has(sympy.Heaviside, sympy.DiracDelta, sympy.Derivative, sympy.Subs)
    [slope] = elements([found], *arguments)
    torch.testing.assert_close(slope.to(torch.float64).expand(s.shape), expected)


def test_loads_are_variables_of_their_own() -> None:
    score = parse("load(0, h)*(kv - q) + s*load(1, b, h, q, kv) + load(0, 0)")
    assert text(derivative(score, load(0, *parse("load(0, h)").args[1:]))) == "kv - q"
    assert text(derivative(score, parse("load(1, b, h, q, kv)"))) == "s"
    assert text(derivative(score, S)) == "load(1, b, h, q, kv)"


def test_names_a_function_without_a_rule() -> None:
    with pytest.raises(TypeError, match="gamma"):
        derivative(sympy.gamma(S), S)


@pytest.mark.parametrize(
    "score, function",
    [
        ("max(s, 0)", torch.relu),
        ("min(max(s, -1.0), 1.0)", torch.nn.functional.hardtanh),
        ("max(s, -s)", lambda s: torch.maximum(s, -s)),
        ("min(0.5*s, 2.0*s)", lambda s: torch.minimum(0.5 * s, 2.0 * s)),
        ("max(s, load(0))", lambda s: torch.maximum(s, torch.zeros_like(s))),
        ("min(s, load(0))", lambda s: torch.minimum(s, torch.zeros_like(s))),
    ],
)
def test_corners_of_torch_functions(score: str, function) -> None:
    """What a zero-padded key meets: its scores are exactly 0."""
    s = torch.tensor([-1.0, 0.0, 1.0, torch.nan], dtype=torch.float64).requires_grad_()
    [expected] = torch.autograd.grad(function(s).sum(), s)
    shape = Shape(1, 1, 1, 4)
    aux = [torch.zeros(())]
    arguments = (AttentionSpec(), shape, s.view(1, 1, 1, 4), aux, [], torch.float64, s.device)
    value, slope = elements([parse(score), derivative(parse(score), S)], *arguments)
    [of_reference] = torch.autograd.grad(value.sum(), s)
    torch.testing.assert_close(slope.view(4).to(torch.float64), expected, equal_nan=True)
    torch.testing.assert_close(of_reference, expected, equal_nan=True)
