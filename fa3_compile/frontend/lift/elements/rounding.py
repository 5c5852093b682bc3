"""Element rules: floor, ceil, trunc and round; and what makes a step of positions exact.

A step (a rounding, a comparison) of arithmetic on positions is decided by its last bit: 41 times
1/41 is not 1 in float32. So a quotient of integers stays a fraction until a step is taken of it,
and a step of anything inexact is read from what the program computed.
"""

from __future__ import annotations

import math

import sympy
import torch
from torch import fx

from fa3_compile.frontend.lift.elements.pointwise import through_where
from fa3_compile.frontend.lift.lift import Element, Lifter, Opaque, element_of
from fa3_compile.frontend.lift.placeholders import prob, row_stat, total
from fa3_compile.spec import expr as E
from fa3_compile.spec.expr import Expr, where
from fa3_compile.spec.index import bounds, divide

aten = torch.ops.aten

# Floats that are multiples of this are added and multiplied without rounding.
FINEST = 2**-16


def fraction(x: Expr) -> tuple[Expr, int] | None:
    """(n, d) with x = n / d, n an integer expression and d > 0, if all of x is exact."""
    if x.has(sympy.oo, sympy.nan) or _rounds(x):
        return None
    x = sympy.expand(x.xreplace({f: sympy.Rational(float(f)) for f in x.atoms(sympy.Float)}))
    d = math.lcm(1, *(int(number.q) for number in x.atoms(sympy.Rational)))
    n = sympy.expand(x * d)
    return (n, d) if n.is_integer else None


def _rounds(x: Expr) -> bool:
    """Whether there is a number in x that its products and sums are not exact with."""
    return any(float(number) % FINEST for number in x.atoms(sympy.Float))


def _divides(x: Expr) -> bool:
    return any(power.exp.could_extract_minus_sign() for power in x.atoms(sympy.Pow))


def hides_rounding(divisor: Expr) -> bool:
    """Whether quotients by a number are rounded, and products with its reciprocal are not: 0.1."""
    if not divisor.is_number or not divisor.is_finite or divisor == 0:
        return False
    mantissa, _ = math.frexp(float(divisor))
    return abs(mantissa) != 0.5 and float(1 / divisor) % FINEST == 0


def check_exact(node: fx.Node, *values: Expr) -> None:
    """`Opaque` where one of the values is computed from positions or from what is read, and
    rounded: a quotient is not the product with a reciprocal, nor the same on every device."""
    for x in values:
        if x.free_symbols and (_rounds(x) or _divides(x)) and not x.has(E.S, prob, row_stat, total):
            raise Opaque(node, "a step of positions in arithmetic that is rounded")


def comparable(node: fx.Node, a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """Both sides of a comparison, times what makes integers of them where they are fractions."""
    check_exact(node, a, b)
    exact = [fraction(x) for x in (a, b)]
    if None not in exact:
        (n, d), (m, e) = exact
        return (n, m) if d == e else (n * e, m * d)
    if any(x is not None and x[1] & (x[1] - 1) for x in exact) and (a - b).is_real:
        raise Opaque(node, "a fraction of positions beside a number that is rounded")
    return a, b


def truncated(a: Expr, b: Expr, ctx: Lifter) -> Expr:
    """The integer quotient that is rounded towards zero; b is positive."""
    limits = bounds(a, ctx.ranges)
    if limits is not None and limits[0].is_nonnegative:
        return divide(a, b, ctx.ranges)
    return where(a >= 0, divide(a, b, ctx.ranges), -divide(-a, b, ctx.ranges))


def to_integer(node: fx.Node, x: Expr, ctx: Lifter) -> Expr:
    """A number rounded towards zero, as a cast to an integer does."""
    return _rounded(node, x, ctx, E.trunc, truncated)


def rounded_down(node: fx.Node, x: Expr, ctx: Lifter) -> Expr:
    """A number rounded down."""
    return _rounded(node, x, ctx, sympy.floor, lambda n, d, c: divide(n, d, c.ranges))


def _rounded(node: fx.Node, x: Expr, ctx: Lifter, function, of_fraction) -> Expr:
    def rounded(x: Expr) -> Expr:
        check_exact(node, x)
        exact = fraction(x) if x.free_symbols else None
        return function(x) if exact is None else of_fraction(exact[0], sympy.Integer(exact[1]), ctx)

    return through_where(rounded, x)


def _nearest(node: fx.Node):
    def nearest(n: Expr, d: Expr, ctx: Lifter) -> Expr:
        if d == 1:
            return n
        if int(d) & (int(d) - 1) == 0:
            return E.round_half_even(n * sympy.Float(1 / int(d)))
        if int(d) % 2 == 0:
            raise Opaque(node, "halves of positions, rounded")
        return divide(2 * n + d, 2 * d, ctx.ranges)

    return nearest


@element_of(aten.floor.default)
def _(node, index, ctx: Lifter) -> Element:
    return rounded_down(node, ctx.broadcast(node.args[0], index), ctx)


@element_of(aten.ceil.default)
def _(node, index, ctx: Lifter) -> Element:
    x = ctx.broadcast(node.args[0], index)
    return _rounded(node, x, ctx, sympy.ceiling, lambda n, d, c: -divide(-n, d, c.ranges))


@element_of(aten.trunc.default)
def _(node, index, ctx: Lifter) -> Element:
    return to_integer(node, ctx.broadcast(node.args[0], index), ctx)


@element_of(aten.round.default)
def _(node, index, ctx: Lifter) -> Element:
    x = ctx.broadcast(node.args[0], index)
    return _rounded(node, x, ctx, E.round_half_even, _nearest(node))
