"""Element rules: tensors made of nothing but positions and constants."""

from __future__ import annotations

import sympy
import torch
from torch import fx

from fa3_compile.frontend.lift.elements.casts import rounded
from fa3_compile.frontend.lift.elements.rounding import to_integer
from fa3_compile.frontend.lift.lift import Element, Lifter, Opaque, element_of, number, truth
from fa3_compile.spec.expr import where

aten = torch.ops.aten


def _value(x, ctx: Lifter):
    # A Python float of a program with dynamic shapes is the element of a tensor.
    return ctx.broadcast(x, ())


def _constant(node: fx.Node, value, ctx: Lifter) -> Element:
    dtype = node.meta["val"].dtype
    if dtype == torch.bool:
        return sympy.true if value else sympy.false
    value = _value(value, ctx)
    if dtype.is_floating_point:
        return rounded(value, dtype)
    return value if value.is_Integer else to_integer(node, value, ctx)


@element_of(aten.full.default, aten.full_like.default)
def _(node, index, ctx: Lifter) -> Element:
    return _constant(node, node.args[1], ctx)


@element_of(aten.scalar_tensor.default)
def _(node, index, ctx: Lifter) -> Element:
    return _constant(node, node.args[0], ctx)


@element_of(aten.zeros.default, aten.zeros_like.default)
def _(node, index, ctx: Lifter) -> Element:
    return _constant(node, 0, ctx)


@element_of(aten.ones.default, aten.ones_like.default)
def _(node, index, ctx: Lifter) -> Element:
    return _constant(node, 1, ctx)


@element_of(aten.arange.start_step, torch.ops.prims.iota.default)
def _(node, index, ctx: Lifter) -> Element:
    if node.target is torch.ops.prims.iota.default:
        start, step = _value(node.kwargs["start"], ctx), _value(node.kwargs["step"], ctx)
    else:
        start = _value(node.args[0], ctx)
        step = _value(node.args[2] if len(node.args) > 2 else 1, ctx)
    dtype = node.meta["val"].dtype
    fractional = not (start.is_integer and step.is_integer)
    if dtype in (torch.float16, torch.bfloat16) or not dtype.is_floating_point and fractional:
        raise Opaque(node, f"positions rounded to {dtype}")
    return start + step * index[0]


@element_of(aten.eye.default, aten.eye.m)
def _(node, index, ctx: Lifter) -> Element:
    return where(sympy.Eq(index[-2], index[-1]), 1, 0)


@element_of(aten.tril.default)
def _(node, index, ctx: Lifter) -> Element:
    return _triangle(node, index, ctx, lambda d, diagonal: d <= diagonal)


@element_of(aten.triu.default)
def _(node, index, ctx: Lifter) -> Element:
    return _triangle(node, index, ctx, lambda d, diagonal: d >= diagonal)


def _triangle(node, index, ctx: Lifter, keeps) -> Element:
    diagonal = _value(node.args[1] if len(node.args) > 1 else 0, ctx)
    inside = keeps(index[-1] - index[-2], diagonal)
    element = ctx.element(node.args[0], index)
    if node.meta["val"].dtype == torch.bool:
        return sympy.And(inside, truth(element))
    return where(inside, number(element), 0)
