"""The score that an exponential of a softmax by hand is of."""

from __future__ import annotations

import sympy
from torch import fx

from fa3_compile.frontend.lift.elements.pointwise import through_where
from fa3_compile.frontend.reasons.near_softmax import not_exponential
from fa3_compile.spec.expr import Expr, S, depends_on, sigmoid, where


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
