"""Which tensors of the program an attention reads as queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import sympy
import torch
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.detect import beside
from fa3_compile.frontend.detect.joined import check_factor
from fa3_compile.frontend.detect.operands import Place, keys_as_one, origins, view_of
from fa3_compile.frontend.detect.product import PRODUCTS, Dot
from fa3_compile.frontend.detect.scores import Scores
from fa3_compile.frontend.dynamo.mutations import overwrite
from fa3_compile.frontend.lift.lift import Index, Lifter, shape_of
from fa3_compile.frontend.lift.placeholders import D
from fa3_compile.frontend.region import Operand, Pair
from fa3_compile.frontend.shadow.trace import Shadow
from fa3_compile.spec.expr import KV, Expr, depends_on, floordiv, mod
from fa3_compile.spec.index import Ranges, bounds, quotient, same

T = TypeVar("T")


def find_split(indices, sizes) -> tuple[sympy.Symbol, Expr] | None:
    """An axis that one of the indices divides by a divisor of its size, and that divisor."""
    found = []
    for expr in indices:
        for node in expr.atoms(floordiv, mod):
            inner, by = node.args
            terms = [(s, inner.coeff(s)) for s in inner.free_symbols if s in sizes]
            for symbol, stride in terms:
                if stride == 0:
                    continue
                part = quotient(by, stride) if stride.is_nonnegative else None
                if part is not None and part != 1 and quotient(sizes[symbol], part) is not None:
                    if not same(part, sizes[symbol]):
                        found.append((symbol, part))
    found.sort(key=lambda pair: (pair[0].name, str(pair[1])))
    return found[0] if found else None


@dataclass(frozen=True)
class _Search:
    """How far an operand is followed back.

    casts       past casts that widen
    scales      past scales that vary along none of `varying`
    contracted  the axes that the product contracts
    is_query    queries have nothing to be read unexpanded for: their axes are left whole
    """

    lifter: Lifter
    casts: bool
    scales: bool = False
    varying: set[sympy.Symbol] = field(default_factory=set)
    contracted: dict[sympy.Symbol, Expr] = field(default_factory=dict)
    is_query: bool = False


def axis_symbol(name: str) -> sympy.Symbol:
    """What runs along an axis of that name."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


