"""Exact index arithmetic: reshapes as division and remainder, simplified by known ranges.

Every axis symbol runs from 0 to its size - 1. Sizes are positive integers or expressions of
positive integer symbols (dynamic lengths), so facts are proven for every length at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy

from fa3_compile.spec.expr import (
    Expr,
    bitwise_and,
    bitwise_or,
    bitwise_xor,
    floordiv,
    left_shift,
    mod,
    right_shift,
)

Ranges = Mapping[sympy.Symbol, Expr]


def is_nonnegative(expr: Expr) -> bool:
    """Whether the expression is provably >= 0."""
    if expr.is_Integer:
        return bool(expr >= 0)
    return bool(sympy.expand(expr).is_nonnegative)


def same(a: Expr, b: Expr) -> bool:
    """Whether two sizes are provably equal."""
    a, b = sympy.sympify(a), sympy.sympify(b)
    return a == b or (not (a.is_Integer and b.is_Integer) and sympy.expand(a - b) == 0)


def quotient(a: Expr, b: Expr) -> Expr | None:
    """a / b if b divides a exactly for every value of the symbols, else None."""
    if a.is_Integer and b.is_Integer:
        return a // b if b != 0 and a % b == 0 else None
    if a == b:
        return sympy.S.One
    ratio = sympy.cancel(a / b)
    numerator, denominator = ratio.as_numer_denom()
    if denominator == 1 and all(c.is_Integer for c in numerator.as_coefficients_dict().values()):
        return ratio
    return None


def bounds(expr: Expr, ranges: Ranges) -> tuple[Expr, Expr] | None:
    """Inclusive (lowest, highest) value of an integer expression; None where unknown."""
    if expr.is_number:
        return (expr, expr)
    if expr.is_Symbol:
        return (sympy.S.Zero, ranges[expr] - 1) if expr in ranges else (expr, expr)
    if isinstance(expr, sympy.Add):
        parts = [bounds(x, ranges) for x in expr.args]
        if any(p is None for p in parts):
            return None
        return sum(p[0] for p in parts if p), sum(p[1] for p in parts if p)
    if isinstance(expr, sympy.Mul):
        coefficient, rest = sympy.S.One, []
        for factor in expr.args:
            if factor.free_symbols.isdisjoint(ranges):
                coefficient *= factor
            else:
                rest.append(factor)
        if len(rest) != 1:
            return (coefficient, coefficient) if not rest else None
        inner = bounds(rest[0], ranges)
        if inner is None:
            return None
        if coefficient.is_nonnegative:
            return coefficient * inner[0], coefficient * inner[1]
        if coefficient.is_nonpositive:
            return coefficient * inner[1], coefficient * inner[0]
        return None
    if isinstance(expr, mod):
        return (sympy.S.Zero, expr.args[1] - 1)
    if isinstance(expr, (sympy.Min, sympy.Max)):
        return _extreme_bounds(expr, ranges)
    if isinstance(expr, sympy.Abs):
        inner = bounds(expr.args[0], ranges)
        return inner and (sympy.S.Zero, sympy.Max(-inner[0], inner[1]))
    if isinstance(expr, floordiv) and expr.args[1].is_positive:
        inner = bounds(expr.args[0], ranges)
        return inner and (_floor(inner[0], expr.args[1]), _floor(inner[1], expr.args[1]))
    if isinstance(expr, (bitwise_and, bitwise_or, bitwise_xor, left_shift, right_shift)):
        return _bit_bounds(expr, *(bounds(x, ranges) for x in expr.args))
    return None


def _bit_bounds(expr, a, b) -> tuple[Expr, Expr] | None:
    """The bounds of an operation on the bits of integers, which lie between a's and b's numbers."""
    if isinstance(expr, bitwise_and):
        # No more bits than either has; one that is not negative decides the sign.
        highs = [x[1] for x in (a, b) if x and is_nonnegative(x[0])]
        known = [x for x in highs if x.is_Integer]
        if highs:
            return sympy.S.Zero, min(known) if known else highs[0]
    if not a or not b or not all(x.is_Integer for x in (*a, *b)):
        return None
    if isinstance(expr, (left_shift, right_shift)):
        ends = [expr.func(x, n) for x in a for n in b]
        return sympy.Min(*ends), sympy.Max(*ends)
    beyond = sympy.Integer(2) ** max(int(x if x >= 0 else -x - 1).bit_length() for x in (*a, *b))
    negative = any(x[0] < 0 for x in (a, b))
    return (-beyond if negative else sympy.S.Zero), beyond - 1


def _extreme_bounds(expr, ranges: Ranges) -> tuple[Expr, Expr] | None:
    known = [p for x in expr.args if (p := bounds(x, ranges))]
    lows, highs = [p[0] for p in known], [p[1] for p in known]
    if len(known) == len(expr.args):
        return expr.func(*lows), expr.func(*highs)
    return None


def _floor(a: Expr, b: Expr) -> Expr:
    exact = quotient(a, b)
    if exact is not None:
        return exact
    # The highest index of a dimension, n*b - 1, lands in its last block, n - 1.
    whole = quotient(sympy.expand(a + 1), b)
    return whole - 1 if whole is not None else floordiv(a, b)


def within(expr: Expr, size: Expr, ranges: Ranges) -> bool:
    """Whether 0 <= expr < size is proven."""
    limits = bounds(expr, ranges)
    return limits is not None and is_nonnegative(limits[0]) and is_nonnegative(size - 1 - limits[1])


def _split(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """a = whole * b + rest, with every term that b divides in `whole`."""
    if b.is_Add and (symbol := _leading(b)) is not None:
        return _long_division(a, b, symbol)
    whole, rest = sympy.S.Zero, sympy.S.Zero
    for term in sympy.Add.make_args(sympy.expand(a)):
        ratio = _term_quotient(term, b)
        if ratio is None:
            rest += term
        else:
            whole += ratio
    return whole, rest


def _leading(b: Expr) -> sympy.Symbol | None:
    """A size that is a term of the sum b and occurs in no other."""
    for term in sorted(b.args, key=str):
        if term.is_Symbol and term not in (b - term).free_symbols:
            return term
    return None


def _long_division(a: Expr, b: Expr, symbol: sympy.Symbol) -> tuple[Expr, Expr]:
    """`_split` by a sum of sizes, as a cache and what is appended to it have."""
    whole, rest = sympy.S.Zero, sympy.expand(a)
    while (degree := max(_degree(x, symbol) for x in sympy.Add.make_args(rest))) > 0:
        leading = [x for x in sympy.Add.make_args(rest) if _degree(x, symbol) == degree]
        share = sympy.Add(*(x / symbol for x in leading))
        whole, rest = whole + share, sympy.expand(rest - share * b)
    return whole, rest


def _degree(term: Expr, symbol: sympy.Symbol) -> int:
    """The power of a symbol that is a factor of the term, 0 where it stands inside a function."""
    return int(term.as_powers_dict().get(symbol, 0))


def _term_quotient(term: Expr, b: Expr) -> Expr | None:
    if b.is_Integer:
        coefficient, rest = term.as_coeff_Mul()
        if coefficient.is_Integer and coefficient % b == 0:
            return coefficient // b * rest
        return None
    return quotient(term, b)


def divide(a: Expr, b: Expr, ranges: Ranges) -> Expr:
    """floor(a / b) for integers, simplified by the ranges."""
    whole, rest = _split(a, b)
    if rest == 0 or within(rest, b, ranges):
        return whole
    if isinstance(rest, floordiv) and rest.args[1].is_Integer and b.is_Integer:
        return whole + divide(rest.args[0], rest.args[1] * b, ranges)
    return whole + floordiv(rest, b)


def remainder(a: Expr, b: Expr, ranges: Ranges) -> Expr:
    """a mod b for integers, simplified by the ranges."""
    _, rest = _split(a, b)
    if rest == 0 or within(rest, b, ranges):
        return rest
    return mod(rest, b)


def simplify_index(expr: Expr, ranges: Ranges) -> Expr:
    """The expression with every floordiv and mod simplified by the ranges, inside out."""

    def visit(node):
        if not node.args:
            return node
        args = [visit(x) for x in node.args]
        if isinstance(node, floordiv):
            return divide(args[0], args[1], ranges)
        if isinstance(node, mod):
            return remainder(args[0], args[1], ranges)
        node = node.func(*args) if tuple(args) != node.args else node
        return _recombined(node) if isinstance(node, sympy.Add) else node

    return visit(expr)


def _recombined(total: Expr) -> Expr:
    """c*b*floordiv(x, b) + c*mod(x, b) -> c*x."""
    for term in total.args:
        scale, rest = term.as_coeff_Mul()
        if not isinstance(rest, mod):
            continue
        x, b = rest.args
        quotients = [floordiv(x, b)]
        if isinstance(x, floordiv) and x.args[1].is_positive and b.is_positive:
            # As it is once it is simplified.
            quotients.append(floordiv(x.args[0], x.args[1] * b))
        for whole in (scale * b * quotient for quotient in quotients):
            if whole in total.args:
                return _again(total - term - whole + scale * x)
    return total


def _again(expr: Expr) -> Expr:
    return _recombined(expr) if isinstance(expr, sympy.Add) else expr


def flatten(index: Sequence[Expr], shape: Sequence[Expr]) -> Expr:
    """The position of a multi-index in row-major order."""
    position = sympy.S.Zero
    for i, size in zip(index, shape, strict=True):
        position = position * size + i
    return _again(sympy.expand(position))


def unflatten(position: Expr, shape: Sequence[Expr], ranges: Ranges) -> list[Expr]:
    """The multi-index of a row-major position."""
    index: list[Expr] = []
    for n, size in enumerate(reversed(shape)):
        if n == len(shape) - 1:
            index.append(position)
        elif size == 1:
            index.append(sympy.S.Zero)
        else:
            index.append(remainder(position, size, ranges))
            position = divide(position, size, ranges)
    return index[::-1]


def reshape_index(
    index: Sequence[Expr], to: Sequence[Expr], source: Sequence[Expr], ranges: Ranges
) -> list[Expr]:
    """Where element `index` of a tensor reshaped to `to` lies in the tensor of shape `source`."""
    out: list[Expr] = []
    i = j = 0
    while i < len(source) or j < len(to):
        group_in, group_out = [], []
        size_in = size_out = sympy.S.One
        start_in, start_out = i, j
        while True:
            if i < len(source) and (not group_in or not is_nonnegative(size_in - size_out)):
                size_in *= source[i]
                group_in.append(source[i])
                i += 1
            elif j < len(to) and (not group_out or not is_nonnegative(size_out - size_in)):
                size_out *= to[j]
                group_out.append(to[j])
                j += 1
            else:
                if not same(size_in, size_out):
                    # Sizes that cannot be told apart group by group: take the whole rest.
                    group_in, i = list(source[start_in:]), len(source)
                    group_out, j = list(to[start_out:]), len(to)
                break
        while min(len(group_in), len(group_out)) > 1 and same(group_in[-1], group_out[-1]):
            # The last dimensions of a group that are the same are groups of their own.
            group_in, group_out, i, j = group_in[:-1], group_out[:-1], i - 1, j - 1
        if len(group_in) == 1 and len(group_out) == 1:
            out.append(index[start_out])
        elif group_in:
            position = flatten(index[start_out:j], group_out)
            out += unflatten(position, group_in, ranges)
    return out
