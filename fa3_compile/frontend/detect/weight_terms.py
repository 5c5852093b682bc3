"""A weight of V as a sum: softmaxes times factors, and what has no softmax in it."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
from sympy.logic.boolalg import Boolean

from fa3_compile.frontend.lift.placeholders import prob
from fa3_compile.spec.expr import KV, Expr, depends_on, uniform, where

Factored = tuple[Expr, Boolean, prob | None]


def weight_terms(element: Expr) -> list[Factored] | None:
    """(factor, where it is kept, prob) of each term of a weight, a term without a softmax having
    None; None if it is no such sum."""
    return _terms(element, sympy.S.One, sympy.true)


def beside_softmaxes(terms: Sequence[Factored]) -> Expr:
    """The sum of the terms that have no softmax."""
    return sympy.Add(*(where(kept, x, 0) for x, kept, which in terms if which is None))


def apart(factor: Expr) -> tuple[Expr, Expr]:
    """(the factors free of the key, the others)."""
    factors = sympy.Mul.make_args(factor)
    outside = [x for x in factors if not depends_on(x, [KV]) and not x.has(uniform)]
    return sympy.Mul(*outside), sympy.Mul(*(x for x in factors if x not in outside))


def _terms(element: Expr, factor: Expr, kept: Boolean) -> list[Factored] | None:
    if element == 0:
        return []
    if isinstance(element, prob):
        return [(factor, kept, element)]
    if not element.has(prob):
        return [(factor * element, kept, None)]
    if isinstance(element, where) and not element.args[0].has(prob):
        condition, a, b = element.args
        parts = [
            _terms(a, factor, sympy.And(kept, condition)),
            _terms(b, factor, sympy.And(kept, sympy.Not(condition))),
        ]
    elif isinstance(element, sympy.Add):
        parts = [_terms(x, factor, kept) for x in element.args]
    elif isinstance(element, sympy.Mul):
        inside = [x for x in element.args if x.has(prob)]
        rest = sympy.Mul(*(x for x in element.args if not x.has(prob)))
        parts = [_terms(inside[0], factor * rest, kept)] if len(inside) == 1 else [None]
    else:
        parts = [None]
    known = [part for part in parts if part is not None]
    return [term for part in known for term in part] if len(known) == len(parts) else None