class OperandFinder:
    """Finds the operands of one reading.

    output  the Dynamo node in whose place they are read
    sizes   of the axes as they are split by now
    ranges  those, and what else indices range over
    holder  the Dynamo node that stands for a shadow node
    """

    def __init__(
        self,
        shadow: Shadow,
        output: fx.Node,
        sizes: dict[sympy.Symbol, Expr],
        ranges: dict[sympy.Symbol, Expr],
        holder: Callable[[fx.Node], fx.Node],
    ):
        self.shadow, self.output, self.holder = shadow, output, holder
        self.sizes, self.ranges = sizes, ranges

    def find(
        self, scores: Scores, values: Sequence[tuple[fx.Node, Index, Expr]], dtype: torch.dtype
    ) -> tuple[list[Pair], Operand, Expr]:
        """(the queries and keys of every product, V, the factor that their scales put on s), in the
        dtype of the output if that can be had of all. Scales of several products stay on their
        operands. `values` are the parts of V, what they are read at, and how many keys each has."""
        found: list[Pair] = []
        value: Operand | None = None
        total: Expr = sympy.S.One
        for casts in (True, False):
            search = _Search(scores.lifter, casts)
            parts = [self._with_keys(n, self._operand, search, x, i) for x, i, n in values]
            value = parts[0]
            if len(parts) > 1:
                parts = [replace(x, length=n) for x, (_, _, n) in zip(parts, values, strict=True)]
                value = replace(parts[0], behind=parts[1:])
            search = replace(search, scales=len(scores.dots) == 1)
            every = self.ranges[KV]
            keys = [(x.keys if scores.beside else every, x) for x in scores.dots]
            found = [self._with_keys(n, self._pair, search, x) for n, x in keys]
            total = sympy.Mul(*(x.place.factor for p in found for x in (p.query, p.key)))
            if {value.dtype, *(x.dtype for p in found for x in (p.query, p.key))} == {dtype}:
                break
        assert value is not None
        for pair, factor, dot in zip(found, scores.factors, scores.dots, strict=True):
            pair.factor = factor
            check_factor(pair, dot)
        return [beside.paired(found, scores.dots)] if scores.beside else found, value, total

    def _with_keys(self, keys: Expr, find: Callable[..., T], *args) -> T:
        """What is found where there are so many keys."""
        every = self.ranges[KV]
        self.ranges[KV] = keys
        try:
            return find(*args)
        finally:
            self.ranges[KV] = every

    def _pair(self, search: _Search, dot: Dot) -> Pair:
        """The queries and keys of a product. What it contracts as one axis and they have as
        several, points and coordinates or rows and features, is split."""
        contracted = {D: dot.width}
        place: Expr = sympy.S.Zero if dot.width == 1 else D
        while True:
            self.ranges |= contracted
            (queries, at), (keys, key_at) = dot.sides(place)
            varying = {*at[-2].free_symbols, *at[-1].free_symbols}
            search = replace(search, varying=varying, contracted=contracted)
            query = self._operand(replace(search, is_query=True), queries, at)
            search = replace(search, varying={KV, *contracted})
            pair = Pair(query, self._operand(search, keys, key_at), contracted)
            indices = (i for x in (pair.query, pair.key) for i in x.place.index)
            found = find_split(indices, contracted)
            if found is None:
                return pair
            symbol, inner = found
            count = quotient(contracted[symbol], inner)
            assert count is not None
            outer_axis, inner_axis = (axis_symbol(f"{symbol.name}{x}") for x in "oi")
            place = place.subs(symbol, inner * outer_axis + inner_axis)
            parts = {symbol: {outer_axis: count, inner_axis: inner}}
            contracted = {
                x: n for s, size in contracted.items() for x, n in parts.get(s, {s: size}).items()
            }

    def _operand(self, search: _Search, node: fx.Node, index: Index) -> Operand:
        best = deeper = None
        best_lost = mapped = False
        place, holders = Place(node, index), []
        for place in origins(
            node,
            index,
            search.lifter,
            inner=D,
            casts=search.casts,
            varying=search.varying,
        ):
            if not search.scales and place.factor != 1:
                break
            if place.cast is not None and (best or deeper):
                break
            mapped = mapped or place.node in self.shadow.within
            holders = self.shadow.dynamo_of.get(place.node)
            if not holders:
                continue
            source, since = holders[0], self.shadow.since[place.node, holders[0]]
            lost = overwrite(source, since, until=self.output) is not None
            if best and lost and not best_lost:
                continue
            at, _, _ = keys_as_one(place, self.ranges)
            if any(depends_on(x, self.ranges) for i in at for x in i.atoms(floordiv, mod)):
                # K and V of grouped heads: read unexpanded once the heads' axis is split.
                deeper = Operand(source, since, place, None)
                continue
            view = view_of(place, self.ranges)
            if view is not None and not _runs_out(place, self.ranges):
                best, deeper, best_lost = Operand(source, since, place, view), None, lost
        needed = best is None or best_lost
        if deeper is not None and (needed or not search.is_query):
            if find_split(deeper.place.index, self.sizes):
                return deeper
        if deeper is not None and needed and find_split(deeper.place.index, search.contracted):
            return deeper
        if best is None and mapped:
            raise Decline(
                "operand-unclear",
                self.holder(node),
                "Project queries, keys and values before the transform, or in one product.",
                message="an operand is computed under torch.vmap, and held by no tensor outside",
            )
        if best is None and place.node.target in PRODUCTS and not holders:
            raise Decline(
                "operand-unclear",
                self.holder(node),
                "Compute it in a call of its own: an einsum of two tensors before that of scores.",
                message="an operand is itself a product, made by the call that makes the scores",
            )
        if best is None and (any(map(_puts_in_order, index)) or _runs_out(place, self.ranges)):
            raise Decline(
                "operand-unclear",
                self.holder(node),
                "Put queries and keys in that order before their product, or the output after it.",
                message="scores or weights are put in another order of heads, rows or batches "
                "before they weigh V, as by flip, roll, pad or an index",
            )
        if best is None:
            raise Decline(
                "operand-unclear",
                self.holder(node),
                "Give the product a tensor whose axes are heads, positions and head dimension.",
                message="an operand cannot be seen as [batch, heads, length, head dim] by views",
            )
        return best


def _puts_in_order(i: Expr) -> bool:
    """Whether a place is another than the axes count: backwards, around the end, or read."""
    terms = (x for x in sympy.Add.make_args(i) if x.free_symbols)
    return bool(i.atoms(sympy.Function)) or any(x.could_extract_minus_sign() for x in terms)


def _runs_out(place: Place, ranges: Ranges) -> bool:
    """Whether some of what is read is certainly none of the tensor: rows that were padded."""
    for x, size in zip(place.index, shape_of(place.node), strict=True):
        first, last = bounds(x, ranges) or (sympy.S.Zero, sympy.S.Zero)
        if first.is_negative or sympy.expand(size - 1 - last).is_negative:
            return True
    return False
