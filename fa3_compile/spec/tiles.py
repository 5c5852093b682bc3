"""Which tiles of one concrete score matrix a mask leaves empty, fills, or cuts; for the report.

By interval arithmetic over all tiles at once, and element by element where that cannot tell. What
is not known (a captured tensor, a function without a rule) counts as "may hold, may not": sound by
construction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import sympy

from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.expr import KV, SKV, SQ, Expr, Q, floordiv, load, mod, where

EMPTY, PARTIAL, FULL = 0, 1, 2
# The values of a `load` at every (q, kv): an array [Sq|1, Skv|1].
Values = Callable[[Expr], np.ndarray]
Range = tuple[np.ndarray | float, np.ndarray | float]  # the least and the largest value
# Tiles are looked into at PROBES x PROBES elements, then at all, of this many in either case.
PROBES, MOST_ELEMENTS = 8, 1 << 22


@dataclass(frozen=True)
class TileCounts:
    """Tiles of one head: nothing passes the mask, something may, everything does."""

    empty: int
    partial: int
    full: int


def tile_map(
    spec: AttentionSpec,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    sizes: tuple[int, ...] = (),
    *,
    head: tuple[int, int] | None = None,
    values: Values | None = None,
) -> np.ndarray | None:
    """EMPTY, PARTIAL or FULL for each tile of block_q queries (rows) by block_kv keys (columns).

    head    the (batch, head) whose tiles they are; None for what holds of all
    values  what the mask's captured tensors hold, for that head

    None where no tile can be told, because the mask depends on captured tensors.
    """
    b, h = ((0.0, np.inf), (0.0, np.inf)) if head is None else ((x, x) for x in map(float, head))
    symbols: dict[Expr, Range] = {
        E.B: b,
        E.H: h,
        SQ: (float(q_len), float(q_len)),
        SKV: (float(kv_len), float(kv_len)),
    }
    symbols |= {E.size_symbol(i): (float(n), float(n)) for i, n in enumerate(sizes)}
    loads: dict[Expr, np.ndarray] = {}
    if values is not None:
        loads = {x: np.asarray(values(x), np.float64) for x in spec.mask.atoms(load)}
    queries, keys = _Blocks(q_len, block_q), _Blocks(kv_len, block_kv)
    with np.errstate(all="ignore"):
        may, must = _Tiles(symbols, loads, queries, keys).truth(spec.mask)
        shape = (len(queries.low), len(keys.low))
        tiles = np.broadcast_to(may, shape).astype(np.int8) + np.broadcast_to(must, shape)
        if spec.mask.has(load) and not loads and bool(np.all(tiles == PARTIAL)):
            return None
        _look_inside(tiles, spec.mask, symbols, loads, queries, keys)
    return tiles


def _look_inside(tiles: np.ndarray, mask, symbols, loads, queries: _Blocks, keys: _Blocks) -> None:
    """Settles tiles that are partial only as far as intervals can tell."""

    def elements(rows, columns, *counts: int) -> tuple[np.ndarray, np.ndarray]:
        """Whether some and whether all of so many rows and columns of each tile pass."""
        q = queries.spread(rows, counts[0])[:, :, None]
        kv = keys.spread(columns, counts[1])[:, None, :]
        may, must = _Points(symbols, loads, q, kv).truth(mask)
        shape = (len(rows), *counts)
        return (
            np.broadcast_to(may, shape).any((1, 2)),
            np.broadcast_to(must, shape).all((1, 2)),
        )

    rows, columns = np.nonzero(tiles == PARTIAL)
    rows, columns = (x[: MOST_ELEMENTS // PROBES**2] for x in (rows, columns))
    some, every = elements(rows, columns, PROBES, PROBES)
    doubtful = np.flatnonzero(~some | every)[: MOST_ELEMENTS // (queries.block * keys.block)]
    rows, columns = rows[doubtful], columns[doubtful]
    some, every = elements(rows, columns, queries.block, keys.block)
    tiles[rows, columns] = np.where(every, FULL, np.where(some, PARTIAL, EMPTY))


def tile_counts(
    spec: AttentionSpec,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    sizes: tuple[int, ...] = (),
    *,
    head: tuple[int, int] | None = None,
    values: Values | None = None,
) -> TileCounts | None:
    """How many tiles `tile_map` finds of each kind."""
    tiles = tile_map(spec, q_len, kv_len, block_q, block_kv, sizes, head=head, values=values)
    if tiles is None:
        return None
    return TileCounts(*(int((tiles == kind).sum()) for kind in (EMPTY, PARTIAL, FULL)))


class _Blocks:
    """The positions of one axis, in blocks."""

    def __init__(self, length: int, block: int) -> None:
        self.length, self.block = length, min(block, length)
        self.low = np.arange(0, length, block, dtype=np.float64)
        self.high = np.minimum(self.low + block, length) - 1

    def spread(self, blocks: np.ndarray, count: int) -> np.ndarray:
        """`count` positions of each of these blocks [blocks, count], its ends among them."""
        low, high = self.low[blocks, None], self.high[blocks, None]
        return np.round(low + np.linspace(0, 1, count) * (high - low))

    def extremes(self, low: np.ndarray, high: np.ndarray, axis: int) -> Range:
        """The least and the largest of each block's values, of an array that has the axis or 1."""
        if low.shape[axis] == 1:
            return low, high
        starts = self.low.astype(np.int64)
        return np.minimum.reduceat(low, starts, axis), np.maximum.reduceat(high, starts, axis)


