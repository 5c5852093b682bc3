"""Expressions of one meaning brought to one form: sums of selects, conditions, constants."""

from __future__ import annotations

import functools
import math

import sympy
from sympy.logic.boolalg import Boolean

from fa3_compile.spec.expr import COORDINATES, LONGEST, SKV, SQ, Expr, S, load, where


class floored(sympy.Function):
    """`floored(x, c, share)`: the larger of x and a fill c, as one thing until `tidy` writes it
    out. Where both are the fill, x has this share of the gradient."""

    nargs = 3
    is_real = True
    is_commutative = True

    def below(self) -> Expr:
        """What it is where x is not above the fill."""
        x, floor, share = self.args
        return where(x < floor, floor, share * x + (1 - share) * floor)


def merge_conditions(expr: Expr) -> Expr:
    """where(c, a, b) + where(c, x, y) -> where(c, a + x, b + y); constants that a select's branch
    cancels are taken into it."""
    if not isinstance(expr, sympy.Add):
        if expr.args and not isinstance(expr, (load, Boolean)):
            args = [x if isinstance(x, Boolean) else merge_conditions(x) for x in expr.args]
            return expr.func(*args) if tuple(args) != expr.args else expr
        return expr
    if (term := cancelling_term(expr)) is not None and (inside := _of_selects(term)) is not None:
        constant = expr.as_coeff_Add()[0]
        rest = sympy.Add(*(x for x in expr.args if x is not term and x is not constant))
        return merge_conditions(rest + _into_branches(inside, term, constant))
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


# Comparisons in a mask that is looked at as a whole: the work doubles with each.
MOST_COMPARED = 6
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
    constant = expr.as_coeff_Add()[0]
    rest = sympy.Add(*(x for x in expr.args if x is not term and x is not constant))
    if (select := _of_selects(term)) is not None:
        return rest + exact_at_one(_into_branches(select, term, constant))
    x = term.as_coeff_Mul()[1]
    return rest + where(sympy.Eq(x, 1), 0, constant + term)


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


def _of_selects(term: Expr) -> where | None:
    """A select that the term is a multiple of."""
    return next((x for x in sympy.Mul.make_args(term) if isinstance(x, where)), None)


def _into_branches(select: where, term: Expr, constant: Expr) -> Expr:
    """constant + term, for a term that is a multiple of the select."""
    condition, a, b = select.args
    factor = sympy.Mul(*(x for x in sympy.Mul.make_args(term) if x is not select))
    return where(condition, constant + factor * a, constant + factor * b)


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
