"""One element's expression, taken apart into score, mask and what masked elements are.

Eager code masks by arithmetic: `where(m, s, -inf)`, `s + where(m, 0, finfo.min)`,
`s * m + (1 - m) * -1e9`. Here a mask is whatever puts an element out of reach: so far below every
score that can occur that its weight is exactly zero next to any element within reach. A fill
that a large score could meet (-10000, -1e9) stays a bias, unless the score is bounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy
from sympy.logic.boolalg import Boolean

from fa3_compile.spec.expr import KV, Expr, S, erf, load, sigmoid, uniform, where

# No product of finite inputs that a softmax could use comes near it, and exp of the distance
# to anything above it is zero in float32.
OUT_OF_REACH = -1e30
# The share of a fill that a factor of another term may have without undoing it.
MODERATE = 1e-4
# exp(-150) is zero in float32, subnormals included.
NEGLIGIBLE = 150.0


@dataclass(frozen=True)
class Separated:
    """A score expression in the fields of `AttentionSpec`."""

    score: Expr
    mask: Boolean
    dead: str
    fill: Expr | None
    # Whether every row is known to have a key.
    certain: bool = False

    @property
    def may_lose_rows(self) -> bool:
        """Whether all scores of a row that has a key may be -inf: by a bias that is read, or by a
        fill that depends on the score."""
        return self.score.has(load, sympy.oo, -sympy.oo)


def separate(
    expr: Expr,
    *,
    half_fill: bool = False,
    dead_rows_zero: bool = False,
    finite_fills: bool = True,
    largest_s: float | None = None,
) -> Separated:
    """Score, mask and fill of an element's expression.

    half_fill       the scores are float16, so that its lowest number -65504 is out of reach
    dead_rows_zero  rows with no key are replaced by zeros afterwards (nan_to_num, SDPA)
    finite_fills    whether another fill than -inf may be a mask
    largest_s       what the size of the product s cannot exceed, where that is known
    """
    expr = merge_conditions(expr)
    reach = -float("inf")
    if finite_fills:
        reach = -65000.0 if half_fill else OUT_OF_REACH
        bounded = _bounded_reach(expr, largest_s)
        reach = max(reach, bounded) if bounded is not None else reach
    dead = killed(expr, reach)
    if dead == sympy.false:
        return unmasked(expr, dead_rows_zero=dead_rows_zero)
    if reach > -float("inf") and _fills_by_score(expr, reach):
        # A row whose visible keys are all filled weighs the others like them, unless those are
        # at -inf.
        return separate(
            expr, half_fill=half_fill, dead_rows_zero=dead_rows_zero, finite_fills=False
        )
    mask = tidy_mask(sympy.Not(dead))
    conjuncts = sympy.And.make_args(mask)
    score = tidy(exact_at_one(assuming(tidy(live(expr, reach)), frozenset(conjuncts))))
    values = killed_values(expr, reach)
    if values is not None and all(v == -sympy.oo for v in values):
        return Separated(score, mask, "zero" if dead_rows_zero else "nan", None)
    fill = tidy(exact_at_one(masked(expr, reach)))
    return Separated(score, mask, "score", _widest(fill) if half_fill else fill)


def unmasked(expr: Expr, *, dead_rows_zero: bool = False) -> Separated:
    """The element's expression as a score alone, fills included."""
    score = tidy(exact_at_one(merge_conditions(expr)))
    return Separated(score, sympy.true, "zero" if dead_rows_zero else "nan", None)


def without_dead_rows(separated: Separated, witnesses: list[Expr]) -> Separated:
    """The same, its fill dropped if a key is in reach of every query.

    witnesses  keys as expressions of q, such as 0 and q, that exist for every query
    """
    if separated.dead == "zero" and separated.may_lose_rows:
        return separated
    for key in witnesses:
        if tidy_mask(separated.mask.subs(KV, key)) == sympy.true:
            certain = not separated.may_lose_rows
            return Separated(separated.score, separated.mask, "nan", None, certain)
    return separated


def _bounded_reach(expr: Expr, largest_s: float | None) -> float | None:
    """Below which a fill is out of reach of a bounded score (softcap, clamp); None if unbounded."""
    within = live(expr, -1e3)
    if largest_s is not None:
        # An s between the bounds, whatever S is.
        within = within.subs(S, largest_s * sympy.tanh(S))
    limits = value_bounds(within)
    if limits is None:
        return None
    low, high = limits
    return min(low, low - high) - NEGLIGIBLE


