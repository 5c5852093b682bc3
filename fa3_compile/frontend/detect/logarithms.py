"""The score that an exponential of a softmax by hand is of, and the gate beside it."""

from __future__ import annotations

import sympy
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.lift.elements.pointwise import through_where
from fa3_compile.frontend.lift.placeholders import row_stat
from fa3_compile.frontend.reasons.near_softmax import not_exponential
from fa3_compile.spec.expr import KV, Expr, S, depends_on, load, sigmoid, where


def logarithm(element: Expr, at: fx.Node) -> Expr:
    """The logarithm of something that is provably not negative; `Decline` of anything else."""
    if isinstance(element, sympy.exp):
        return element.args[0]
    base, exponent = element.as_base_exp()
    # Of a base below 1, a fill is infinite.
    if element.is_Pow and base.is_number and (base > 1 or base > 0 and not exponent.has(where)):
        times = sympy.log(sympy.Float(base))
        return through_where(lambda x: times * x, exponent)
    if element == 0:
        return -sympy.oo
    if element == 1:
        return sympy.S.Zero
    if element.is_number and element.is_positive:
        return sympy.log(sympy.Float(element))
    if isinstance(element, where):
        condition, a, b = element.args
        return where(condition, logarithm(a, at), logarithm(b, at))
    if isinstance(element, sympy.Mul):
        return sympy.Add(*(logarithm(x, at) for x in element.args))
    # sympy takes these out of an exponential of their logarithm.
    if (element.is_positive or isinstance(element, sigmoid)) and not depends_on(element, [S]):
        return sympy.log(element)
    raise not_exponential(element, at)


def without_gates(element: Expr, of_scores: list[sympy.Symbol], at: fx.Node) -> tuple[Expr, Expr]:
    """(exponentials, what else they are multiplied by, key by key): numbers that are read, of any
    sign. A softmax of the first is multiplied by those, and divided by its row's sum once more."""
    factors = sympy.Mul.make_args(element)
    gates = [x for x in factors if _is_gate(x, of_scores) and not _has_logarithm(x, at)]
    return sympy.Mul(*(x for x in factors if x not in gates)), sympy.Mul(*gates)


def _is_gate(factor: Expr, of_scores: list[sympy.Symbol]) -> bool:
    free = not depends_on(factor, of_scores) and not factor.has(row_stat)
    return free and factor.has(load) and depends_on(factor, [KV])


def _has_logarithm(element: Expr, at: fx.Node) -> bool:
    try:
        logarithm(element, at)
    except Decline:
        return False
    return True
