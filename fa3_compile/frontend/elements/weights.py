"""Element rules: what is done to the result of a softmax alone."""

from __future__ import annotations

import sympy
import torch
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.elements.finite import made_finite
from fa3_compile.frontend.lift import (
    Element,
    Lifter,
    Opaque,
    element_of,
    number,
    sym,
)
from fa3_compile.frontend.placeholders import prob
from fa3_compile.frontend.shadow_operators import DROPOUT, STOP
from fa3_compile.spec.expr import load, where
from fa3_compile.spec.forms import dropout_weight

aten = torch.ops.aten


def without_nan(condition, a, b, index, ctx: Lifter) -> Element | None:
    """where(isnan(p), 0, p) of the weights p: rows of -inf alone give zeros. So does p != p."""
    if not isinstance(condition, fx.Node) or not _asks_nan(condition):
        return None
    if condition.args[0] is not b or ctx.operand(a, index) != 0:
        return None
    element = ctx.operand(b, index)
    if is_weight(element):
        ctx.zeroed |= element.atoms(prob)
    return element


def _asks_nan(condition: fx.Node) -> bool:
    if condition.target is aten.ne.Tensor:
        return condition.args[0] is condition.args[1]
    return condition.target is aten.isnan.default


def is_weight(element: Element | None) -> bool:
    """Whether it is an element of one softmax, perhaps times finite factors or filled with 0."""
    if isinstance(element, sympy.Mul):
        others = [x for x in element.args if not x.has(prob)]
        inside = [x for x in element.args if x.has(prob)]
        return len(inside) == 1 and is_weight(inside[0]) and not any(x.has(load) for x in others)
    if isinstance(element, where):
        branches = [x for x in element.args[1:] if x != 0]
        return len(branches) == 1 and is_weight(branches[0]) and not element.args[0].has(prob)
    return isinstance(element, prob)


@element_of(STOP)
def _(node, index, ctx: Lifter) -> Element:
    if node not in ctx.inside:
        raise Opaque(node, "a value that the program holds constant")
    raise Decline(
        "gradient-stopped",
        None,
        "Leave detach() and no_grad() out of the attention, or take its whole under no_grad().",
        message="the scores or weights are detached between the two products",
    )


@element_of(DROPOUT)
def _(node, index, ctx: Lifter) -> Element:
    if node not in ctx.inside:
        raise Opaque(node, "dropout")
    if not ctx.weighs:
        raise Decline(
            "dropout-of-scores",
            None,
            "Drop the weights after the softmax.",
            message="the scores are dropped before the softmax",
        )
    element = ctx.broadcast(node.args[0], index)
    return element * dropout_weight(ctx.seed(node), float(node.args[1]))


@element_of(aten.nan_to_num.default)
def _(node, index, ctx: Lifter) -> Element:
    x = ctx.operand(node.args[0], index)
    nan, high, low = (*node.args[1:], *[None] * (4 - len(node.args)))
    if not is_weight(x):
        if x.has(prob):
            raise Opaque(node, "NaN and infinities of changed weights replaced")
        limits = torch.finfo(node.meta["val"].dtype)
        nan, high, low = (
            sym(given if given is not None else default)
            for given, default in ((nan, 0.0), (high, limits.max), (low, limits.min))
        )
        return made_finite(number(x), {sympy.nan: nan, sympy.oo: high, -sympy.oo: low}, node, ctx)
    if nan not in (None, 0, 0.0):
        raise Opaque(node, "NaN rows of the softmax replaced by something else than zeros")
    # A softmax is NaN in rows of -inf alone, and nowhere infinite.
    ctx.zeroed |= x.atoms(prob)
    return x
