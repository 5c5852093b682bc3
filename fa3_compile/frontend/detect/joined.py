"""Scores that are a function of a sum of products, each of queries and keys of its own.

q k + q' k' is one product of the concatenations [q, q'] and [k, k'] along d: DeepSeek's MLA
(DeepSeek-V2, section 2.1.3) adds the product of its rotary parts so, and scores added to their
transpose are q k + k q. Read as one product, no tensor of all queries and keys is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import sympy
import torch

from fa3_compile.errors import NOTHING, Decline
from fa3_compile.frontend.detect.product import Dot
from fa3_compile.frontend.lift.placeholders import row_stat, row_total, some, total
from fa3_compile.frontend.region import Pair, Region
from fa3_compile.spec.expr import KV, Expr, S, depends_on, uniform

# Numbers that a half precision query may be multiplied by: float16 has little range to spare.
LARGEST_FACTOR = 64


def joined(score: Expr, symbols: Sequence[sympy.Symbol]) -> tuple[Expr, list[Expr]] | None:
    """(the score in `s` alone, a factor for each symbol), where `s` stands for the symbols' sum,
    each times its factor; None where the score is no function of one such sum.

    The first factor is 1 where their ratios are numbers, so that what scales all of them stays in
    the score. Factors are free of the key.
    """
    sums: set[tuple[Expr, ...]] = set()
    try:
        found = _Walk(symbols, sums).walk(score)
    except _Apart:
        return None
    return (found, [*sums.pop()]) if len(sums) == 1 else None


class _Apart(Exception):
    """The symbols are not summed up before anything else is done to them."""


class _Walk:
    def __init__(self, symbols: Sequence[sympy.Symbol], sums: set[tuple[Expr, ...]]):
        self.symbols, self.sums = symbols, sums

    def walk(self, expr):
        if not depends_on(expr, self.symbols):
            return expr
        if isinstance(expr, sympy.Add):
            return self._sum(expr)
        if not expr.args:
            raise _Apart
        return expr.func(*map(self.walk, expr.args))

    def _sum(self, expr: Expr) -> Expr:
        factors: dict[sympy.Symbol, Expr] = {}
        rest, inner = [], []
        for term in sympy.Add.make_args(expr):
            symbol = next(iter(term.free_symbols & {*self.symbols}), None)
            if symbol is None:
                rest.append(term)
            elif depends_on(factor := term / symbol, self.symbols):
                inner.append(term)
            else:
                factors[symbol] = factors[symbol] + factor if symbol in factors else factor
        if not factors:
            return sympy.Add(*map(self.walk, inner), *rest)
        if inner:
            expanded = sympy.expand_mul(expr)
            if expanded == expr:
                raise _Apart
            return self.walk(expanded)
        if len(factors) < len(self.symbols) or 0 in factors.values():
            raise _Apart
        return sympy.Add(self._summed([factors[x] for x in self.symbols]), *rest)

    def _summed(self, factors: list[Expr]) -> Expr:
        """What stands for a sum with these factors."""
        if any(
            depends_on(x, [KV]) or x.has(row_stat, row_total, total, some, uniform) for x in factors
        ):
            raise _Apart
        first = factors[0]
        ratios = [_exact(x / first) for x in factors]
        if all(x.is_number for x in ratios):
            self.sums.add(tuple(ratios))
            return first * S
        self.sums.add(tuple(factors))
        return S


def _exact(ratio: Expr) -> Expr:
    return sympy.Integer(int(ratio)) if ratio.is_number and ratio == int(ratio) else ratio


def check_factor(pair: Pair, dot: Dot) -> None:
    """`Decline` unless the factor on a pair's queries costs no more precision than the program
    gives away: none, or a rounding in the dtype that the program rounds all its scores to."""
    factor, dtype = pair.factor, pair.query.dtype
    exact = factor.is_number and abs(math.log2(abs(float(factor)))) in range(7)
    if exact or dtype in (torch.float32, torch.float64):
        return
    if dot.node.meta["val"].dtype == dtype:
        if factor.is_number and 1 / LARGEST_FACTOR <= abs(factor) <= LARGEST_FACTOR:
            return
        if not factor.is_number and dtype == torch.bfloat16:
            return
    raise Decline(
        "products-apart",
        pair.query.source,
        NOTHING,
        message=f"queries of {dtype} times {factor} would be rounded, as the program's are not",
    )


def hint(region: Region) -> str:
    """What the user should know of products that a kernel could not take together."""
    if region.apart is None or region.apart.code != "no-kernel":
        return ""
    return (
        "The scores are a sum of products, of which all but one are computed before and read as a "
        f"bias, because as one product they have no kernel: {region.apart.message}."
    )