class _Ranges:
    """Interval arithmetic on arrays: a number is (least, largest), a condition is (may hold
    somewhere, holds everywhere)."""

    def __init__(self, symbols: dict[Expr, Range]) -> None:
        self.symbols = symbols

    def truth(self, mask) -> tuple[np.ndarray, np.ndarray]:
        if mask == sympy.true or mask == sympy.false:
            value = np.array(mask == sympy.true)
            return value, value
        if isinstance(mask, sympy.Not):
            may, must = self.truth(mask.args[0])
            return ~must, ~may
        if isinstance(mask, (sympy.And, sympy.Or)):
            combine = np.logical_and if isinstance(mask, sympy.And) else np.logical_or
            may, must = self.truth(mask.args[0])
            for x in mask.args[1:]:
                other_may, other_must = self.truth(x)
                may, must = combine(may, other_may), combine(must, other_must)
            return may, must
        if isinstance(mask, sympy.core.relational.Relational):
            return self.relation(mask)
        return np.array(True), np.array(False)

    def relation(self, relation) -> tuple[np.ndarray, np.ndarray]:
        difference = relation.lhs - relation.rhs
        if isinstance(relation, (sympy.Gt, sympy.Ge)):
            difference = -difference
        low, high = self.range(difference)
        if not E.is_integer_valued(difference):  # kernels compare in float32
            low = np.where(np.isfinite(low), low - 1e-6 * np.abs(low), low)
            high = np.where(np.isfinite(high), high + 1e-6 * np.abs(high), high)
        if isinstance(relation, (sympy.Lt, sympy.Gt)):
            return low < 0, high < 0
        if isinstance(relation, (sympy.Le, sympy.Ge)):
            return low <= 0, high <= 0
        may, must = (low <= 0) & (high >= 0), (low == 0) & (high == 0)
        return (~must, ~may) if isinstance(relation, sympy.Ne) else (may, must)

    def range(self, value) -> tuple:
        low, high = self._range(value)
        low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        return np.where(np.isnan(low), -np.inf, low), np.where(np.isnan(high), np.inf, high)

    def _range(self, value) -> tuple:
        if value.is_number:
            return float(value), float(value)
        if value in self.symbols:
            return self.symbols[value]
        if value.is_Add:
            parts = [self.range(x) for x in value.args]
            return sum(x[0] for x in parts), sum(x[1] for x in parts)
        if value.is_Mul:
            low, high = self.range(value.args[0])
            for x in value.args[1:]:
                low, high = _corners(np.multiply, (low, high), self.range(x))
            return low, high
        if isinstance(value, (sympy.Max, sympy.Min)):
            combine = np.maximum if isinstance(value, sympy.Max) else np.minimum
            low, high = self.range(value.args[0])
            for x in value.args[1:]:
                other = self.range(x)
                low, high = combine(low, other[0]), combine(high, other[1])
            return low, high
        if isinstance(value, sympy.Abs):
            low, high = self.range(value.args[0])
            least = np.maximum(np.maximum(low, -high), 0)
            return least, np.maximum(np.abs(low), np.abs(high))
        if isinstance(value, where):
            return self.where(*value.args)
        if isinstance(value, (floordiv, mod)):
            return self.division(value)
        if type(value) in _BITS:
            return self.bits(value)
        if type(value) in _MONOTONE:
            return tuple(_MONOTONE[type(value)](x) for x in self.range(value.args[0]))
        return -np.inf, np.inf

    def where(self, condition, a, b) -> tuple:
        may, must = self.truth(condition)
        a, b = self.range(a), self.range(b)
        low, high = np.minimum(a[0], b[0]), np.maximum(a[1], b[1])
        low = np.where(must, a[0], np.where(~may, b[0], low))
        return low, np.where(must, a[1], np.where(~may, b[1], high))

    def division(self, value) -> tuple:
        low, high = self.range(value.args[0])
        least, largest = self.range(value.args[1])
        if not np.all(least > 0):
            return -np.inf, np.inf
        if isinstance(value, floordiv):
            return _corners(lambda a, b: np.floor(a / b), (low, high), (least, largest))
        same = (least == largest) & (np.floor(low / least) == np.floor(high / least))
        remainders = low - np.floor(low / least) * least, high - np.floor(high / least) * least
        return np.where(same, remainders[0], 0.0), np.where(same, remainders[1], largest - 1)

    def bits(self, value) -> tuple:
        """Known only of single integers."""
        (a, a_high), (b, b_high) = (self.range(x) for x in value.args)
        known = (a == a_high) & (b == b_high) & np.isfinite(a) & np.isfinite(b)
        integers = (np.where(known, x, 0).astype(np.int64) for x in (a, b))
        found = _BITS[type(value)](*integers).astype(np.float64)
        return np.where(known, found, -np.inf), np.where(known, found, np.inf)


