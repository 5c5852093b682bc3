"""Sums that a score has twice, once inside a function and once beside it, as one number.

Of relu(x) - 0.5*x, where x is 20*s + bias, sympy makes relu(20*s + bias) - 10*s - 0.5*bias. The
program rounds x once, so that what is left of it cancels as it should; three products that are
rounded apart leave the error of each, as large as x is.
"""

# sympy gives the parts of an expression as Basic.
# pyright: reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import math

import sympy

from fa3_compile.spec import expr as E

# Two ratios of coefficients are one number, up to how sympy rounds their product.
SAME_RATIO = 1e-12


class whole(sympy.Function):
    """`whole(x)`: x, which is computed before anything is done with it."""

    nargs = 1
    is_real = True
    is_commutative = True


def with_whole_sums(score: E.Expr) -> E.Expr:
    """The score with each sum of s and others that a function has, and a multiple of which is
    added to that function, as one number in both places."""
    if not isinstance(score, sympy.Add):
        return score
    nested = {
        x
        for term in score.args
        for x in sympy.preorder_traversal(term)
        if isinstance(x, sympy.Add) and E.S in x.free_symbols
    }
    for x in sorted(nested, key=lambda x: (-len(x.args), str(x))):
        found = _taken_out(score, x)
        if found is not None:
            multiple, others = found
            named = whole(x)
            return sympy.Add(*(y.xreplace({x: named}) for y in others), multiple * named)
    return score


def _taken_out(total: E.Expr, x: E.Expr) -> tuple[E.Expr, list[E.Expr]] | None:
    """(c, terms) where the total is c*x and these terms, in which x occurs; else None."""
    left = list(total.args)
    ratio: E.Expr | None = None
    for part in x.args:
        for term in left:
            found = _ratio(term, part)
            if found is not None and (ratio is None or _near(found, ratio)):
                ratio = found
                left.remove(term)
                break
        else:
            return None
    return (ratio, left) if ratio is not None and any(y.has(x) for y in left) else None


def _ratio(term: E.Expr, part: E.Expr) -> E.Expr | None:
    """The number that part times it is the term, written out or not."""
    a, b = (_coefficients(y) for y in (term, part))
    if a.keys() != b.keys():
        return None
    ratios = [a[key] / b[key] for key in b]
    same = ratios[0].is_finite and all(_near(y, ratios[0]) for y in ratios)
    return ratios[0] if same else None


def _coefficients(x: E.Expr) -> dict[E.Expr, E.Expr]:
    """Each product of the sum that x is when it is written out, and its coefficient."""
    found = [y.as_coeff_Mul() for y in sympy.Add.make_args(sympy.expand_mul(x))]
    return {rest: coefficient for coefficient, rest in found}


def _near(a: E.Expr, b: E.Expr) -> bool:
    return math.isclose(float(a), float(b), rel_tol=SAME_RATIO)
