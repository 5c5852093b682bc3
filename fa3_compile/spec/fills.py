"""Fills: the numbers that eager code gives to masked elements, and where an expression has one.

A fill is a mask where it is out of reach: so far below every score that can occur that its weight
is exactly zero next to any element within reach. `reach` is the number from which downwards that
is so.
"""

from __future__ import annotations

import math

import sympy
from sympy.logic.boolalg import Boolean

from fa3_compile.spec.expr import Expr, S, load, where
from fa3_compile.spec.mask_biases import bias_of, cancelling_term
from fa3_compile.spec.value_bounds import value_bounds

# No product of finite inputs that a softmax could use comes near it, and exp of the distance
# to anything above it is zero in float32.
OUT_OF_REACH = -1e30
# The share of a fill that a factor of another term may have without undoing it.
MODERATE = 1e-4
# exp(-150) is zero in float32, subnormals included.
NEGLIGIBLE = 150.0
LOWEST = sympy.Float(-3.4028234663852886e38)
# What is no lower is rounded to it.
BELOW_FLOAT32 = -3.4028235677973362e38


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


def bounded_reach(expr: Expr, largest_s: float | None) -> float | None:
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


def killed(expr: Expr, reach: float) -> Boolean:
    """A condition, free of s, under which the expression is surely out of reach."""
    if _is_fill(expr, reach):
        return sympy.true
    if (bias := bias_of(expr)) is not None:
        return bias[1] <= 0 if _is_fill(-bias[0], reach) else sympy.false
    if isinstance(expr, floored):
        x, floor, _ = expr.args
        return killed(x, reach) if _is_fill(floor, reach) else sympy.false
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
    if isinstance(expr, sympy.Min):
        return sympy.Or(*(killed(x, reach) for x in expr.args))
    if isinstance(expr, sympy.Max):
        return sympy.And(*(killed(x, reach) for x in expr.args))
    return sympy.false


def live(expr: Expr, reach: float) -> Expr:
    """The expression where it is not killed: the branches that are out of reach dropped."""
    if isinstance(expr, floored):
        x, floor, _ = expr.args
        return live(x, reach) if _is_fill(floor, reach) else expr
    if isinstance(expr, where):
        condition, a, b = expr.args
        if S in condition.free_symbols or bias_of(expr):
            return expr  # which branch is in reach is known only with the score, or the bias
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
    if isinstance(expr, sympy.Min):
        return sympy.Min(*(live(x, reach) for x in expr.args))
    if isinstance(expr, sympy.Max):
        # max(finfo.min, x): what is in reach is above it.
        others = [x for x in expr.args if not _is_fill(x, reach)]
        return live(others[0], reach) if len(others) == 1 else expr
    return expr


def masked(expr: Expr, reach: float) -> Expr:
    """The expression where it is killed. A score that a fill absorbs stays in it: the value is
    the fill, the derivative is the score's, as in eager code."""
    if isinstance(expr, floored):
        return expr.below()
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
    if isinstance(expr, (sympy.Min, sympy.Max)):
        fills = [killed_values(x, reach) for x in expr.args if killed(x, reach) != sympy.false]
        return {-sympy.oo} if all(x == {-sympy.oo} for x in fills) else None
    return None


def filled_by_score(expr: Expr, reach: float) -> bool:
    """Whether a score may be filled because of what it is itself: where(s > 0, s, -inf)."""
    return any(
        S in select.args[0].free_symbols
        and any(killed(branch, reach) != sympy.false for branch in select.args[1:])
        and killed(select, reach) != sympy.true
        for select in expr.atoms(where)
    )


def undone_perhaps(expr: Expr, reach: float) -> bool:
    """Whether a term of unknown size is added to a fill: an element that is not killed for it may
    be as low as those that are."""
    if isinstance(expr, where):
        return any(undone_perhaps(x, reach) for x in expr.args[1:])
    if isinstance(expr, sympy.Mul):
        return any(undone_perhaps(x, reach) for x in expr.args)
    if not isinstance(expr, sympy.Add):
        return False
    units = _units(expr)
    filled = [x for x in units if _killed_unit(x, reach) != sympy.false]
    others = (x for x in units if filled and filled != [x])
    return any(_is_of_unknown_size(x, reach) for x in others)


