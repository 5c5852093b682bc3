"""A weight that no softmax normalises, taken apart into what it is and where it is 0.

Eager code masks such weights before or after their function: `where(m, f(s), 0)`, `f(s) * m`, or
`f(where(m, s, -inf))` with f(-inf) = 0, as of sigmoid, relu and exp. All three are one question:
which of the conditions that the weight is made of make it 0, whatever s is?
"""

from __future__ import annotations

import itertools
import math

import sympy
from sympy.logic.boolalg import Boolean

from fa3_compile.spec.expr import KV, Expr, Q, S, erf, load, uniform, where
from fa3_compile.spec.fills import BELOW_FLOAT32, LOWEST, MODERATE, OUT_OF_REACH
from fa3_compile.spec.mask_biases import bias_of, exact_at_one
from fa3_compile.spec.normal_form import tidy, tidy_mask
from fa3_compile.spec.selects import assuming, merge_conditions, remade, replaced
from fa3_compile.spec.value_bounds import as_extreme

# Conditions that are looked at together: each doubles the cases.
MOST_CONDITIONS = 8
# Below float32's least normal number.
NOTHING = 1e-38
# The sum of a few thousand is beyond float32, and that of a few beyond float16. Which sums overflow
# is a matter of their order then, in eager too.
HUGE = 1e35
HUGE_IN_HALF = 4e3


class InfiniteWeight(ValueError):
    """A weight that is infinite or NaN where a condition holds, as silu(-inf) is, or so large that
    a sum of some is."""


def separate(expr: Expr, huge: float = HUGE) -> tuple[Expr, Boolean]:
    """(the weight where the mask holds, the mask), the weight being 0 elsewhere.

    InfiniteWeight where it is NaN or infinite for every finite s, or sums of it are: from `huge`.
    """
    expr = tidy(exact_at_one(merge_conditions(expr)))
    mask = tidy_mask(sympy.Not(_zero(_overflowing(expr), MOST_CONDITIONS, huge)))
    return tidy(_where_holds(expr, mask)), mask


def _overflowing(expr: Expr) -> Expr:
    """The expression with -inf where two fills are added whose sum float32 does not hold."""
    if not expr.args or isinstance(expr, (load, Boolean)):
        return expr
    found = remade(expr, [_overflowing(x) for x in expr.args])
    fills = [x for term in found.args for x in _fills(term)] if isinstance(found, sympy.Add) else []
    pairs = itertools.combinations(fills, 2)
    meet = sympy.Or(*(sympy.And(a, b) for (a, x), (b, y) in pairs if x + y < BELOW_FLOAT32))
    return found if meet == sympy.false else where(tidy_mask(meet), -sympy.oo, found)


def _fills(term: Expr) -> list[tuple[Boolean, Expr]]:
    """(condition, fill) of a term that is a fill out of reach where the condition holds."""
    factor, select = term.as_coeff_Mul()
    if not isinstance(select, where):
        return []
    if (bias := bias_of(term)) is not None:
        found = [(bias[1] <= 0, -bias[0])]
    else:
        condition, a, b = select.args
        found = [(condition, factor * a), (tidy_mask(sympy.Not(condition)), factor * b)]
    return [x for x in found if x[1].is_number and x[1] <= OUT_OF_REACH]


def _where_holds(expr: Expr, condition: Boolean) -> Expr:
    """The expression where the condition holds: selects and comparisons that it decides."""
    facts = frozenset(sympy.And.make_args(condition)) - {sympy.true}
    refuted = [tidy_mask(sympy.Not(x)) for x in facts]
    known = dict.fromkeys(refuted, sympy.false) | dict.fromkeys(facts, sympy.true)
    of_several = [set(x.args) for x in refuted if isinstance(x, sympy.And)]
    for both in expr.atoms(sympy.And) if of_several else ():
        if any(x <= set(both.args) for x in of_several):
            known[both] = sympy.false
    try:
        return replaced(assuming(expr, facts), known) if facts else expr
    except (TypeError, ValueError) as error:
        if not expr.has(sympy.oo, -sympy.oo):
            raise
        # sympy compares nothing with NaN.
        raise InfiniteWeight("a weight is nan") from error


