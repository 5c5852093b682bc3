"""Element rules: the bits of integers, and of booleans."""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch
from sympy.logic.boolalg import Boolean

from fa3_compile.frontend.lift.elements.logic import either_of
from fa3_compile.frontend.lift.elements.pointwise import is_bool, is_float
from fa3_compile.frontend.lift.lift import Element, Lifter, Opaque, element_of, number, truth
from fa3_compile.spec import expr as E
from fa3_compile.spec.expr import Expr, loads_in
from fa3_compile.spec.index import Ranges, bounds, divide, remainder

aten = torch.ops.aten


def _overloads(name: str) -> list:
    return [getattr(getattr(aten, name), x) for x in ("Tensor", "Scalar", "Scalar_Tensor")]


def _bitwise(
    logic: Callable[[Boolean, Boolean], Boolean], bits: Callable[[Expr, Expr, Ranges], Expr]
):
    def rule(node, index, ctx: Lifter) -> Element:
        a, b = (ctx.operand(x, index) for x in node.args[:2])
        if is_bool(node):
            return logic(truth(a), truth(b))
        return bits(number(a), number(b), ctx.ranges)

    return rule


def _and(a: Expr, b: Expr, ranges: Ranges) -> Expr:
    x, asked = (b, a) if a.is_Integer else (a, b)
    if not asked.is_Integer or asked < 0:
        return E.bitwise_and(a, b)
    limits = bounds(x, ranges)
    if limits is not None and all(n.is_Integer and n >= 0 for n in limits):
        all_bits = (1 << int(limits[1]).bit_length()) - 1
        asked = sympy.Integer(int(asked) & all_bits)
        if asked == all_bits:
            return x
    if int(asked) & (int(asked) + 1) == 0:
        return remainder(x, asked + 1, ranges)
    return E.bitwise_and(x, asked)


element_of(*_overloads("bitwise_and"))(_bitwise(sympy.And, _and))
element_of(*_overloads("bitwise_or"))(_bitwise(sympy.Or, lambda a, b, _: E.bitwise_or(a, b)))
element_of(*_overloads("bitwise_xor"))(_bitwise(either_of, lambda a, b, _: E.bitwise_xor(a, b)))


@element_of(aten.bitwise_not.default)
def _(node, index, ctx: Lifter) -> Element:
    x = ctx.operand(node.args[0], index)
    if is_bool(node):
        return sympy.Not(truth(x))
    integers = torch.iinfo(node.meta["val"].dtype)
    return (integers.max if integers.min == 0 else -1) - number(x)


def _shifted(node, index, ctx: Lifter) -> tuple[Expr, Expr]:
    """An integer, and by how many bits it is shifted."""
    a, n = (ctx.broadcast(x, index) for x in node.args[:2])
    # Kernels have 64 bits where an integer is read.
    most = 62 if n.is_Integer or loads_in(a) else 31
    limits = None if is_float(node) else bounds(n, ctx.ranges)
    if limits is None or not all(x.is_Integer and 0 <= x <= most for x in limits):
        raise Opaque(node, "a shift by a number that is not known")
    return a, n


@element_of(
    aten.__rshift__.Scalar,
    aten.__rshift__.Tensor,
    aten.bitwise_right_shift.Tensor,
    aten.bitwise_right_shift.Tensor_Scalar,
    aten.bitwise_right_shift.Scalar_Tensor,
)
def _(node, index, ctx: Lifter) -> Element:
    a, n = _shifted(node, index, ctx)
    return divide(a, 2**n, ctx.ranges) if n.is_Integer else E.right_shift(a, n)


@element_of(
    aten.__lshift__.Scalar,
    aten.__lshift__.Tensor,
    aten.bitwise_left_shift.Tensor,
    aten.bitwise_left_shift.Tensor_Scalar,
    aten.bitwise_left_shift.Scalar_Tensor,
)
def _(node, index, ctx: Lifter) -> Element:
    return E.left_shift(*_shifted(node, index, ctx))