def _is_of_unknown_size(expr: Expr, reach: float) -> bool:
    if isinstance(expr, where) and bias_of(expr) is None:
        return any(_is_of_unknown_size(x, reach) for x in expr.args[1:])
    return _harmless(expr, reach) == sympy.false


def may_be_minus_inf(fill: Expr) -> bool:
    """Whether a fill may be -inf in float32, beside a score and biases of moderate size: the sum of
    two of its lowest numbers is."""
    return not _bounds(fill)[0] > BELOW_FLOAT32


def _bounds(expr: Expr) -> tuple[float, float]:
    """Of a fill, scores taken as 0, and what is read as a mask of 0 and 1."""
    if expr.is_number:
        return float(expr), float(expr)
    if isinstance(expr, load):
        return 0.0, 1.0
    if isinstance(expr, floored):
        return float(expr.args[1]), math.inf
    if isinstance(expr, where):
        a, b = map(_bounds, expr.args[1:])
        return min(a[0], b[0]), max(a[1], b[1])
    if isinstance(expr, (sympy.Min, sympy.Max)):
        pick = min if isinstance(expr, sympy.Min) else max
        parts = [_bounds(x) for x in expr.args]
        return pick(x[0] for x in parts), pick(x[1] for x in parts)
    if isinstance(expr, sympy.Add):
        parts = [_bounds(x) for x in expr.args]
        return sum(x[0] for x in parts), sum(x[1] for x in parts)
    if isinstance(expr, sympy.Mul):
        low = high = 1.0
        for x in map(_bounds, expr.args):
            corners = [a * b for a in (low, high) for b in x]
            if any(map(math.isnan, corners)):
                return -math.inf, math.inf
            low, high = min(corners), max(corners)
        return low, high
    return (-math.inf, math.inf) if expr.has(sympy.oo, -sympy.oo) else (0.0, 0.0)


def widest(fill: Expr) -> Expr:
    """float16's lowest number absorbs a float16 score, in float32 arithmetic only float32's."""
    return fill.replace(lambda x: x.is_number and x.is_finite and x <= -65000, lambda x: LOWEST)


def _is_fill(expr: Expr, reach: float) -> bool:
    return expr.is_number and (expr == -sympy.oo or float(expr) <= reach)


def _units(total: sympy.Add) -> list[Expr]:
    """The terms of a sum, with `c*x - c` of a mask x of 0 and 1 taken as one."""
    term = cancelling_term(total)
    if term is None or not term.as_coeff_Mul()[0].is_positive:
        return [*total.args]
    constant = total.as_coeff_Add()[0]
    others = [x for x in total.args if x is not term and x is not constant]
    return [constant + term, *others]


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
    if (bias := bias_of(expr)) is not None:
        return bias[1] <= 1 if bias[0] > limit else sympy.true
    if isinstance(expr, where):
        condition, a, b = expr.args
        a, b = _harmless(a, reach), _harmless(b, reach)
        if a == b:
            return a
        if S in condition.free_symbols:
            return sympy.And(a, b)
        return sympy.Or(sympy.And(condition, a), sympy.And(sympy.Not(condition), b))
    if isinstance(expr, sympy.Add):
        term = cancelling_term(expr)
        if term is not None and len(expr.args) == 2:
            coefficient, x = term.as_coeff_Mul()
            if coefficient > limit:
                return x <= 1
        return sympy.And(*(_harmless(x, reach) for x in expr.args))
    if isinstance(expr, sympy.Mul):
        coefficient, x = expr.as_coeff_Mul()
        if isinstance(x, load) and abs(coefficient) >= limit:
            return x <= 0 if coefficient.is_positive else x >= 0
    large = any(abs(x) >= limit for x in expr.atoms(sympy.Number))
    return sympy.false if large else sympy.true
