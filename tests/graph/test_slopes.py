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
# sympy takes a root and a power together, and eager has infinity times 0 there.
ROOTS_OF_POWERS = {
    "root of a square": lambda s: s.square().sqrt(),
    "power of a square": lambda s: (s**2) ** 0.5,
    "root of squared relu": lambda s: s.relu().square().sqrt(),
    "power of a root": lambda s: s.relu().sqrt() ** 4,
    "hypotenuse": lambda s: torch.hypot(s, torch.zeros(())),
}
SEEN = torch.arange(7)[:, None] >= torch.arange(7)
# Eager's gradient is infinity times the mask's 0.
MASKED_BY_A_FACTOR = {
    "logarithm of exponentials": lambda s: (s.exp() * SEEN).log(),
    "root of sizes": lambda s: ((s.abs() + 1) * SEEN).sqrt(),
    "power of sizes": lambda s: ((s.abs() + 1) * SEEN) ** 0.7,
    "root of a square": lambda s: ((s + 9) * SEEN.float()).square().sqrt(),
    "quotient": lambda s: (1 / ((s.abs() + 1) * SEEN)).clamp(max=2),
}
MASKED_OTHERWISE = {
    "selected": lambda s: torch.where(SEEN, s.exp(), 0.0).log(),
    "filled": lambda s: s.exp().masked_fill(~SEEN, 0.0).log(),
    "away from 0": lambda s: ((s.abs() + 1) * SEEN + 0.1).sqrt(),
    "no root": lambda s: ((s.abs() + 1) * SEEN) ** 1.5,
}
CANCEL = {
    "times 0": lambda s, x: s + 0 * x,
    "less itself": lambda s, x: s + x - x,
    "to the power of 0": lambda s, x: s * x**0,
    "never chosen": lambda s, x: torch.where(torch.ones(7) > 0, s, x),
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


@pytest.mark.parametrize("name", ROOTS_OF_POWERS)
def test_roots_of_powers(name: str) -> None:
    function = ROOTS_OF_POWERS[name]
    report = check(lambda q, k, v: function(q @ k.mT).softmax(-1) @ v, *qkv())
    assert specs(report) == "lift: not-pointwise"


@pytest.mark.parametrize("name", MASKED_BY_A_FACTOR)
def test_infinite_slopes_where_a_mask_multiplies(name: str) -> None:
    function = MASKED_BY_A_FACTOR[name]
    report = check(lambda q, k, v: function(q @ k.mT * 0.1).softmax(-1) @ v, *qkv())
    assert specs(report) == "lift: not-pointwise"


@pytest.mark.parametrize("name", MASKED_OTHERWISE)
def test_slopes_where_a_mask_selects(name: str) -> None:
    function = MASKED_OTHERWISE[name]
    assert check(lambda q, k, v: function(q @ k.mT * 0.1).softmax(-1) @ v, *qkv()).fused


HAVE_A_SLOPE = {
    "power of a square": lambda s: (s**2) ** 1.5,
    "root of a sum": lambda s: (s**2 + 1).sqrt(),
    "power of a root of what is positive": lambda s: (s.abs() + 0.01).sqrt() ** 3 * s.sign(),
}


@pytest.mark.parametrize("name", HAVE_A_SLOPE)
def test_powers_that_have_a_slope(name: str) -> None:
    function = HAVE_A_SLOPE[name]
    assert check(lambda q, k, v: function(q @ k.mT).softmax(-1) @ v, *qkv()).fused


def test_powers_that_are_given() -> None:
    def attention(q, k, v, power):
        s = (q @ k.mT).abs() + 0.1
        return (s ** (power.abs() + 0.5)).square().softmax(-1) @ v

    assert check(attention, *qkv(), torch.linspace(0.1, 1, 7).requires_grad_()).fused


class Learned(torch.nn.Module):
    def __init__(self, change) -> None:
        super().__init__()
        self.change, self.x = change, torch.nn.Parameter(torch.ones(7))

    def forward(self, q, k, v):
        return self.change(q @ k.mT, self.x).softmax(-1) @ v


@pytest.mark.parametrize("name", CANCEL)
def test_what_cancels_has_a_gradient_of_zeros(name: str) -> None:
    assert "load" not in specs(check(Learned(CANCEL[name]), *qkv()))


@pytest.mark.parametrize("change", [lambda s, x: s + 0 * x.detach(), lambda s, x: s + 0 * (x > 0)])
def test_what_has_no_gradient_gets_none(change) -> None:
    assert check(Learned(change), *qkv()).fused


@pytest.mark.parametrize("shape", [(2, 1, 1), (7, 7), (2, 1, 7)], ids=["head", "both", "key"])
@pytest.mark.parametrize("name", BOUNDS)
def test_a_bias_that_is_zero(name: str, shape: tuple[int, ...]) -> None:
    bias = torch.zeros(shape).requires_grad_()

    def attention(q, k, v, bias):
        return ((q @ k.mT) * 0.1 + BOUNDS[name](bias) * 2).softmax(-1) @ v

    assert check(attention, *qkv(), bias).fused


@pytest.mark.parametrize("weights", [lambda s: F.silu(s).softmax(-1), lambda s: F.silu(s) / 7])
def test_slopes_of_what_is_infinite_where_a_mask_hides_it(weights) -> None:
    """0 * the slope of silu(-inf) would be NaN."""
    hidden = torch.arange(7) == 4
    bias = torch.where(hidden, -torch.inf, torch.linspace(-1, 1, 7)).requires_grad_()

    def attention(q, k, v, bias):
        return weights(torch.where(hidden, -1e9, torch.tanh(q @ k.mT) + bias)) @ v

    assert check(attention, *qkv(), bias).fused


@pytest.mark.parametrize("function", [F.elu, lambda s: F.leaky_relu(F.elu(s, 0.5))])
def test_functions_of_large_scores_beside_padding(function) -> None:
    """exp of scores that elu leaves as they are is infinite, and its gradient 0 times that."""

    def attention(q, k, v, padding):
        s = function(50 * q @ k.mT)
        return s.masked_fill(padding, -torch.inf).softmax(-1) @ v

    assert check(attention, *qkv(), torch.arange(7) > 4).fused
