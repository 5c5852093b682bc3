"""Element rules: sums, products, quotients, rounding, extremes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import sympy
import torch
from sympy.logic.boolalg import Boolean

from fa3_compile.frontend.lift.elements.finite import (
    check_product,
    check_quotient,
    check_slope,
    kept_apart,
    may_be_infinite,
)
from fa3_compile.frontend.lift.elements.pointwise import is_bool, is_float, through_where
from fa3_compile.frontend.lift.elements.rounding import (
    hides_rounding,
    rounded_down,
    to_integer,
    truncated,
)
from fa3_compile.frontend.lift.lift import (
    Element,
    Lifter,
    Opaque,
    element_of,
    sym,
    truth,
)
from fa3_compile.frontend.lift.placeholders import prob
from fa3_compile.spec.expr import Expr, S, loads_in, where
from fa3_compile.spec.fills import OUT_OF_REACH, floored
from fa3_compile.spec.index import bounds, divide, remainder
from fa3_compile.spec.mask_biases import exact_at_one

aten = torch.ops.aten


@element_of(aten.add.Tensor, aten.add.Scalar)
def _(node, index, ctx: Lifter) -> Element:
    a, b = (ctx.broadcast(x, index) for x in node.args[:2])
    if is_bool(node):
        return sympy.Or(*(truth(ctx.operand(x, index)) for x in node.args[:2]))
    alpha = ctx.broadcast(node.kwargs.get("alpha", 1), index)
    return _added(node, ctx, a, b, alpha)


def _added(node, ctx: Lifter, a: Expr, b: Expr, alpha: Expr) -> Expr:
    """a + alpha * b"""
    b = kept_apart(a, b, alpha, ctx)
    return through_where(lambda x, y: _sum(x, alpha * y), a, b)


def _sum(a: Expr, b: Expr) -> Expr:
    # s + (1e9*mask - 1e9): one term would absorb the other before the mask cancels it.
    return exact_at_one(a) + exact_at_one(b)


@element_of(aten.sub.Tensor, aten.sub.Scalar)
def _(node, index, ctx: Lifter) -> Element:
    a, b = (ctx.broadcast(x, index) for x in node.args[:2])
    alpha = ctx.broadcast(node.kwargs.get("alpha", 1), index)
    return _added(node, ctx, a, b, -alpha)


@element_of(aten.rsub.Tensor, aten.rsub.Scalar)
def _(node, index, ctx: Lifter) -> Element:
    a, b = (ctx.broadcast(x, index) for x in node.args[:2])
    return _added(node, ctx, b, a, sympy.Integer(-1))


@element_of(aten.mul.Tensor, aten.mul.Scalar)
def _(node, index, ctx: Lifter) -> Element:
    if is_bool(node):
        return sympy.And(*(truth(ctx.operand(x, index)) for x in node.args[:2]))
    a, b = (ctx.broadcast(x, index) for x in node.args[:2])
    if any(_may_be_zero(x) and may_be_infinite(y) for x, y in ((a, b), (b, a))):
        raise Opaque(node, "an infinite score times zero is NaN")
    found = through_where(_times, a, b)
    check_product(node, found, a, b, ctx)
    if (
        isinstance(found, where)
        and 0 in found.args
        and (S in found.free_symbols or loads_in(found))
    ):
        ctx.multiplied.add(found)
    return found


def _may_be_zero(x: Expr) -> bool:
    return x == 0 or isinstance(x, where) and any(map(_may_be_zero, x.args[1:]))


def _times(a: Expr, b: Expr) -> Expr:
    # s * where(c, 1, 0) -> where(c, s, 0): the mask that multiplies, as GPT-1 has it.
    for x, y in ((a, b), (b, a)):
        chooses = isinstance(x, where) and set(x.args[1:]) <= {0, 1}
        # NaN of a softmax times 0 is NaN.
        if chooses and not y.is_number and not y.has(prob):
            return where(x.args[0], *(y if branch == 1 else branch for branch in x.args[1:]))
    return a * b


@element_of(aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor)
def _(node, index, ctx: Lifter) -> Element:
    a, b = (ctx.broadcast(x, index) for x in node.args[:2])
    _check_divisor(node, a, b, ctx)
    check_slope(node, b, ctx)
    found = _divided(node, a, b)
    check_quotient(node, found, a, b)
    return found


def _check_divisor(node, a: Expr, b: Expr, ctx: Lifter) -> None:
    if hides_rounding(b) and a.free_symbols and S not in a.free_symbols and node not in ctx.inside:
        raise Opaque(node, "a quotient that is rounded, and no product with the reciprocal")


def _divided(node, a: Expr, b: Expr) -> Expr:
    try:
        return through_where(_quotient, a, b)
    except ZeroDivisionError as zero:
        raise Opaque(node, "a division by the constant 0") from zero


def _quotient(a: Expr, b: Expr) -> Expr:
    if b == 0:
        raise ZeroDivisionError
    if b.is_number and a.is_integer and float(b).is_integer():
        return a / sympy.Integer(int(b))
    return a * sym(1 / float(b)) if b.is_number else a / b


@element_of(aten.div.Tensor_mode, aten.div.Scalar_mode, aten.floor_divide.default)
def _(node, index, ctx: Lifter) -> Element:
    a, b = (ctx.broadcast(x, index) for x in node.args[:2])
    mode = node.kwargs.get("rounding_mode", "floor" if node.target is not None else None)
    if mode is None:
        return _divided(node, a, b)
    if is_float(node):
        _check_divisor(node, a, b, ctx)
        x = _divided(node, a, b)
        return rounded_down(node, x, ctx) if mode == "floor" else to_integer(node, x, ctx)
    if b.is_positive:
        return divide(a, b, ctx.ranges) if mode == "floor" else truncated(a, b, ctx)
    raise Opaque(node, "an integer division by what may be negative")


@element_of(aten.remainder.Scalar, aten.remainder.Tensor, aten.fmod.Scalar, aten.fmod.Tensor)
def _(node, index, ctx: Lifter) -> Element:
    a, b = (ctx.broadcast(x, index) for x in node.args[:2])
    if is_float(node) or not b.is_positive:
        raise Opaque(node, "a remainder whose rounding is not known")
    limits = bounds(a, ctx.ranges)
    positive = limits is not None and limits[0].is_nonnegative
    if positive or node.target in (aten.remainder.Scalar, aten.remainder.Tensor):
        return remainder(a, b, ctx.ranges)
    return a - b * truncated(a, b, ctx)


@element_of(aten.neg.default)
def _(node, index, ctx: Lifter) -> Element:
    return through_where(lambda x: -x, ctx.broadcast(node.args[0], index))


@element_of(aten.reciprocal.default)
def _(node, index, ctx: Lifter) -> Element:
    x = ctx.broadcast(node.args[0], index)
    check_slope(node, x, ctx)
    return 1 / x


@element_of(aten.abs.default)
def _(node, index, ctx: Lifter) -> Element:
    return through_where(_size, ctx.broadcast(node.args[0], index))


def _size(x: Expr) -> Expr:
    return x if _weighs(x) else sympy.Abs(x)


def _weighs(x: Expr) -> bool:
    """Whether it is an element of a softmax, perhaps filled with 0 or times what is not negative:
    where that is 0, it has no gradient, so that the slope of its size at 0 is never met."""
    if isinstance(x, where):
        return all(y == 0 or _weighs(y) for y in x.args[1:])
    factors = sympy.Mul.make_args(x)
    others = [f for f in factors if not isinstance(f, prob)]
    return len(others) < len(factors) and all(map(_is_not_negative, others))


def _is_not_negative(x: Expr) -> bool:
    if isinstance(x, where):
        return all(map(_is_not_negative, x.args[1:]))
    return bool(x.is_nonnegative)


@element_of(aten.sign.default, aten.sgn.default)
def _(node, index, ctx: Lifter) -> Element:
    return through_where(sympy.sign, ctx.broadcast(node.args[0], index))


@element_of(aten.minimum.default)
def _(node, index, ctx: Lifter) -> Element:
    smaller = functools.partial(_minimum, ctx)
    return through_where(smaller, *(ctx.broadcast(x, index) for x in node.args))


def _minimum(ctx: Lifter, a: Expr, b: Expr) -> Expr:
    for x, bound in ((a, b), (b, a)):
        if bound.is_number and _has_gradient(x, ctx):
            return _shared(x, bound, x > bound, x < bound)
    return sympy.Min(a, b)


def _shared(x: Expr, bound: Expr, beyond: Boolean, within: Boolean) -> Expr:
    """The extreme of x and a number, which at a tie has half of x's gradient."""
    return where(beyond, bound, where(within, x, (x + bound) / 2))


