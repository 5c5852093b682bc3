"""Expressions of one meaning brought to one form: sums of selects, conditions, constants."""

from __future__ import annotations

import sympy
from sympy.logic.boolalg import Boolean

from fa3_compile.spec.expr import Expr, load, where


def merge_conditions(expr: Expr) -> Expr:
    """where(c, a, b) + where(c, x, y) -> where(c, a + x, b + y)."""
    if not isinstance(expr, sympy.Add):
        if expr.args and not isinstance(expr, (load, Boolean)):
            args = [x if isinstance(x, Boolean) else merge_conditions(x) for x in expr.args]
            return expr.func(*args) if tuple(args) != expr.args else expr
        return expr
    selects: dict[Boolean, list[where]] = {}
    rest = []
    for term in map(merge_conditions, expr.args):
        coefficient, inner = term.as_coeff_Mul()
        if isinstance(inner, where):
            scaled = where(inner.args[0], *(coefficient * x for x in inner.args[1:]))
            selects.setdefault(inner.args[0], []).append(scaled)
        else:
            rest.append(term)
    merged = []
    for condition, group in selects.items():
        opposite = sympy.Not(condition)
        if opposite in selects and str(opposite) < str(condition):
            continue
        both = [*group]
        if opposite in selects:
            both += [where(condition, g.args[2], g.args[1]) for g in selects[opposite]]
        merged.append(
            where(condition, sum(g.args[1] for g in both), sum(g.args[2] for g in both))
            if all(isinstance(g, where) for g in both)
            else sum(both)
        )
    return sympy.Add(*rest, *merged)


def exact_at_one(expr: Expr) -> Expr:
    """c*x - c -> where(x == 1, 0, c*x - c), for large c and a loaded x: a 0/1 mask as a bias.

    As terms of a longer sum they would absorb the score before they cancel each other.
    """
    if not expr.args or isinstance(expr, (load, Boolean)):
        return expr
    args = [exact_at_one(x) for x in expr.args]
    expr = expr.func(*args) if tuple(args) != expr.args else expr
    if not isinstance(expr, sympy.Add):
        return expr
    constant, terms = expr.as_coeff_Add()
    terms = sympy.Add.make_args(terms)
    for term in terms:
        coefficient, x = term.as_coeff_Mul()
        if isinstance(x, load) and coefficient == -constant and abs(constant) >= 1000:
            rest = sympy.Add(*(t for t in terms if t is not term))
            return rest + where(sympy.Eq(x, 1), 0, constant + term)
    return expr


def assuming(expr: Expr, facts: frozenset[Boolean]) -> Expr:
    """The expression where the facts hold: selects that they decide are replaced by a branch."""
    if isinstance(expr, where):
        condition, a, b = expr.args
        opposite = tidy_mask(sympy.Not(condition))
        if set(sympy.And.make_args(condition)) <= facts:
            return assuming(a, facts)
        if set(sympy.And.make_args(opposite)) <= facts:
            return assuming(b, facts)
        a = assuming(a, facts | {*sympy.And.make_args(condition)})
        b = assuming(b, facts | {*sympy.And.make_args(opposite)})
        return where(condition, a, b)
    if not expr.args or isinstance(expr, (load, Boolean)):
        return expr
    args = [assuming(x, facts) for x in expr.args]
    return expr.func(*args) if tuple(args) != expr.args else expr


def tidy(expr: Expr) -> Expr:
    """The expression with exact rationals as floats and conditions in normal form."""
    if isinstance(expr, Boolean) and not isinstance(expr, sympy.Symbol):
        return tidy_mask(expr)
    if expr.is_Rational and not expr.is_Integer:
        return sympy.Float(float(expr))
    if not expr.args:
        return expr
    if isinstance(expr, sympy.Pow) and expr.exp == sympy.Rational(1, 2):
        return sympy.Pow(tidy(expr.base), expr.exp)
    if isinstance(expr, sympy.Pow) and expr.exp.is_Rational:
        return sympy.Pow(tidy(expr.base), expr.exp)
    args = [tidy(x) for x in expr.args]
    return expr.func(*args)


def tidy_mask(mask: Boolean) -> Boolean:
    """Negations pushed inwards, integer comparisons as kv <= ... and kv >= ..."""
    mask = sympy.to_nnf(mask, simplify=False) if mask.atoms(sympy.Not) else mask
    return _tidy_mask(mask)


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
    if apart := _without_abs(relation) or _without_product(relation):
        return _tidy_mask(apart)
    difference = left - right
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
            rest = bound - coefficient * symbol
            if symbol in rest.free_symbols:
                continue
            if coefficient == 1:
                return _decide(sympy.Le(symbol, -rest), symbol, -rest, upper=True)
            if coefficient == -1:
                return _decide(sympy.Ge(symbol, rest), symbol, rest, upper=False)
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


def _decide(relation, symbol, limit, *, upper: bool):
    """Comparisons that hold for every nonnegative coordinate."""
    if not upper and limit.is_nonpositive:
        return sympy.true
    if upper and limit.is_negative:
        return sympy.false
    return relation


def _is_index(expr: Expr) -> bool:
    """Whether an expression is exact integer arithmetic of coordinates and sizes."""
    return bool(expr.is_integer) and not expr.atoms(load, sympy.Float)
