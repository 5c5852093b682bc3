"""Functions out of simpler ones, for languages that lack them or have them dearer; literals."""

from __future__ import annotations

import math
import struct

import sympy

from fa3_compile.spec import expr as E

FLOAT32_MAX = 3.4028234663852886e38
LOG2_E = sympy.Float(1 / math.log(2))
MINUS_2_LOG2_E = sympy.Float(-2 / math.log(2))


class log1p(sympy.Function):
    """log(1 + x), whose digits near 0 are those of x."""


class expm1(sympy.Function):
    """exp(x) - 1, whose digits near 0 are those of x."""


def with_small_digits(expr):
    """log(1 + x) and exp(x) - 1 as functions that keep a small x: its sign, root or logarithm may
    be asked for, as of softplus(-20)."""
    return expr.replace(_is_log_of_1_and_more, lambda x: log1p(x.args[0] - 1)).replace(
        lambda x: x.is_Add and _taken_off(x) is not None, _with_expm1
    )


def _is_log_of_1_and_more(expr) -> bool:
    return isinstance(expr, sympy.log) and expr.args[0].is_Add and sympy.S.One in expr.args[0].args


def _taken_off(total):
    """The term c*exp(x) of a sum with a constant -c."""
    constant = total.as_coeff_Add()[0]
    if constant == 0:
        return None
    multiples = [x for x in total.args if x.as_coeff_Mul()[0] == -constant]
    return next((x for x in multiples if isinstance(x.as_coeff_Mul()[1], sympy.exp)), None)


def _with_expm1(total):
    constant, term = total.as_coeff_Add()[0], _taken_off(total)
    assert term is not None
    rest = sympy.Add(*(x for x in total.args if x is not term and x is not constant))
    return rest - constant * expm1(term.as_coeff_Mul()[1].args[0])


def sinh_by_expm1(x):
    return (expm1(x) - expm1(-x)) / 2  # pyright: ignore[reportOperatorIssue]


# What asks for the digits of a small number: a sign, a step, a root, a quotient.
_DEMANDING = (sympy.log, sympy.sign, sympy.core.relational.Relational, E.round_half_even)
_DEMANDING += (sympy.floor, sympy.ceiling, E.trunc, sympy.Pow)


class precise_tanh(sympy.Function):
    """tanh(x), whose digits near 0 are those of x."""


def with_precise_tanh(expr):
    """tanh as precise_tanh where the digits of a small number are asked for."""
    return expr.replace(
        lambda x: isinstance(x, _DEMANDING) and x.has(sympy.tanh) and not _is_power(x),
        lambda x: x.replace(sympy.tanh, precise_tanh),
    )


def _is_power(x) -> bool:
    return x.is_Pow and bool(x.exp.is_Integer and x.exp.is_positive)


def tanh_by_exp2(x):
    """2 / (1 + e^(-2x)) - 1: no overflow at either end, absolute error about 1e-7."""
    coefficient, rest = x.as_coeff_Mul()
    # Not evaluated: sympy would multiply a sum of integers out.
    exponent = sympy.Mul(MINUS_2_LOG2_E * coefficient, rest, evaluate=False)
    return 2 / (1 + sympy.Pow(2, exponent)) - 1


def sigmoid_by_exp2(x):
    """1 / (1 + 2^(-x log2 e)), whose small values keep all their digits; 2^x may be infinite."""
    coefficient, rest = x.as_coeff_Mul()
    return 1 / (1 + sympy.Pow(2, sympy.Mul(-LOG2_E * coefficient, rest, evaluate=False)))


def round_by_floor(x):
    low = sympy.floor(x, evaluate=False)
    odd = low - 2 * sympy.floor(low * 0.5, evaluate=False)
    up = E.where(x - low > 0.5, 1.0, E.where(x - low < 0.5, 0.0, odd))
    return low + up


# Minimax on [0, 1] in z**2 of atan(z) / z (Abramowitz and Stegun 4.4.49), error 2e-8.
_ATAN = (1.0, -0.3333314528, 0.1999355085, -0.1420889944)
_ATAN += (0.1065626393, -0.0752896400, 0.0429096138, -0.0161657367, 0.0028662257)


def atan_by_polynomial(x):
    size = sympy.Abs(x, evaluate=False)
    z = sympy.Min(size, 1 / size, evaluate=False)
    out = sympy.Float(_ATAN[-1])
    for coefficient in reversed(_ATAN[:-1]):
        out = out * z**2 + coefficient
    folded = E.where(size > 1, math.pi / 2, 0.0) + E.where(size > 1, -1.0, 1.0) * z * out
    return E.where(x < 0, -1.0, 1.0) * folded


def float32(value: float) -> float:
    """The value as a literal: within float32's range as it is, beyond it an infinity."""
    if abs(value) <= FLOAT32_MAX:
        return value
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