@element_of(aten.maximum.default)
def _(node, index, ctx: Lifter) -> Element:
    larger = functools.partial(_maximum, ctx)
    return through_where(larger, *(ctx.broadcast(x, index) for x in node.args))


def _maximum(ctx: Lifter, a: Expr, b: Expr) -> Expr:
    for x, floor in ((a, b), (b, a)):
        if _is_floor(x, floor):
            return floored(x, floor, sympy.Rational(1, 2))
        if floor.is_number and _has_gradient(x, ctx):
            return _shared(x, floor, x < floor, x > floor)
    return sympy.Max(a, b)


def _is_floor(x: Expr, floor: Expr) -> bool:
    """Whether many scores may be at the floor, because it is a fill."""
    return bool(floor.is_number and not x.is_number and floor <= OUT_OF_REACH)


def _clamped_below(ctx: Lifter, x: Expr, floor: Expr) -> Expr:
    if _is_floor(x, floor):
        return floored(x, floor, _clamp_slope())
    return _sloped(x, floor, sympy.Lt) if _keeps_slope(x, ctx) else sympy.Max(x, floor)


def _clamped_above(ctx: Lifter, x: Expr, ceiling: Expr) -> Expr:
    return _sloped(x, ceiling, sympy.Gt) if _keeps_slope(x, ctx) else sympy.Min(x, ceiling)


