"""Expressions of one meaning brought to one form: constants, and conditions as masks have them."""

from __future__ import annotations

import functools
import math

import sympy
from sympy.logic.boolalg import Boolean

from fa3_compile.spec.expr import COORDINATES, LONGEST, SKV, SQ, Expr, load, where
from fa3_compile.spec.fills import floored

# Comparisons in a mask that is looked at as a whole: the work doubles with each.
MOST_COMPARED = 6


def tidy(expr: Expr) -> Expr:
    """The expression with exact rationals as floats and conditions in normal form."""
    if isinstance(expr, Boolean) and not isinstance(expr, sympy.Symbol):
        return tidy_mask(expr)
    if expr.is_Rational and not expr.is_Integer:
        return sympy.Float(float(expr))
    if not expr.args:
        return expr
    if isinstance(expr, floored):
        return tidy(where(expr.args[0] > expr.args[1], expr.args[0], expr.below()))
    if isinstance(expr, sympy.Pow) and expr.exp.is_Rational:
        return sympy.Pow(tidy(expr.base), expr.exp)
    args = [tidy(x) for x in expr.args]
    return expr.func(*args)


def tidy_mask(mask: Boolean) -> Boolean:
    """Negations pushed inwards, integer comparisons as kv <= ... and kv >= ..., few of them."""
    mask = sympy.to_nnf(mask, simplify=False) if mask.atoms(sympy.Not) else mask
    return _shortest(_tidy_mask(mask))


@functools.lru_cache(maxsize=1024)
def _shortest(mask: Boolean) -> Boolean:
    """The mask as a shorter combination of its own comparisons, where there is one."""
    if not (mask.has(sympy.Or) and mask.has(sympy.And)):
        return mask
    literals: dict[Boolean, Boolean] = {}
    for x in sorted(mask.atoms(sympy.core.relational.Relational), key=str):
        if x not in literals:
            name = sympy.Symbol(f"x{len(literals)}")
            literals |= {_tidy_mask(sympy.Not(x)): sympy.Not(name), x: name}
    if len(literals) > 2 * MOST_COMPARED:
        return mask
    abstract = mask.xreplace(literals)
    short = sympy.logic.simplify_logic(abstract, deep=False)
    if _length(short) >= _length(abstract):
        return mask
    return sympy.to_nnf(short, simplify=False).xreplace({y: x for x, y in literals.items()})


def _length(logic: Boolean) -> int:
    return sum(x.is_Symbol for x in sympy.preorder_traversal(logic))


def _tidy_mask(mask):
    if isinstance(mask, sympy.And):
        return _absorbed(sympy.And(*map(_tidy_mask, mask.args)))
    if isinstance(mask, (sympy.Or, sympy.Not)):
        return mask.func(*map(_tidy_mask, mask.args))
    if not isinstance(mask, sympy.core.relational.Relational):
        return mask
    left, right = tidy(mask.lhs), tidy(mask.rhs)
    relation = mask.func(left, right)
    if relation in (sympy.true, sympy.false) or not hasattr(relation, "lhs"):
        return relation
    if (apart := _without_select(relation)) is not None:
        return _tidy_mask(tidy_mask(apart))
    for without in (_without_abs, _without_product):
        if (apart := without(relation)) is not None:
            return _tidy_mask(apart)
    difference = left - right
    if (of_load := _of_one_load(relation, difference)) is not None:
        return of_load
    if not _is_index(difference) or isinstance(relation, (sympy.Eq, sympy.Ne)):
        return relation
    if isinstance(relation, (sympy.Gt, sympy.Ge)):
        difference, strict = -difference, isinstance(relation, sympy.Gt)
    else:
        strict = isinstance(relation, sympy.Lt)
    bound = sympy.expand(difference) + (1 if strict else 0)
    # bound <= 0, solved for the innermost coordinate it has.
    for name in ("kv", "q", "h", "b"):
        for symbol in bound.free_symbols:
            if symbol.name != name:
                continue
            coefficient = bound.coeff(symbol)
            rest = bound - sympy.Mul(coefficient, symbol)
            if symbol in rest.free_symbols:
                continue
            if coefficient == 1:
                return _decide(sympy.Le(symbol, -rest), -rest, upper=True)
            if coefficient == -1:
                return _decide(sympy.Ge(symbol, rest), rest, upper=False)
    return relation