class _Points(_Ranges):
    """Single elements."""

    def __init__(self, symbols, loads: dict[Expr, np.ndarray], q, kv) -> None:
        super().__init__(symbols | {Q: (q, q), KV: (kv, kv)})
        for x, values in loads.items():
            rows = 0 if values.shape[0] == 1 else q.astype(np.int64)
            columns = 0 if values.shape[1] == 1 else kv.astype(np.int64)
            found = values[rows, columns]
            self.symbols[x] = found, found


class _Tiles(_Ranges):
    """Whole tiles. What depends on the query alone, or on the key alone, is known exactly."""

    def __init__(self, symbols, loads, queries: _Blocks, keys: _Blocks) -> None:
        super().__init__(
            symbols
            | {
                Q: (queries.low[:, None], queries.high[:, None]),
                KV: (keys.low[None, :], keys.high[None, :]),
            }
        )
        for x, values in loads.items():
            self.symbols[x] = keys.extremes(*queries.extremes(values, values, 0), 1)
        q, kv = (np.arange(x.length, dtype=np.float64) for x in (queries, keys))
        self.points = _Points(symbols, loads, q[:, None], kv[None, :])
        self.queries, self.keys = queries, keys

    def range(self, value) -> Range:
        axis = _one_axis(value)
        if axis is not None and value not in self.symbols:
            low, high = np.broadcast_arrays(*self.points.range(value))
            if low.ndim == 2:
                blocks = (self.queries, self.keys)[axis]
                self.symbols[value] = blocks.extremes(low, high, axis)
        if value.is_Add and axis is None:
            groups: dict[int | None, list[Expr]] = {}
            for x in value.args:
                groups.setdefault(_one_axis(x), []).append(x)
            terms = [*groups.pop(None, []), *(sympy.Add(*x) for x in groups.values())]
            parts = [self.range(x) for x in terms]
            return sum(x[0] for x in parts), sum(x[1] for x in parts)
        return super().range(value)


def _one_axis(value) -> int | None:
    """0 for what depends on the query and not on the key, 1 for the other way round."""
    of_query, of_key = Q in value.free_symbols, KV in value.free_symbols
    return None if of_query == of_key else int(of_key)


def _corners(function, a, b) -> tuple[np.ndarray, np.ndarray]:
    """The range of a function that is monotone in each argument."""
    corners = [function(x, y) for x in a for y in b]
    bad = np.any([np.isnan(x) for x in np.broadcast_arrays(*corners)], axis=0)
    low, high = np.minimum.reduce(corners), np.maximum.reduce(corners)
    return np.where(bad, -np.inf, low), np.where(bad, np.inf, high)


_MONOTONE = {
    E.trunc: np.trunc,
    E.round_half_even: np.round,
    sympy.floor: np.floor,
    sympy.ceiling: np.ceil,
    sympy.sign: np.sign,
    sympy.exp: np.exp,
    sympy.tanh: np.tanh,
    E.sigmoid: lambda x: 0.5 * (1 + np.tanh(0.5 * x)),
    sympy.atan: np.arctan,
    sympy.sinh: np.sinh,
}

_BITS = {
    E.bitwise_and: np.bitwise_and,
    E.bitwise_or: np.bitwise_or,
    E.bitwise_xor: np.bitwise_xor,
    E.left_shift: np.left_shift,
    E.right_shift: np.right_shift,
}
