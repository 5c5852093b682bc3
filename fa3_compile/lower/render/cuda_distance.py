"""What a score adds to a multiple of s by the distance kv - q alone: scores of the Hopper kernel
begin with it, from a table that a small kernel makes before."""

# sympy gives the parts of an expression as Basic.
# pyright: reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import functools
import math

import sympy

from fa3_compile.lower.render.cuda_terms import factor_beside
from fa3_compile.spec import expr as E

DISTANCE = sympy.Symbol("distance", integer=True)
# Cheaper to read than to compute for each element.
FUNCTIONS = (sympy.Pow, sympy.exp, sympy.log, sympy.sin, sympy.cos, sympy.tanh, E.sigmoid, E.erf)


@functools.lru_cache(maxsize=1024)
def distance_term(score: E.Expr) -> E.Expr | None:
    """f(b, h, distance) where the score is c*s + f, and f reads or computes so much of each
    distance that a table of it is faster."""
    coefficient = sympy.sympify(score.coeff(E.S))
    term = (score - coefficient * E.S).subs(E.KV, E.Q + DISTANCE)
    if not coefficient.is_number or term.free_symbols & {E.S, E.Q, E.KV}:
        return None
    found = [*E.loads_in(term), *term.atoms(*FUNCTIONS)]
    return term if any(x.has(DISTANCE) for x in found) else None


def scaling(score: E.Expr, dtype: str) -> tuple[float, float]:
    """(a, b) where a * (b*s + f/a) is the score c*s + f: Q of that type times b is exact, and f/a
    no larger than f. (0, 0) where Q times c might lose its digits."""
    term = score - score.coeff(E.S) * E.S
    mantissa, exponent = math.frexp(factor_beside(score, term, dtype))
    return 2 * mantissa, math.ldexp(1.0, exponent - 1) if mantissa else 0.0
