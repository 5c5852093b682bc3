"""Expressions as Triton: elements of blocks."""

from __future__ import annotations

import math

import sympy

from fa3_compile.lower.formulas import (
    atan_by_polynomial,
    float32,
    round_by_floor,
    sigmoid_by_exp2,
    tanh_by_exp2,
)
from fa3_compile.lower.printer import (
    ADD,
    ATOM,
    LOW,
    MUL,
    OPERATORS,
    Printer,
    Text,
    python_mod,
)
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
        for cls, formula in _FORMULAS.items():
            if expr.has(cls):
                expr = expr.replace(cls, formula)
        return expr

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
        return Text(f"tl.{name}imum({a.body}, {b.body})", a.kind)

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


_FORMULAS = {
    sympy.tanh: tanh_by_exp2,
    E.sigmoid: sigmoid_by_exp2,
    sympy.tan: lambda x: sympy.sin(x) / sympy.cos(x),
    sympy.sinh: lambda x: (sympy.exp(x) - sympy.exp(-x)) / 2,
    sympy.cosh: lambda x: (sympy.exp(x) + sympy.exp(-x)) / 2,
    sympy.atan: atan_by_polynomial,
    E.round_half_even: round_by_floor,
}
