"""Element rules: elementary functions and activations."""

from __future__ import annotations

import math

import sympy
import torch
from torch import fx

from fa3_compile.frontend.lift.elements.finite import check_slope
from fa3_compile.frontend.lift.elements.pointwise import by_cases, through_where
from fa3_compile.frontend.lift.lift import (
    Cheaper,
    Element,
    Lifter,
    Opaque,
    element_of,
    shape_of,
    sym,
)
from fa3_compile.frontend.lift.placeholders import row_stat
from fa3_compile.spec import expr as E
from fa3_compile.spec.expr import Expr, loads_in, where

aten = torch.ops.aten


@element_of(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar)
def _(node, index, ctx: Lifter) -> Element:
    base, exponent = (ctx.broadcast(x, index) for x in node.args[:2])
    if not (exponent.is_number and (exponent.is_Integer or float(exponent) in (0.5, -0.5, 2.0))):
        _transcendental(node, ctx, base, exponent)
    if exponent.is_Float and float(exponent).is_integer():
        exponent = sympy.Integer(int(exponent))
    return _power(node, base, exponent, ctx)


def _power(node: fx.Node, base: Expr, exponent: Expr, ctx: Lifter) -> Expr:
    """base ** exponent; not where sympy takes a root and a power together: sqrt(s**2) and
    sqrt(s)**4 have the slope NaN at 0, infinity times 0, and abs(s) and s**2 have none such. The
    root of something positive has no such slope."""
    if not (exponent.is_number and exponent >= 1):
        check_slope(node, base, ctx)
    found = _not_undone(node, base, base**exponent, sympy.Pow)
    kept = {x.base for x in found.atoms(sympy.Pow)}
    for x in sympy.Mul.make_args(base):
        if not x.is_Pow or x in kept or not (E.S in x.free_symbols or x.has(E.load)):
            continue
        exponents = (x.exp, exponent)
        if not all(y.is_number and y.is_positive for y in exponents):
            continue
        of_what_is_positive = x.exp < 1 and x.base.is_positive
        if min(exponents) < 1 < max(exponents) and not of_what_is_positive:
            raise Opaque(node, "a root of a power, or a power of a root")
    return found


def _not_undone(node: fx.Node, x: Expr, found: Expr, *functions: type) -> Expr:
    """What a function makes of x, unless sympy has cancelled it with its inverse: log(exp(s)) is
    infinite where exp overflows, exp(log(s)) and sqrt(s)**2 are NaN below 0."""
    if (E.S in x.free_symbols or x.has(E.load)) and x.has(sympy.exp, sympy.log, sympy.Pow):
        if not found.has(*functions):
            raise Opaque(node, "a function and its inverse")
    return found


def _transcendental(node: fx.Node, ctx: Lifter, *args: Expr) -> None:
    """Functions of coordinates alone are cheaper read than computed, and then exactly eager's.

    Those of a score_mod are in memory nowhere.
    """
    if node in ctx.inside:
        return  # a sink beside the scores: exp(cat(sink, s)) is in memory nowhere
    if ctx.weighs and _by_query_and_key(node) and _computable(*args):
        return  # a decay by distance: of all queries and keys it is as large as the scores
    computed = any(E.S in x.free_symbols or x.has(row_stat) for x in args)
    held = not ctx.computes or node in ctx.shadow.dynamo_of
    if not computed and held and any(x.free_symbols for x in args):
        raise Cheaper(node, "a function of the position alone")


def _by_query_and_key(node: fx.Node) -> bool:
    return all(size != 1 for size in shape_of(node)[-2:]) and len(shape_of(node)) > 1


def _computable(*args: Expr) -> bool:
    """Whether exp(x), or base ** x, is what eager has for every element: no infinity but -inf."""
    *base, x = args
    if isinstance(x, where):
        return all(_computable(*base, y) for y in x.args[1:])
    finite = not x.has(sympy.oo, -sympy.oo, sympy.nan, sympy.zoo)
    return (finite or x == -sympy.oo) and all(y.is_positive for y in base)


