"""Element rules: comparisons, logic, selection."""

from __future__ import annotations

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from fa3_compile.frontend.lift.captured import Captured
from fa3_compile.frontend.lift.elements.pointwise import is_bool
from fa3_compile.frontend.lift.elements.rounding import comparable
from fa3_compile.frontend.lift.elements.weights import is_weight, without_nan
from fa3_compile.frontend.lift.lift import (
    Cheaper,
    Element,
    Lifter,
    Opaque,
    element_of,
    number,
    truth,
)
from fa3_compile.frontend.lift.placeholders import OfTheRun, some
from fa3_compile.frontend.reasons.selected_keys import selected, selecting_call
from fa3_compile.spec import expr as E
from fa3_compile.spec.expr import KV, Expr, load, loads_in, where

aten = torch.ops.aten


COMPARISONS = {
    "eq": sympy.Eq,
    "ne": sympy.Ne,
    "lt": sympy.Lt,
    "le": sympy.Le,
    "gt": sympy.Gt,
    "ge": sympy.Ge,
}


@element_of(*(getattr(getattr(aten, n), o) for n in COMPARISONS for o in ("Tensor", "Scalar")))
def _(node, index, ctx: Lifter) -> Element:
    compare = COMPARISONS[node.target.__name__.split(".")[0]]
    operands = [ctx.operand(x, index) for x in node.args[:2]]
    a, b = map(number, operands)
    if compare in (sympy.Eq, sympy.Ne) and b in (0, 1):
        # `mask == 0` of a boolean or of where(c, 1, 0) is the mask's negation.
        for x in operands[:1]:
            if x is not a or (isinstance(a, where) and set(a.args[1:]) == {0, 1}):
                logic = truth(x)
                wants_true = (compare is sympy.Eq) == (b == 1)
                return logic if wants_true else sympy.Not(logic)
    if isinstance(a, where) and b.is_number and all(x.is_number for x in a.args[1:]):
        condition, yes, no = a.args
        return _choose(condition, compare(yes, b), compare(no, b))
    if a == b and _is_float(node.args[0]) and _reads_floats(a, ctx):
        return _no(node)  # NaN is not what it is
    if b.is_infinite:
        return _beside_infinity(node, a, lambda x: compare(x, b), ctx)
    a, b = comparable(node, a, b)
    if compare not in (sympy.Eq, sympy.Ne) and _is_as_large_as_read(node, a - b, ctx):
        raise Cheaper(node, "it is not the negation of its opposite where a number is NaN")
    if not ctx.weighs and any(E.S in x.free_symbols and _has_fill(x) for x in (a, b)):
        sources = [ctx.loads[x.tensor] for x in loads_in(a, b)]
        held = [x.source for x in sources if isinstance(x, Captured)]
        if call := selecting_call(held):
            raise selected(call, "lift")
        raise Opaque(node, "a comparison of masked scores")
    return compare(a, b)


def _is_as_large_as_read(node: fx.Node, difference: Expr, ctx: Lifter) -> bool:
    """Whether a comparison that is in memory is as large as floats that it is computed from."""
    if ctx.computes or node not in ctx.shadow.dynamo_of:
        return False
    floats = (x for x in loads_in(difference) if ctx.loads[x.tensor].dtype.is_floating_point)
    return any(difference.free_symbols <= {*x.index} for x in floats)


def _beside_infinity(node: fx.Node, x: Expr, compared, ctx: Lifter) -> Element:
    """A comparison with an infinity. Scores without a fill are finite; what is read may not be."""
    if isinstance(x, where):
        return _choose(x.args[0], *(_beside_infinity(node, y, compared, ctx) for y in x.args[1:]))
    floats = (ctx.loads[y.tensor].dtype.is_floating_point for y in loads_in(x))
    return _no(node) if x.has(OfTheRun) or any(floats) else compared(x)


def _has_fill(x: Expr) -> bool:
    return any(n.is_infinite or abs(n) > 1e3 for n in x.atoms(sympy.Number))


def _choose(condition, a, b):
    return sympy.Or(sympy.And(condition, a), sympy.And(sympy.Not(condition), b))


@element_of(aten.isnan.default)
def _(node, index, ctx: Lifter) -> Element:
    return sympy.false if not _reads_floats(ctx.broadcast(node.args[0], index), ctx) else _no(node)


@element_of(aten.isinf.default)
def _(node, index, ctx: Lifter) -> Element:
    x = ctx.broadcast(node.args[0], index)
    return compare_infinite(x) if not _reads_floats(x, ctx) else _no(node)


def compare_infinite(x: Expr) -> Element:
    if isinstance(x, where):
        return _choose(x.args[0], compare_infinite(x.args[1]), compare_infinite(x.args[2]))
    return sympy.true if x.is_infinite else sympy.false


def _reads_floats(x: Expr, ctx: Lifter) -> bool:
    return E.S in x.free_symbols or x.has(load, OfTheRun)


def _is_float(x: fx.Node) -> bool:
    return x.meta["val"].dtype.is_floating_point


def _no(node: fx.Node):
    raise Opaque(node, "whether a loaded value is finite is known only when it runs")


@element_of(aten.all.dim, aten.any.dim)
def _(node, index, ctx: Lifter) -> Element:
    """Whether a row of a mask has any key, which is asked to fill the row after the softmax."""
    mask, d, *kept = node.args
    if not ctx.weighs or mask.meta["val"].dtype != torch.bool:
        raise Opaque(node, "all or any of an axis")
    d %= mask.meta["val"].dim()
    held = truth(ctx.load(node, index))
    of = truth(ctx.element(mask, (*index[:d], KV, *index[d + any(kept) :])))
    if node.target is aten.any.dim:
        return sympy.Ne(some(where(held, 1, 0), where(of, 1, 0)), 0)
    return sympy.Eq(some(where(held, 0, 1), where(of, 0, 1)), 0)


def _logic(combine):
    def rule(node, index, ctx: Lifter) -> Element:
        return combine(*(truth(ctx.operand(x, index)) for x in node.args))

    return rule


def either_of(a: Boolean, b: Boolean) -> Boolean:
    """Whether one of them holds, and not both."""
    return sympy.Or(sympy.And(a, sympy.Not(b)), sympy.And(sympy.Not(a), b))


element_of(aten.logical_and.default)(_logic(sympy.And))
element_of(aten.logical_or.default)(_logic(sympy.Or))
element_of(aten.logical_xor.default)(_logic(either_of))
element_of(aten.logical_not.default)(_logic(sympy.Not))


@element_of(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _(node, index, ctx: Lifter) -> Element:
    condition, a, b = node.args
    if is_weight(replaced := without_nan(condition, a, b, index, ctx)):
        return replaced
    condition, a, b = (ctx.operand(x, index) for x in (condition, a, b))
    condition = truth(condition)
    if is_bool(node):
        return _choose(condition, truth(a), truth(b))
    return where(condition, number(a), number(b))


@element_of(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _(node, index, ctx: Lifter) -> Element:
    x, condition, value = node.args
    if is_weight(replaced := without_nan(condition, value, x, index, ctx)):
        return replaced
    x, condition, value = (ctx.operand(a, index) for a in (x, condition, value))
    condition = truth(condition)
    if is_bool(node):
        return _choose(condition, truth(value), truth(x))
    return where(condition, number(value), number(x))