def _keeps_slope(x: Expr, ctx: Lifter) -> bool:
    """Whether what is clamped has its gradient at the very bound: a bias that learns may start
    there."""
    return _clamp_slope() == 1 and _has_gradient(x, ctx)


def _has_gradient(x: Expr, ctx: Lifter) -> bool:
    return S in x.free_symbols or any(ctx.loads[y.tensor].needs_grad for y in loads_in(x))


def _sloped(x: Expr, bound: Expr, beyond: Callable) -> Expr:
    """The bound where x is beyond it, else x; into the branches of selects, that they stay masks
    and x stays in sight."""
    if isinstance(x, where):
        return where(x.args[0], *(_sloped(y, bound, beyond) for y in x.args[1:]))
    return where(beyond(x, bound), bound, x)


@functools.cache
def _clamp_slope() -> Expr:
    """The gradient of torch.clamp at its bound: 1, or 0 in later versions."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros((), device="cpu", requires_grad=True)
        (slope,) = torch.autograd.grad(x.clamp(min=0.0), x)
    return sympy.Integer(int(slope))


@element_of(aten.clamp.default, aten.clamp.Tensor)
def _(node, index, ctx: Lifter) -> Element:
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
    high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
    x = ctx.broadcast(node.args[0], index)
    if low is not None:
        x = through_where(functools.partial(_clamped_below, ctx), x, ctx.broadcast(low, index))
    if high is not None:
        x = through_where(functools.partial(_clamped_above, ctx), x, ctx.broadcast(high, index))
    return x


@element_of(aten.clamp_min.default, aten.clamp_min.Tensor)
def _(node, index, ctx: Lifter) -> Element:
    clamped = functools.partial(_clamped_below, ctx)
    return through_where(clamped, *(ctx.broadcast(x, index) for x in node.args[:2]))


@element_of(aten.clamp_max.default, aten.clamp_max.Tensor)
def _(node, index, ctx: Lifter) -> Element:
    clamped = functools.partial(_clamped_above, ctx)
    return through_where(clamped, *(ctx.broadcast(x, index) for x in node.args[:2]))
