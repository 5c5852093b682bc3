"""Between which numbers the value of a score lies, whatever Q, K and the captured tensors hold."""

from __future__ import annotations

import math

import sympy

from fa3_compile.spec.expr import Expr, erf, sigmoid, uniform, where


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
        if (extreme := as_extreme(expr)) is not None:
            return _clamp_bounds(extreme)
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


def as_extreme(expr: where) -> Expr | None:
    """where(x < c, c, x) as max(x, c), and where(x < c, c, where(x > d, d, x)) and the like; at a
    tie x may be written in another way."""
    condition, bound, rest = expr.args
    if not isinstance(condition, (sympy.Lt, sympy.Gt)) or condition.rhs != bound:
        return None
    whole = condition.lhs
    if isinstance(rest, where):
        inner = whole if rest.args[1] == whole else as_extreme(rest)
        if inner is None or not inner.has(whole):
            return None
    elif rest != whole:
        return None
    else:
        inner = whole
    extreme = sympy.Max if isinstance(condition, sympy.Lt) else sympy.Min
    return extreme(inner, bound, evaluate=False)


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