def value_bounds(expr: Expr) -> tuple[float, float] | None:
    """Bounds of a float expression for every s and every load; None where there are none."""
    if expr.is_number:
        value = float(expr)
        return (value, value)
    if isinstance(expr, (sympy.tanh, erf, sympy.sin, sympy.cos)):
        return (-1.0, 1.0)
    if isinstance(expr, (uniform, sigmoid)):
        return (0.0, 1.0)
    if isinstance(expr, where):
        a, b = value_bounds(expr.args[1]), value_bounds(expr.args[2])
        return (min(a[0], b[0]), max(a[1], b[1])) if a and b else None
    if isinstance(expr, sympy.Add):
        parts = [value_bounds(x) for x in expr.args]
        known = [p for p in parts if p is not None]
        if len(known) < len(parts):
            return None
        return sum(p[0] for p in known), sum(p[1] for p in known)
    if isinstance(expr, sympy.Mul):
        low = high = 1.0
        for inner in map(value_bounds, expr.args):
            if inner is None:
                return None
            corners = [x * y for x in (low, high) for y in inner]
            low, high = min(corners), max(corners)
        return low, high
    if isinstance(expr, sympy.exp):
        inner = value_bounds(expr.args[0]) or _half_bounds(expr.args[0])
        return (0.0, math.exp(inner[1])) if inner and inner[1] < 700 else None
    if isinstance(expr, (sympy.Max, sympy.Min)):
        return _clamp_bounds(expr)
    return None


def _clamp_bounds(expr) -> tuple[float, float] | None:
    # max(low, min(high, x)) is bounded although x is not.
    inf = float("inf")
    parts = [value_bounds(x) or _half_bounds(x) or (-inf, inf) for x in expr.args]
    pick = max if isinstance(expr, sympy.Max) else min
    low, high = pick(p[0] for p in parts), pick(p[1] for p in parts)
    return (low, high) if abs(low) < inf and abs(high) < inf else None


def _half_bounds(expr) -> tuple[float, float] | None:
    numbers = [float(x) for x in expr.args if x.is_number]
    if isinstance(expr, sympy.Min) and numbers:
        return (-float("inf"), min(numbers))
    if isinstance(expr, sympy.Max) and numbers:
        return (max(numbers), float("inf"))
    return None


def _is_fill(expr: Expr, reach: float) -> bool:
    return expr.is_number and (expr == -sympy.oo or float(expr) <= reach)


def killed(expr: Expr, reach: float) -> Boolean:
    """A condition, free of s, under which the expression is surely out of reach."""
    if _is_fill(expr, reach):
        return sympy.true
    if isinstance(expr, where):
        condition, a, b = expr.args
        if_true, if_false = killed(a, reach), killed(b, reach)
        if S in condition.free_symbols:
            return sympy.And(if_true, if_false)
        return sympy.Or(sympy.And(condition, if_true), sympy.And(sympy.Not(condition), if_false))
    if isinstance(expr, sympy.Add):
        units = _units(expr)
        return sympy.Or(
            *(
                sympy.And(killed_unit, *(_harmless(x, reach) for x in units if x is not unit))
                for unit in units
                if (killed_unit := _killed_unit(unit, reach)) != sympy.false
            )
        )
    if isinstance(expr, sympy.Mul):
        coefficient, rest = expr.as_coeff_Mul()
        if coefficient.is_positive and coefficient != 1:
            return killed(rest, reach / float(coefficient))
        if isinstance(rest, load) and coefficient.is_finite and coefficient <= reach:
            return rest >= 1
    return sympy.false


def _units(total: sympy.Add) -> list[Expr]:
    """The terms of a sum, with `c*x - c` of a loaded 0/1 mask x taken as one."""
    constant, rest = total.as_coeff_Add()
    terms = sympy.Add.make_args(rest)
    for term in terms:
        coefficient, x = term.as_coeff_Mul()
        if isinstance(x, load) and coefficient == -constant and coefficient.is_positive:
            return [constant + term, *(t for t in terms if t is not term)]
    return [*total.args]


def _killed_unit(unit: Expr, reach: float) -> Boolean:
    if not isinstance(unit, sympy.Add):
        return killed(unit, reach)
    constant, term = unit.as_coeff_Add()
    return term.as_coeff_Mul()[1] <= 0 if _is_fill(constant, reach) else sympy.false


