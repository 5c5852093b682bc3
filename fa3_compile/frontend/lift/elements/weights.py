"""Element rules: what is done to the result of a softmax alone."""

from __future__ import annotations

import sympy
import torch
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.detect.weight_terms import apart, beside_softmaxes, weight_terms
from fa3_compile.frontend.lift.elements.finite import made_finite
from fa3_compile.frontend.lift.elements.rows_without_keys import holds_without_keys
from fa3_compile.frontend.lift.lift import (
    Element,
    Lifter,
    Opaque,
    element_of,
    number,
    shape_of,
    sym,
)
from fa3_compile.frontend.lift.placeholders import (
    ANY_KEY,
    over_keys,
    prob,
    weighed_total,
    without_some,
    zeroed_prob,
)
from fa3_compile.frontend.shadow.operators import DROPOUT, STOP
from fa3_compile.spec.expr import KV, Expr, depends_on, load, uniform, where
from fa3_compile.spec.forms import dropout_weight
from fa3_compile.spec.index import same

aten = torch.ops.aten


def without_nan(condition, a, b, index, ctx: Lifter) -> Element | None:
    """where(isnan(p), 0, p) of the weights p: rows of -inf alone give zeros. So does p != p, and
    a condition that says of the scores that the row has none but -inf."""
    if not isinstance(condition, fx.Node):
        return None
    for weights, zeros, dead in ((b, a, True), (a, b, False)):
        if isinstance(weights, fx.Node) and _says_dead(condition, weights) is dead:
            if ctx.operand(zeros, index) != 0:
                return None
            element = ctx.operand(weights, index)
            if is_weight(element):
                return _zeroed(element)
            if element.has(prob):
                raise Opaque(condition, "NaN of changed weights replaced")
            return element
    return None


def _says_dead(condition: fx.Node, weights: fx.Node) -> bool | None:
    """Whether a condition holds where the rows of weights are NaN, or (False) where they are not;
    None: it says something else."""
    if _asks_nan(condition):
        return True if condition.args[0] is weights else None
    return holds_without_keys(condition, weights)


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


def _zeroed(element: Element) -> Element:
    """The element of weights whose NaN is replaced by 0."""
    return element.xreplace({p: zeroed_prob(*p.args) for p in element.atoms(prob)})


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


@element_of(aten.sum.dim_IntList)
def _(node, index, ctx: Lifter) -> Element:
    """The sum of a row of weights: the output for V of ones."""
    weights, dims, *kept = node.args
    if not ctx.adding_up or node not in ctx.inside or len(dims) != 1:
        raise Opaque(node, "it is computed from the attention's own products")
    d = dims[0] % weights.meta["val"].dim()
    row, behind = index[:d], index[d + any(kept) :]
    if any(depends_on(x, [KV]) for x in (*row, *behind)):
        raise Opaque(node, "it adds up what several keys weigh")
    terms = weight_terms(number(ctx.element(weights, (*row, KV, *behind))))
    if terms is None or not same(shape_of(weights)[d], ctx.ranges[KV]):
        raise Opaque(node, "it adds up what is no sum of softmaxes")
    found = _over_keys(beside_softmaxes(terms), ctx)
    for factor, seen, which in terms:
        if which is None:
            continue
        at = which.args[1:]
        along = ctx.adding_up.get(int(which.args[0]))
        others = (x for i, x in enumerate(at) if i != along)
        whole = along is not None and at[along] == KV
        if factor.has(uniform) or not whole or any(depends_on(x, [KV]) for x in others):
            raise Opaque(node, "it adds up changed weights")
        outside, inside = apart(without_some(factor))
        found += outside * weighed_total.of(inside, seen, which)
    return found


def _over_keys(x: Expr, ctx: Lifter) -> Expr:
    return over_keys(x.subs(KV, ANY_KEY)) if depends_on(x, [KV]) else ctx.ranges[KV] * x


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


@element_of(aten._log_softmax.default)
def _(node, index, ctx: Lifter) -> Element:
    if node in ctx.inside and ctx.weighs:
        raise Decline(
            "softmax-result-changed",
            None,
            "Multiply instead: softmax(s) * g.exp() is exp(log_softmax(s) + g).",
            message="V is weighed by the logarithm of a softmax, or by what is made of that by "
            "more than its exponential",
        )
    raise Opaque(node, "it is computed of a whole row")


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
    return _zeroed(x)
