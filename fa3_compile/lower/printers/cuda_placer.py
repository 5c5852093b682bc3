"""Where the Hopper kernel computes the parts of an expression: once a head, a row or a column, or
for each element; and their text."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from fa3_compile.lower.printers import hoist
from fa3_compile.lower.printers.formulas import with_small_digits
from fa3_compile.lower.printers.printer_cuda import CudaPrinter
from fa3_compile.lower.printers.text import Text
from fa3_compile.spec import expr as E


class KernelPrinter(CudaPrinter):
    """C++ with tanh, sigmoid, min and max of fa3/ptx.cuh; mixed integers have a min and max."""

    FUNCTIONS = {**CudaPrinter.FUNCTIONS, "tanh": "tanh_approx", "sigmoid": "sigmoid_approx"}

    def rewrite(self, expr):
        return with_small_digits(expr)

    def extremum(self, name: str, a: Text, b: Text) -> Text:
        if a.kind == "float":
            return Text(f"{name}_nan({a.body}, {b.body})", a.kind)
        function = "largest" if name == "max" else "least"
        return Text(f"{function}({a.body}, {b.body})", a.kind)

    def absolute(self, x: Text) -> Text:
        return super().absolute(x) if x.kind == "float" else Text(f"magnitude({x.body})", x.kind)


TILE = sympy.Symbol("tile", real=True)
NUMBER = sympy.Symbol("number", real=True)


class Placer(hoist.Hoister):
    """A hoister that knows heads, rows and columns apart, and the tensor that comes by TMA.

    `named` lists (symbol, its origin, the origin in terms of earlier symbols), in order.
    """

    def __init__(
        self, prefix: str, known: dict, tile: int | None, number: E.uniform | None = None
    ) -> None:
        super().__init__(prefix, known)
        self.tile, self.number = tile, number
        self.named: list[tuple[sympy.Symbol, sympy.Basic, sympy.Basic]] = []

    def place(self, expr):
        if self.tile is not None and isinstance(expr, E.load) and expr.tensor == self.tile:
            return TILE
        if self.number is not None and expr == self.number:
            return NUMBER
        return super().place(expr)

    def _named(self, expr, placed):
        names = self._in_loop if hoist.level(expr) == hoist.ELEMENT else self._known
        if expr not in names:
            # No assumptions: a symbol that is known to be positive would rewrite what it is in.
            condition = isinstance(expr, sympy.logic.boolalg.Boolean)
            assumed = {} if condition else {"real": True}
            if not condition and expr.is_integer:
                assumed = {"integer": True, "nonnegative": expr.is_nonnegative}
            names[expr] = sympy.Symbol(f"{self.prefix}{len(self.named)}", **assumed)
            self.named.append((names[expr], expr, placed))
        return names[expr]


@dataclass
class Member:
    """A hoisted value: its type, its name and the expression that gives it."""

    ctype: str
    name: str
    value: str