def _log1p(x: Expr) -> Expr:
    if isinstance(x, sympy.exp):
        return _softplus(x.args[0])
    return sympy.log(1 + x)


# Selects, where abs(x) and max(x, 0) would have the slope 0 in the middle of a smooth function.


def _softplus(x: Expr) -> Expr:
    return _log_of_exponentials(x, sympy.S.Zero)


def _log_of_exponentials(a: Expr, b: Expr) -> Expr:
    """log(exp(a) + exp(b))"""
    return where(a > b, a, b) + sympy.log(1 + sympy.exp(where(a > b, b - a, a - b)))


def _asinh(x: Expr) -> Expr:
    size = where(x < 0, -x, x)
    more = size**2 / (1 + sympy.sqrt(size**2 + 1))
    return where(x < 0, -1, 1) * sympy.log(1 + size + more)  # printed as log1p of a small size


def _sinc(x: Expr) -> Expr:
    at_zero = sympy.Eq(x, 0)
    angle = math.pi * where(at_zero, 1, x)
    return where(at_zero, 1, sympy.sin(angle) / angle)


def _asin(x: Expr) -> Expr:
    return sympy.atan(x / sympy.sqrt((1 - x) * (1 + x)))


# As functions that overflow neither themselves nor in their derivative.
UNARY = {
    aten.exp.default: sympy.exp,
    aten.log.default: sympy.log,
    aten.tanh.default: sympy.tanh,
    aten.sin.default: sympy.sin,
    aten.cos.default: sympy.cos,
    aten.tan.default: sympy.tan,
    aten.sinh.default: sympy.sinh,
    aten.cosh.default: sympy.cosh,
    aten.atan.default: sympy.atan,
    aten.erf.default: E.erf,
    aten.sigmoid.default: E.sigmoid,
    aten.silu.default: lambda x: x * E.sigmoid(x),
    aten.mish.default: lambda x: x * sympy.tanh(_softplus(x)),
    aten.erfc.default: lambda x: 1 - E.erf(x),
    aten.sinc.default: _sinc,
    aten.asinh.default: _asinh,
    aten.acosh.default: lambda x: sympy.log(x + sympy.sqrt(x - 1) * sympy.sqrt(x + 1)),
    aten.atanh.default: lambda x: sympy.log(1 + 2 * x / (1 - x)) / 2,
    aten.asin.default: _asin,
    aten.acos.default: lambda x: math.pi / 2 - _asin(x),
    aten.exp2.default: lambda x: sympy.exp(x * math.log(2)),
    aten.expm1.default: lambda x: sympy.exp(x) - 1,
    aten.log2.default: lambda x: sympy.log(x) / math.log(2),
    aten.log1p.default: lambda x: _log1p(x),
}


LOGARITHMS = (aten.log.default, aten.log2.default)
INVERSES = {aten.exp.default: sympy.exp, aten.log.default: sympy.log}


@element_of(*UNARY)
def _(node, index, ctx: Lifter) -> Element:
    def function(x: Expr) -> Expr:
        if x.is_number:
            return _of_number(node, x)
        _transcendental(node, ctx, x)
        if node.target in LOGARITHMS:
            check_slope(node, x, ctx)
        found = UNARY[node.target](x)
        inverse = INVERSES.get(node.target)
        return found if inverse is None else _not_undone(node, x, found, inverse)

    x = ctx.broadcast(node.args[0], index)
    known = by_cases(lambda y: _of_number(node, y), x)
    if known is not None:
        return known
    try:
        return through_where(function, x)
    except Cheaper as cheaper:
        if node.target not in LOGARITHMS or not _is_masked(x):
            raise
        try:
            return _below_a_mask(x, ctx.load(node, index))
        except Opaque:
            raise cheaper from None


def _is_masked(x: Expr) -> bool:
    """Whether it is 0 where a condition of positions holds."""
    if not isinstance(x, where) or loads_in(x.args[0]):
        return False
    return 0 in x.args[1:] or any(map(_is_masked, x.args[1:]))


