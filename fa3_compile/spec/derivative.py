"""Derivatives of scores, with the conventions that torch has where a function has a corner.

sympy's own `diff` answers in Heaviside and DiracDelta there, which no kernel can print.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy
from sympy.logic.boolalg import Boolean

from fa3_compile.spec import expr as E
from fa3_compile.spec.expr import Expr, where
from fa3_compile.spec.mask_biases import bias_of

ZERO = sympy.S.Zero

# Constant between their steps.
_STEPS = (E.floordiv, E.mod, E.trunc, E.round_half_even, sympy.floor, sympy.ceiling, sympy.sign)
_STEPS += (E.bitwise_and, E.bitwise_or, E.bitwise_xor, E.left_shift, E.right_shift, E.uniform)

# The derivative of a function of one argument, as torch's derivative formulas have it.
_OUTER: dict[type, Callable[[Expr], Expr]] = {
    sympy.exp: sympy.exp,
    sympy.log: lambda x: 1 / x,
    sympy.sin: sympy.cos,
    sympy.cos: lambda x: -sympy.sin(x),
    sympy.tan: lambda x: 1 + sympy.tan(x) ** 2,
    sympy.tanh: lambda x: 1 - sympy.tanh(x) ** 2,
    sympy.sinh: sympy.cosh,
    sympy.cosh: sympy.sinh,
    sympy.atan: lambda x: 1 / (1 + x**2),
    E.erf: lambda x: sympy.Float(1.1283791670955126) * sympy.exp(-(x**2)),
    E.sigmoid: lambda x: E.sigmoid(x) * (1 - E.sigmoid(x)),
    sympy.Abs: lambda x: sympy.sign(x),
}


def derivative(expr: Expr, by: Expr) -> Expr:
    """d expr / d by; `by` is `s` or a load, which is differentiated as a variable of its own.

    At a corner: abs has slope 0; so has a maximum or minimum with a number (relu, hardtanh); one
    of two expressions has the mean of both (torch.maximum), and at NaN their sum. What has another
    slope there, as torch.clamp has before torch 2.14, is read as a select. Conditions, rounding
    and indices have none. TypeError for a function without a rule.
    """
    if expr == by:
        return sympy.S.One
    if isinstance(expr, (E.load, Boolean)) or not expr.has(by):
        return ZERO
    if isinstance(expr, sympy.Add):
        return sympy.Add(*(derivative(x, by) for x in expr.args))
    if isinstance(expr, sympy.Mul):
        return _product(expr, by)
    if isinstance(expr, sympy.Pow):
        return _power(expr, by)
    if (bias := bias_of(expr)) is not None:  # its select is not the program's
        return bias[0] * derivative(bias[1], by)
    if isinstance(expr, where):
        condition, a, b = expr.args
        return where(condition, derivative(a, by), derivative(b, by))
    if isinstance(expr, (sympy.Max, sympy.Min)):
        return _extremum(expr, by)
    if isinstance(expr, _STEPS):
        return ZERO
    if (outer := _OUTER.get(type(expr))) is not None:
        return _chained(outer(expr.args[0]), derivative(expr.args[0], by))
    raise TypeError(f"{type(expr).__name__} has no derivative here: {expr}")


def _chained(outer: Expr, slope: Expr) -> Expr:
    """Their product. A branch that a select does not take has no part in it, as in torch: at
    x = 0, sqrt(relu(x)) has the slope 0, though that of sqrt is infinite."""
    if isinstance(slope, where) and not outer.is_number:
        condition, a, b = slope.args
        return where(condition, _chained(outer, a), _chained(outer, b))
    return ZERO if slope == 0 else outer * slope


def _product(expr: Expr, by: Expr) -> Expr:
    terms = []
    for i, factor in enumerate(expr.args):
        slope = derivative(factor, by)
        if slope != 0:
            others = sympy.Mul(*expr.args[:i], *expr.args[i + 1 :])
            terms.append(_chained(others, slope))
    return sympy.Add(*terms)


def _power(expr: sympy.Pow, by: Expr) -> Expr:
    base, exponent = expr.base, expr.exp
    slope = _chained(exponent * base ** (exponent - 1), derivative(base, by))
    if (of_exponent := derivative(exponent, by)) != 0:
        slope += expr * sympy.log(base) * of_exponent
    return slope


def _extremum(expr: Expr, by: Expr) -> Expr:
    """One operand after the other, numbers last, as the torch program takes them."""
    args = sorted(expr.args, key=lambda x: (bool(x.is_number), str(x)))
    value, slope = args[0], derivative(args[0], by)
    for x in args[1:]:
        other = derivative(x, by)
        if x.is_number:
            loses = value <= x if isinstance(expr, sympy.Max) else value >= x
            slope = where(loses, ZERO, slope)
        else:
            wins, loses = value > x, value < x
            if isinstance(expr, sympy.Min):
                wins, loses = loses, wins
            tie = where(sympy.Eq(value, x), (slope + other) / 2, slope + other)
            if other == 0:
                slope = where(loses, ZERO, tie)
            elif slope == 0:
                slope = where(wins, ZERO, tie)
            else:
                slope = where(wins, slope, where(loses, other, tie))
        value = expr.func(value, x)
    return slope
