"""Selects: those of one condition merged, those that are decided replaced by a branch."""

from __future__ import annotations

import sympy
from sympy.logic.boolalg import Boolean

from fa3_compile.spec.expr import Expr, load, where
from fa3_compile.spec.mask_biases import apart, cancelling_term
from fa3_compile.spec.normal_form import tidy_mask

NOT_FINITE = (sympy.oo, -sympy.oo, sympy.nan, sympy.zoo)


def merge_conditions(expr: Expr) -> Expr:
    """where(c, a, b) + where(c, x, y) -> where(c, a + x, b + y); constants that a select's branch
    cancels are taken into it."""
    if not isinstance(expr, sympy.Add):
        if expr.args and not isinstance(expr, (load, Boolean)):
            args = [x if isinstance(x, Boolean) else merge_conditions(x) for x in expr.args]
            return expr.func(*args) if tuple(args) != expr.args else expr
        return expr
    if (term := cancelling_term(expr)) is not None:
        rest, bias = apart(expr, term)
        if isinstance(bias, where):
            return merge_conditions(rest + bias)
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


def assuming(
    expr: Expr, facts: frozenset[Boolean], branch: frozenset[Boolean] = frozenset()
) -> Expr:
    """The expression where the facts hold: selects that they decide are replaced by a branch.

    branch  what holds in the branch of a select that this is. In the operand of a function it
            decides nothing: exp(where(s > 0, 0, s)) is finite where it is not chosen, too, and so
            is its gradient, which is multiplied by 0 there
    """
    if isinstance(expr, where):
        condition, a, b = expr.args
        yes, no = (
            frozenset(sympy.And.make_args(x)) for x in (condition, tidy_mask(sympy.Not(condition)))
        )
        if yes <= facts | branch:
            return assuming(a, facts, branch)
        if no <= facts | branch:
            return assuming(b, facts, branch)
        return where(condition, assuming(a, facts, branch | yes), assuming(b, facts, branch | no))
    if not expr.args or isinstance(expr, (load, Boolean)):
        return expr
    if not isinstance(expr, (sympy.Add, sympy.Mul, sympy.Max, sympy.Min)):
        branch = frozenset()
    return remade(expr, [assuming(x, facts, branch) for x in expr.args])


def replaced(expr: Expr | Boolean, known: dict, in_conditions: bool = True) -> Expr | Boolean:
    """As `expr.xreplace(known)`, by `remade`."""
    if expr in known:
        return known[expr]
    if not expr.args or isinstance(expr, Boolean) and not in_conditions:
        return expr
    return remade(expr, [replaced(x, known, in_conditions) for x in expr.args])


def remade(expr, args: list):
    """The expression of other arguments. A number and an infinity add up to an infinity, and a
    maximum or minimum of what may be NaN for an infinity in it is NaN.

    sympy keeps a sum whose number may be complex, as the root of a size is, and reads a maximum by
    its sign: max(0, (x - oo)*sigmoid(x - oo)) as 0, where silu(-oo) is NaN.
    """
    if tuple(args) == expr.args:
        return expr
    if isinstance(expr, sympy.Add) and any(x in NOT_FINITE for x in args):
        args = [x for x in args if x.has(*NOT_FINITE)]
    if isinstance(expr, (sympy.Max, sympy.Min)) and any(map(_undecided, args)):
        return sympy.nan
    return expr.func(*args)


def _undecided(x: Expr) -> bool:
    """Whether x is NaN, or made of an infinity that is not in a select, and is none itself."""
    if x in (sympy.oo, -sympy.oo) or isinstance(x, (where, Boolean)):
        return False
    return x is sympy.nan or any(y in NOT_FINITE or _undecided(y) for y in x.args)
