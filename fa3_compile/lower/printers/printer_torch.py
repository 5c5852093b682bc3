"""Expressions as torch operators on tensors."""

from __future__ import annotations

import math

import sympy

from fa3_compile.lower.printers.formulas import with_small_digits
from fa3_compile.lower.printers.printer import OPERATORS, Printer
from fa3_compile.lower.printers.text import ATOM, LOW, MUL, Text


class TorchPrinter(Printer):
    """Expressions of tensors that broadcast against each other.

    The program has `dtype` (the float type) and `device` in scope, and every symbol is a tensor:
    coordinates and sizes int64, `s` of `dtype`. A constant expression prints as a number.
    `uniform` is lower.philox.uniform.
    """

    FUNCTIONS = {
        name: f"torch.{name}"
        for name in (
            "exp exp2 expm1 log log1p sin cos tan tanh sinh cosh atan erf sigmoid floor ceil round "
            "sqrt".split()
        )
    }

    def rewrite(self, expr):
        return with_small_digits(expr)

    def number(self, value: float) -> str:
        return f'float("{value}")' if math.isinf(value) else repr(value)

    def cast_float(self, x: Text) -> Text:
        return Text(f"{x.at(ATOM)}.to(dtype)", "float")

    def cast_int(self, x: Text) -> Text:
        return Text(f"{x.at(ATOM)}.to(torch.int64)", "int")

    cast_long = cast_int

    def truth(self, x: Text, expected: bool) -> Text:
        return x if expected else Text(f"~{x.at(ATOM)}", "bool", MUL)

    def where(self, condition: Text, a: Text, b: Text) -> Text:
        first = a.body
        if a.literal and b.literal:
            kind = "dtype" if a.kind == "float" else "torch.int64"
            first = f"torch.full((), {a.body}, dtype={kind}, device=device)"
        return Text(f"torch.where({condition.body}, {first}, {b.body})", a.kind)

    def extremum(self, name: str, a: Text, b: Text) -> Text:
        if b.literal and a.kind == "float":
            # torch.clamp's slope at its bound depends on torch's version.
            bounds = f"{b.body}, float('inf')" if name == "max" else f"float('-inf'), {b.body}"
            return Text(f"torch.nn.functional.hardtanh({a.body}, {bounds})", a.kind)
        if b.literal:
            bound = "min" if name == "max" else "max"
            return Text(f"torch.clamp({a.body}, {bound}={b.body})", a.kind)
        return Text(f"torch.{name}imum({a.body}, {b.body})", a.kind)

    def logic(self, operator: str, args: list[Text]) -> Text:
        if operator == "not":
            return Text(f"~{args[0].at(ATOM)}", "bool", MUL)
        return Text(OPERATORS[operator].join(x.at(ATOM) for x in args), "bool", LOW)

    def floordiv(self, a: Text, b: Text, plain: bool) -> Text:
        return Text(f"{a.at(MUL)} // {b.at(ATOM)}", "int", MUL)

    def mod(self, a: Text, b: Text, plain: bool) -> Text:
        return Text(f"{a.at(MUL)} % {b.at(ATOM)}", "int", MUL)

    def power(self, base: Text, exponent: Text, expr: sympy.Pow) -> Text:
        return Text(f"torch.pow({base.body}, {exponent.body})", "float")

    def absolute(self, x: Text) -> Text:
        return Text(f"torch.abs({x.body})", x.kind)

    def uniform(self, args: list[Text]) -> Text:
        return Text(f"uniform({', '.join(x.body for x in args)}, dtype)", "float")