def _below_a_mask(x: Expr, read: Element) -> Expr:
    """The logarithm of x, which is `read`, but -inf where a mask of positions makes x 0: so it is
    known which keys are hidden."""
    if _is_masked(x):
        condition, *branches = x.args
        return where(condition, *(_below_a_mask(y, read) for y in branches))
    return -sympy.oo if x == 0 else read


def _of_number(node, x: Expr) -> Expr:
    """Torch's own answer: log(0) is -inf."""
    return sym(node.target(torch.tensor(float(x), dtype=torch.float64)).item())


@element_of(aten.sqrt.default, aten.rsqrt.default)
def _(node, index, ctx: Lifter) -> Element:
    exponent = sympy.S.Half if node.target == aten.sqrt.default else -sympy.S.Half

    def root(x: Expr) -> Expr:
        if x.is_number:
            return _of_number(node, x)
        _transcendental(node, ctx, x)
        return _power(node, x, exponent, ctx)

    return through_where(root, ctx.broadcast(node.args[0], index))


@element_of(aten.gelu.default)
def _(node, index, ctx: Lifter) -> Element:
    def gelu(x: Expr) -> Expr:
        _transcendental(node, ctx, x)
        if node.kwargs.get("approximate", "none") == "none":
            return x * (1 + E.erf(x * math.sqrt(0.5))) / 2
        return x * (1 + sympy.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    return through_where(gelu, ctx.broadcast(node.args[0], index))


@element_of(aten.elu.default)
def _(node, index, ctx: Lifter) -> Element:
    alpha, scale, inner = (sym(x) for x in (*node.args[1:], 1, 1, 1)[:3])

    def elu(x: Expr) -> Expr:
        _transcendental(node, ctx, x)
        return scale * where(x > 0, x, alpha * (sympy.exp(inner * where(x > 0, 0, x)) - 1))

    return through_where(elu, ctx.broadcast(node.args[0], index))


@element_of(aten.hardsigmoid.default)
def _(node, index, ctx: Lifter) -> Element:
    return through_where(_hard_sigmoid, ctx.broadcast(node.args[0], index))


@element_of(aten.hardswish.default)
def _(node, index, ctx: Lifter) -> Element:
    return through_where(lambda x: x * _hard_sigmoid(x), ctx.broadcast(node.args[0], index))


def _hard_sigmoid(x: Expr) -> Expr:
    # Not of clamps, which torch decomposes it into: it has the slope 0 at both corners.
    return sympy.Min(sympy.Max(x + 3, 0), 6) / 6


@element_of(aten.logaddexp.default)
def _(node, index, ctx: Lifter) -> Element:
    a, b = (ctx.broadcast(x, index) for x in node.args)
    if not any(E.S in x.free_symbols and not loads_in(x) and not _is_filled(x) for x in (a, b)):
        raise Opaque(node, "what may be -inf on both sides")
    _transcendental(node, ctx, a, b)
    return _log_of_exponentials(a, b)


def _is_filled(x: Expr) -> bool:
    return x.has(sympy.oo, -sympy.oo, where)


@element_of(aten.hypot.default)
def _(node, index, ctx: Lifter) -> Element:
    a, b = (ctx.broadcast(x, index) for x in node.args)
    return _power(node, a**2 + b**2, sympy.S.Half, ctx)


@element_of(aten.relu.default)
def _(node, index, ctx: Lifter) -> Element:
    return sympy.Max(ctx.broadcast(node.args[0], index), 0)


@element_of(aten.leaky_relu.default)
def _(node, index, ctx: Lifter) -> Element:
    slope = sym(node.args[1] if len(node.args) > 1 else 0.01)
    x = ctx.broadcast(node.args[0], index)
    return where(x > 0, x, slope * x)


@element_of(aten.hardtanh.default)
def _(node, index, ctx: Lifter) -> Element:
    low, high = map(sym, (*node.args[1:], *(-1.0, 1.0)[len(node.args) - 1 :]))
    return sympy.Min(sympy.Max(ctx.broadcast(node.args[0], index), low), high)