def _harmless(expr: Expr, reach: float) -> Boolean:
    """When a term of a sum is too small to undo a fill at `reach` that is added to it."""
    limit = -reach * MODERATE
    if expr.is_number:
        return sympy.true if float(expr) < limit else sympy.false
    if isinstance(expr, where):
        condition, a, b = expr.args
        a, b = _harmless(a, reach), _harmless(b, reach)
        if a == b:
            return a
        if S in condition.free_symbols:
            return sympy.And(a, b)
        return sympy.Or(sympy.And(condition, a), sympy.And(sympy.Not(condition), b))
    if isinstance(expr, sympy.Add):
        constant, rest = expr.as_coeff_Add()
        coefficient, x = rest.as_coeff_Mul()
        if isinstance(x, load) and coefficient == -constant > limit:
            return x <= 1
        return sympy.And(*(_harmless(x, reach) for x in expr.args))
    if isinstance(expr, sympy.Mul):
        coefficient, x = expr.as_coeff_Mul()
        if isinstance(x, load) and abs(coefficient) >= limit:
            return x <= 0 if coefficient.is_positive else x >= 0
    large = any(abs(x) >= limit for x in expr.atoms(sympy.Number))
    return sympy.false if large else sympy.true


def _fills_by_score(expr: Expr, reach: float) -> bool:
    """Whether a score may be filled because of what it is itself: where(s > 0, s, -inf)."""
    return any(
        S in select.args[0].free_symbols
        and any(killed(branch, reach) != sympy.false for branch in select.args[1:])
        and killed(select, reach) != sympy.true
        for select in expr.atoms(where)
    )


def live(expr: Expr, reach: float) -> Expr:
    """The expression where it is not killed: the branches that are out of reach dropped."""
    if isinstance(expr, where):
        condition, a, b = expr.args
        if S in condition.free_symbols:
            return expr  # which branch is in reach is known only with the score
        if killed(a, reach) == sympy.true:
            return live(b, reach)
        if killed(b, reach) == sympy.true:
            return live(a, reach)
        return where(condition, live(a, reach), live(b, reach))
    if isinstance(expr, sympy.Add):
        units = _units(expr)
        if len(units) == 1:
            return expr
        doubtful = [x for x in units if _harmless(x, reach) != sympy.true]
        # A branch that another term may undo is not dropped.
        return sympy.Add(*(live(x, reach) if {*doubtful} <= {x} else x for x in units))
    if isinstance(expr, sympy.Mul):
        coefficient, rest = expr.as_coeff_Mul()
        if coefficient.is_positive and coefficient != 1:
            return coefficient * live(rest, reach / float(coefficient))
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


LOWEST = sympy.Float(-3.4028234663852886e38)


def _widest(fill: Expr) -> Expr:
    """float16's lowest number absorbs a float16 score, in float32 arithmetic only float32's."""
    return fill.replace(lambda x: x.is_number and x <= -65000, lambda x: LOWEST)


def masked(expr: Expr, reach: float) -> Expr:
    """The expression where it is killed. A score that a fill absorbs stays in it: the value is
    the fill, the derivative is the score's, as in eager code."""
    if isinstance(expr, where):
        condition, a, b = expr.args
        if killed(a, reach) == sympy.false:
            return masked(b, reach)
        if killed(b, reach) == sympy.false:
            return masked(a, reach)
        a, b = masked(a, reach), masked(b, reach)
        return where(condition, a, b)
    if isinstance(expr, sympy.Add):
        killable = [x for x in expr.args if killed(x, reach) != sympy.false]
        if len(killable) == 1:
            return sympy.Add(*(masked(x, reach) if x is killable[0] else x for x in expr.args))
        return expr
    if isinstance(expr, sympy.Mul):
        coefficient, rest = expr.as_coeff_Mul()
        if coefficient.is_positive and coefficient != 1:
            return coefficient * masked(rest, reach / float(coefficient))
    return expr


def killed_values(expr: Expr, reach: float) -> set[Expr] | None:
    """What the expression can be where it is killed, in float32; None if that is not constant."""
    if _is_fill(expr, reach):
        return {expr}
    if isinstance(expr, where):
        _, a, b = expr.args
        found: set[Expr] = set()
        for branch in (a, b):
            if killed(branch, reach) != sympy.false:
                values = killed_values(branch, reach)
                if values is None:
                    return None
                found |= values
        return found
    if isinstance(expr, sympy.Add):
        killable = [x for x in expr.args if killed(x, reach) != sympy.false]
        values = [killed_values(x, reach) for x in killable]
        if len(values) == 1 and values[0] is not None:
            # A fill of that size absorbs every score in float32; a smaller one does not.
            absorbs = all(v == -sympy.oo or float(v) <= OUT_OF_REACH for v in values[0])
            return values[0] if absorbs else None
        if values and all(v == {-sympy.oo} for v in values):
            return {-sympy.oo}
        return None
    if isinstance(expr, sympy.Mul):
        coefficient, rest = expr.as_coeff_Mul()
        inner = killed_values(rest, reach / float(coefficient))
        return None if inner is None else {coefficient * v for v in inner}
    return None


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
