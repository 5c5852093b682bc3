"""Expressions as Triton: elements of blocks."""

from __future__ import annotations

import math

import sympy

from fa3_compile.lower.printers.formulas import (
    atan_by_polynomial,
    float32,
    round_by_floor,
    sigmoid_by_exp2,
    sinh_by_expm1,
    tanh_by_exp2,
    with_precise_tanh,
    with_small_digits,
)
from fa3_compile.lower.printers.printer import OPERATORS, Printer
from fa3_compile.lower.printers.text import ADD, ATOM, LOW, MUL, Text, python_mod
from fa3_compile.spec import expr as E


class TritonPrinter(Printer):
    """Elements of Triton blocks: int32 (int64 where a load or a size is) and float32.

    Needs `tl` alone (no libdevice), so that it also runs under TRITON_INTERPRET=1.
    """

    FUNCTIONS = {
        name: f"tl.{name}" for name in "exp exp2 log log2 sin cos erf floor ceil sqrt".split()
    }

    def rewrite(self, expr):
        """tanh, sigmoid, tan, sinh, cosh, atan and round out of what `tl` has."""
        expr = with_precise_tanh(with_small_digits(expr))
        for cls, formula in _FORMULAS.items():
            if expr.has(cls):
                expr = expr.replace(cls, formula)
        return expr

    def unary(self, name: str, x: Text) -> Text:
        if name not in _SERIES:
            return super().unary(name, x)
        series, beyond = _SERIES[name]
        body = self.to_float(x).at(ATOM)
        z = f"({body} / ({body} + 2.0))"
        near, far = (text.format(x=body, z=z) for text in (series, beyond))
        return Text(f"tl.where(tl.abs({body}) < 0.25, {near}, {far})", "float")

    def number(self, value: float) -> str:
        value = float32(value)
        if math.isinf(value):
            return f'float("{value}")'
        # Triton reads a literal below float32's normal range as float64.
        return repr(value) if abs(value) >= 2.0**-126 else "0.0"

    def cast_float(self, x: Text) -> Text:
        return Text(f"tl.cast({x.body}, tl.float32)", "float")

    def cast_int(self, x: Text) -> Text:
        return Text(f"tl.cast({x.body}, tl.int32)", "int")

    def cast_long(self, x: Text) -> Text:
        return Text(f"tl.cast({x.body}, tl.int64)", "int")

    def where(self, condition: Text, a: Text, b: Text) -> Text:
        return Text(f"tl.where({condition.body}, {a.body}, {b.body})", a.kind)

    def extremum(self, name: str, a: Text, b: Text) -> Text:
        """Of NaN it is NaN, as in torch: one instruction either way from sm_80 on."""
        nan = ", propagate_nan=tl.PropagateNan.ALL" if a.kind == "float" else ""
        return Text(f"tl.{name}imum({a.body}, {b.body}{nan})", a.kind)

    def logic(self, operator: str, args: list[Text]) -> Text:
        if operator == "not":  # not `~`: of a constexpr bool that is -1 or -2
            return Text(f"{args[0].at(ATOM)} == 0", "bool", LOW)
        return Text(OPERATORS[operator].join(x.at(ATOM) for x in args), "bool", LOW)

    def floordiv(self, a: Text, b: Text, plain: bool) -> Text:
        if plain:
            return Text(f"{a.at(MUL)} // {b.at(ATOM)}", "int", MUL)
        return Text(f"({a.at(ADD)} - {python_mod(a, b)}) // {b.at(ATOM)}", "int", MUL)

    def mod(self, a: Text, b: Text, plain: bool) -> Text:
        body = f"{a.at(MUL)} % {b.at(ATOM)}" if plain else python_mod(a, b)
        return Text(body, "int", MUL)

    def power(self, base: Text, exponent: Text, expr: sympy.Pow) -> Text:
        y = exponent.at(MUL)
        if not expr.exp.is_integer:
            return Text(f"tl.exp2({y}*tl.log2({base.body}))", "float")
        out = f"tl.exp2({y}*tl.log2(tl.abs({base.body})))"
        if not expr.exp.is_even:
            below = f"-{out}"
            if not expr.exp.is_odd:
                below = f"tl.where(0.5*{y} == tl.floor(0.5*{y}), {out}, {below})"
            out = f"tl.where({base.at(ADD)} < 0, {below}, {out})"
        # 0**0 is 1.
        return Text(out if expr.exp.is_Integer else f"tl.where({y} == 0, 1.0, {out})", "float")

    def absolute(self, x: Text) -> Text:
        return Text(f"tl.abs({x.body})", x.kind)


# Near 0, and elsewhere; relative errors of 4e-7. The compiler computes equal parts once.
_SERIES = {
    "log1p": (
        "2.0*{z}*(1.0 + {z}*{z}*(0.33333333 + {z}*{z}*(0.2 + {z}*{z}*0.14285714)))",
        "tl.log({x} + 1.0)",
    ),
    "expm1": (
        "{x}*(1.0 + {x}*(0.5 + {x}*(0.16666667 + {x}*(0.041666667 + {x}*(0.0083333333"
        " + {x}*0.0013888889)))))",
        "tl.exp({x}) - 1.0",
    ),
    "precise_tanh": (
        "{x}*(1.0 - {x}*{x}*(0.33333333 - {x}*{x}*(0.13333333 - {x}*{x}*(0.053968254"
        " - {x}*{x}*0.021869489))))",
        "2.0 / (tl.exp2(-2.8853901*{x}) + 1.0) - 1.0",
    ),
}
_FORMULAS = {
    sympy.tanh: tanh_by_exp2,
    E.sigmoid: sigmoid_by_exp2,
    sympy.tan: lambda x: sympy.sin(x) / sympy.cos(x),
    sympy.sinh: sinh_by_expm1,
    sympy.cosh: lambda x: (sympy.exp(x) + sympy.exp(-x)) / 2,
    sympy.atan: atan_by_polynomial,
    E.round_half_even: round_by_floor,
}
