"""Masks of 0 and 1 as biases: c*x - c, which is 0 where x is 1 and a fill where x is 0.

As terms of a longer sum the two would absorb the score before they cancel, so that they are one
thing here.
"""

from __future__ import annotations

import sympy
from sympy.logic.boolalg import Boolean

from fa3_compile.spec.expr import Expr, S, load, where

# Constants from here on absorb digits of a score.
LARGE = 1000


def cancelling_term(total: sympy.Add) -> Expr | None:
    """The term c*x of a sum with a constant -c, for large c and an x without the score: a mask
    of 0 and 1 as a bias. It may stand in a branch of the term."""
    constant, rest = total.as_coeff_Add()
    if not (constant.is_finite and abs(constant) >= LARGE):
        return None
    for term in sympy.Add.make_args(rest):
        coefficient, x = term.as_coeff_Mul()
        if S in x.free_symbols:
            continue
        branches = x.args[1:] if isinstance(x, where) else ()
        sums = [constant + coefficient * branch for branch in branches]
        if coefficient == -constant or any(y.is_Add and cancelling_term(y) for y in sums):
            return term
    return None


def exact_at_one(expr: Expr) -> Expr:
    """c*x - c -> where(x == 1, 0, c*x - c), for large c: a 0/1 mask as a bias; so are several of
    them, c*x + c*y - 2*c -> where(x + y - 2 == 0, 0, c*x + c*y - 2*c).

    As terms of a longer sum they would absorb the score before they cancel each other.
    """
    if not expr.args or isinstance(expr, (load, Boolean)) or bias_of(expr):
        return expr
    args = [exact_at_one(x) for x in expr.args]
    expr = expr.func(*args) if tuple(args) != expr.args else expr
    if not isinstance(expr, sympy.Add):
        return expr
    term = cancelling_term(expr)
    if term is None or _several_masks(expr) is not None:
        return _cancelling_together(expr)
    rest, bias = apart(expr, term)
    if isinstance(bias, where):
        return rest + exact_at_one(bias)
    return rest + where(sympy.Eq(term.as_coeff_Mul()[1], 1), 0, bias)


def apart(total: sympy.Add, term: Expr) -> tuple[Expr, Expr]:
    """(the other terms of a sum, its constant plus the term): a select, where the term is a
    multiple of one."""
    constant = total.as_coeff_Add()[0]
    rest = sympy.Add(*(x for x in total.args if x is not term and x is not constant))
    select = next((x for x in sympy.Mul.make_args(term) if isinstance(x, where)), None)
    if select is None:
        return rest, constant + term
    condition, a, b = select.args
    factor = sympy.Mul(*(x for x in sympy.Mul.make_args(term) if x is not select))
    return rest, where(condition, constant + factor * a, constant + factor * b)


def _cancelling_together(total: sympy.Add) -> Expr:
    """The sum with its large terms as one, where they are several masks and a constant."""
    found = _several_masks(total)
    if found is None:
        return total
    (_, masked), masks = found
    rest = sympy.Add(*(x for x in total.args if x not in masks.args))
    return rest + where(sympy.Eq(masked - 1, 0), 0, masks)


def _several_masks(total: Expr) -> tuple[tuple[Expr, Expr], Expr] | None:
    """((c, x), the large terms of the sum), for those terms c*x - c: (c, x + y - 1) of
    c*x + c*y - 2*c."""
    constant = total.as_coeff_Add()[0]
    large = [x for x in total.args if S not in x.free_symbols and x.has(load) and _is_large(x)]
    if not _is_large(constant) or len(large) < 2:
        return None
    masks = sympy.Add(constant, *large)
    unit = min(abs(x.as_coeff_Mul()[0]) for x in large)
    seen = sympy.expand(masks / unit) + 1
    whole = {x: sympy.Integer(int(x)) for x in seen.atoms(sympy.Float) if float(x).is_integer()}
    return (unit, seen.xreplace(whole)), masks


def _is_large(x: Expr) -> bool:
    coefficient = abs(x.as_coeff_Mul()[0])
    return bool(coefficient.is_finite and coefficient >= LARGE)


def bias_of(expr: Expr) -> tuple[Expr, Expr] | None:
    """(c, x) of where(x == 1, 0, c*x - c), which `exact_at_one` makes."""
    if not isinstance(expr, where) or expr.args[1] != 0 or not isinstance(expr.args[2], sympy.Add):
        return None
    condition, _, masks = expr.args
    term = cancelling_term(masks)
    if (found := _several_masks(masks)) is not None:
        bias, every = found
        return bias if every == masks and condition == sympy.Eq(bias[1] - 1, 0) else None
    if term is None or len(masks.args) > 2:
        return None
    coefficient, x = term.as_coeff_Mul()
    return (coefficient, x) if condition == sympy.Eq(x, 1) else None
