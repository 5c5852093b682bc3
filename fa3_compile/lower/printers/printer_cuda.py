"""Expressions as CUDA C++ scalars."""

from __future__ import annotations

import math

import sympy

from fa3_compile.lower.printers.formulas import (
    float32,
    sigmoid_by_exp2,
    tanh_by_exp2,
    with_precise_tanh,
    with_small_digits,
)
from fa3_compile.lower.printers.printer import Printer
from fa3_compile.lower.printers.text import ADD, ATOM, LOW, MUL, Text, python_mod
from fa3_compile.spec import expr as E


class CudaPrinter(Printer):
    """CUDA C++ scalars: `int` (64 bits where a load or a size is) and `float`."""

    ASSIGN = "const auto {name} = {value};"
    TRUE, FALSE = "true", "false"
    FUNCTIONS = {
        name: f"{name}f"
        for name in (
            "exp exp2 expm1 log log1p sin cos tan sinh cosh atan erf floor ceil sqrt".split()
        )
    } | {"round": "rintf", "precise_tanh": "tanhf"}

    def rewrite(self, expr):
        """tanhf has a branch and about 20 instructions; this is one exp2 and one division."""
        expr = with_precise_tanh(with_small_digits(expr))
        return expr.replace(sympy.tanh, tanh_by_exp2).replace(E.sigmoid, sigmoid_by_exp2)

    def number(self, value: float) -> str:
        value = float32(value)
        if math.isinf(value):  # NVRTC has no INFINITY without a header
            return f"__int_as_float(0x{'7f' if value > 0 else 'ff'}800000)"
        return f"{value!r}f"

    def cast_float(self, x: Text) -> Text:
        return Text(f"float({x.body})", "float")

    def cast_int(self, x: Text) -> Text:
        return Text(f"int({x.body})", "int")

    def cast_long(self, x: Text) -> Text:
        return Text(f"(long long)({x.body})", "int")

    def where(self, condition: Text, a: Text, b: Text) -> Text:
        return Text(f"{condition.at(ATOM)} ? {a.at(ADD)} : {b.at(ADD)}", a.kind, LOW)

    def extremum(self, name: str, a: Text, b: Text) -> Text:
        function = f"f{name}f" if a.kind == "float" else name
        return Text(f"{function}({a.body}, {b.body})", a.kind)

    def logic(self, operator: str, args: list[Text]) -> Text:
        if operator == "not":
            return Text(f"!{args[0].at(ATOM)}", "bool", MUL)
        return Text(
            {"and": " && ", "or": " || "}[operator].join(x.at(ATOM) for x in args), "bool", LOW
        )

    def floordiv(self, a: Text, b: Text, plain: bool) -> Text:
        if plain:
            return Text(f"{a.at(MUL)} / {b.at(ATOM)}", "int", MUL)
        return Text(f"({a.at(ADD)} - {python_mod(a, b)}) / {b.at(ATOM)}", "int", MUL)

    def mod(self, a: Text, b: Text, plain: bool) -> Text:
        body = f"{a.at(MUL)} % {b.at(ATOM)}" if plain else python_mod(a, b)
        return Text(body, "int", MUL)

    def power(self, base: Text, exponent: Text, expr: sympy.Pow) -> Text:
        return Text(f"powf({base.body}, {exponent.body})", "float")

    def absolute(self, x: Text) -> Text:
        return Text(f"{'fabsf' if x.kind == 'float' else 'abs'}({x.body})", x.kind)