def _zero(expr: Expr, left: int, huge: float) -> Boolean:
    """The condition, free of s and of random numbers, under which the expression is 0."""
    bias = _bias(expr) if left else None
    if bias is not None:
        select, fill, x = bias
        hidden = _zero(_compared(expr, x, 0).xreplace({select: fill}), left - 1, huge)
        seen = _zero(_compared(expr, x, 1).xreplace({select: sympy.S.Zero}), left - 1, huge)
        if hidden not in (sympy.true, seen):
            seen = sympy.And(seen, x > 0)
        return sympy.Or(sympy.And(hidden, x <= 0), sympy.And(seen, x <= 1))
    condition = _condition(expr) if left else None
    if condition is None:
        value = _absorbed(expr)
        if value.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo) or _overflows(value, huge):
            raise InfiniteWeight(f"a weight is {value!s}")
        return sympy.true if _vanishes(value) else sympy.false
    cases = []
    for known in (condition, tidy_mask(sympy.Not(condition))):
        case = _where_holds(expr, known)
        if case == expr:
            return sympy.false
        cases.append(sympy.And(known, _zero(case, left - 1, huge)))
    return sympy.Or(*cases)


def _bias(expr: Expr) -> tuple[Expr, Expr, Expr] | None:
    """(select, fill, x): the first mask x of 0 and 1 that is added as the fill and 0."""
    biases = [(x, bias_of(x)) for x in sorted(expr.atoms(where), key=str)]
    found = [(x, -bias[0], bias[1]) for x, bias in biases if bias and -bias[0] <= OUT_OF_REACH]
    return found[0] if found else None


def _compared(expr: Expr, mask: Expr, value: int) -> Expr:
    """The expression with the value of the mask in conditions that depend on s."""
    term = min(mask.as_coeff_Add()[1].as_ordered_terms(), key=str)
    factor, read = term.as_coeff_Mul()
    solved = sympy.expand((value - mask + term) / factor)
    conditions = {x.args[0] for x in expr.atoms(where) if S in x.args[0].free_symbols}
    return expr.xreplace({x: tidy_mask(x.subs(read, solved)) for x in conditions})


def _condition(expr: Expr) -> Boolean | None:
    """The first condition that a part of the expression is selected by."""
    found = {x.args[0] for x in expr.atoms(where)}
    plain = [x for x in found if S not in x.free_symbols and not x.has(uniform)]
    return min(plain, key=str) if plain else None


def _absorbed(expr: Expr) -> Expr:
    """The expression with fills out of reach taken for what they are in float32: s + -3e38."""
    if not expr.args or isinstance(expr, load):
        return expr
    args = [_absorbed(x) for x in expr.args]
    if isinstance(expr, sympy.Add):
        hiding = [x for x in args if x.is_number and x <= OUT_OF_REACH]
        numbers = {n for x in args if x not in hiding for n in x.atoms(sympy.Number)}
        if hiding and all(abs(n) < -OUT_OF_REACH * MODERATE for n in numbers):
            return _in_float32(sympy.Add(*hiding))
    if isinstance(expr, erf) and args[0].is_number:
        return sympy.Float(math.erf(args[0]))
    return remade(expr, args)


def _overflows(value: Expr, huge: float) -> bool:
    """Whether a sum of such weights is infinite or NaN, in an order of summation or in another."""
    size = abs(value.as_coeff_Mul()[0])
    return bool(size.is_comparable and size >= huge)


def _in_float32(fill: Expr) -> Expr:
    return fill if fill >= LOWEST else -sympy.oo


def _vanishes(value: Expr) -> bool:
    return bool(value.is_number and value.is_comparable and abs(value) < NOTHING)


def is_nonnegative_weight(weight: Expr) -> bool:
    """Whether a weight is at least 0 for every s."""
    if isinstance(weight, where):
        if (extreme := as_extreme(weight)) is not None:
            return is_nonnegative_weight(extreme)
        return all(is_nonnegative_weight(x) for x in weight.args[1:])
    if isinstance(weight, sympy.Mul):
        return all(is_nonnegative_weight(x) for x in weight.args)
    if isinstance(weight, sympy.Max):
        return any(is_nonnegative_weight(x) for x in weight.args)
    return bool(weight.is_nonnegative)


def is_linear(weight: Expr, mask: Boolean) -> bool:
    """Whether (weights V) is as well computed as Q (K^T V): nothing between the two products but
    factors of a query or of a key alone, and terms without s."""
    if mask != sympy.true:
        return False
    for term in sympy.Add.make_args(sympy.expand_mul(weight)):
        if S not in term.free_symbols:
            continue
        factors = sympy.Mul.make_args(term)
        if S not in factors:
            return False
        if any({Q, KV} <= x.free_symbols or (x != S and x.has(S)) for x in factors):
            return False
    return True