def _absorbed(mask):
    """a & (not a | b) -> a & b."""
    conjuncts = {*sympy.And.make_args(mask)}
    if not any(isinstance(x, sympy.Or) for x in conjuncts):
        return mask
    refuted = {_tidy_mask(sympy.Not(x)) for x in conjuncts if not isinstance(x, sympy.Or)}
    return sympy.And(
        *(
            sympy.Or(*(y for y in x.args if y not in refuted)) if isinstance(x, sympy.Or) else x
            for x in conjuncts
        )
    )


def _without_select(relation) -> Boolean | None:
    """where(c, a, b) != 0 -> (c and a != 0) or (not c and b != 0)."""
    for i, side in enumerate(relation.args):
        for term in sympy.Add.make_args(side):
            if isinstance(term, where):
                condition, *branches = term.args
                a, b = (
                    relation.func(
                        *(side - term + x if j == i else y for j, y in enumerate(relation.args))
                    )
                    for x in branches
                )
                return sympy.Or(sympy.And(condition, a), sympy.And(sympy.Not(condition), b))
    return None


def _without_abs(relation) -> Boolean | None:
    """abs(x) <= c -> -c <= x <= c."""
    left, right = relation.lhs, relation.rhs
    if isinstance(right, sympy.Abs) and not isinstance(left, sympy.Abs):
        left, right, relation = right, left, relation.reversed
    if not isinstance(left, sympy.Abs):
        return None
    x = left.args[0]
    if isinstance(relation, (sympy.Le, sympy.Lt)):
        return sympy.And(relation.func(x, right), relation.func(-right, x))
    if isinstance(relation, (sympy.Ge, sympy.Gt)):
        return sympy.Or(relation.func(x, right), relation.func(-right, x))
    return None


def _without_product(relation) -> Boolean | None:
    """a * b != 0 of integers and booleans -> a != 0 and b != 0."""
    left, right = relation.lhs, relation.rhs
    if not isinstance(left, sympy.Mul) or right != 0:
        return None
    if not all(isinstance(x, load) or x.is_integer for x in left.args):
        return None
    if isinstance(relation, sympy.Ne):
        return sympy.And(*(sympy.Ne(x, 0) for x in left.args))
    if isinstance(relation, sympy.Eq):
        return sympy.Or(*(sympy.Eq(x, 0) for x in left.args))
    return None


def _of_one_load(relation, difference: Expr) -> Boolean | None:
    """1 - x == 0 -> x == 1, for a loaded x: both exact whatever x is."""
    constant, rest = difference.as_coeff_Add()
    coefficient, x = rest.as_coeff_Mul()
    if not isinstance(x, load) or abs(coefficient) != 1 or not constant.is_finite:
        return None
    function = relation.func if coefficient == 1 else relation.reversed.func
    return function(x, -constant * coefficient)


def _decide(relation, limit, *, upper: bool):
    """Comparisons that hold for every coordinate, or for none: a window of 2**31 - 1 is none, and
    kernels would count beyond 32 bits in it."""
    low, high = _limits(limit)
    if (limit.is_negative or high < 0) if upper else low >= LONGEST:
        return sympy.false
    if low >= LONGEST if upper else (limit.is_nonpositive or high <= 0):
        return sympy.true
    return relation


def _limits(expr: Expr) -> tuple[float, float]:
    """Between which numbers a sum of multiples of coordinates and lengths lies."""
    low = high = 0
    for term in sympy.Add.make_args(expr):
        factor, x = term.as_coeff_Mul()
        if x == 1:
            low, high = low + factor, high + factor
        elif x in (*COORDINATES, SQ, SKV):
            low, high = low + min(factor * LONGEST, 0), high + max(factor * LONGEST, 0)
        else:
            return -math.inf, math.inf
    return low, high


def _is_index(expr: Expr) -> bool:
    """Whether an expression is exact integer arithmetic of coordinates and sizes."""
    return bool(expr.is_integer) and not expr.atoms(load, sympy.Float)
