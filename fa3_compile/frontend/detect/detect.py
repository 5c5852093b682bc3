"""Reading attention: softmax(f(Q K^T)) V, whatever lies between and around the two products.

Everything is expressed in the axes of the output node. Its element leads back to the product
with V, that to elements of softmaxes, those to scores, and those to the product with K; the
operands' indices then say which axes are batch, heads, queries and keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import sympy
from torch import fx

import fa3_compile.frontend.lift.elements  # noqa: F401  (registers the element rules)
from fa3_compile.errors import NOTHING, Decline
from fa3_compile.frontend.detect.find_operands import OperandFinder, axis_symbol, find_split
from fa3_compile.frontend.detect.logsumexp import Lse, statistics
from fa3_compile.frontend.detect.operands import (
    UNIT_PRODUCT,
    is_movement,
    step_back,
    unit_rows,
)
from fa3_compile.frontend.detect.parts import Part, side_by_side
from fa3_compile.frontend.detect.product import factors_of, several_elements, sides_of
from fa3_compile.frontend.detect.scores import Scores, read_scores
from fa3_compile.frontend.detect.skeletons import Skeleton, added, products_after
from fa3_compile.frontend.detect.weights import Term, Weights, weights
from fa3_compile.frontend.dynamo.products import leads_to_a_product
from fa3_compile.frontend.lift.captured import Captured, Seed
from fa3_compile.frontend.lift.lift import (
    Index,
    Opaque,
    declined,
    descendants,
    shape_of,
)
from fa3_compile.frontend.lift.placeholders import D
from fa3_compile.frontend.reasons.near_softmax import another_axis, split_by_a_size
from fa3_compile.frontend.reasons.unheld_output import not_held
from fa3_compile.frontend.region import Operand, Pair, operands_of
from fa3_compile.frontend.shadow.normalize import Softmax
from fa3_compile.frontend.shadow.trace import Shadow
from fa3_compile.spec.expr import KV, Expr, S, depends_on, floordiv, loads_in, mod, uniform
from fa3_compile.spec.index import quotient, same
from fa3_compile.spec.unnormalised import is_nonnegative_weight


@dataclass
class Reading:
    """One attention of a skeleton, in atomic axes of its output."""

    skeleton: Skeleton
    axes: list[list[sympy.Symbol]]
    sizes: dict[sympy.Symbol, Expr]
    # The index of the product with V without its column, which is the head dimension.
    rows: Index
    head_dim: Expr
    key_length: Expr
    term: Term
    scores: Scores
    pairs: list[Pair]
    value: Operand
    # What else V is weighed by, and added to this attention's output.
    beside: Expr = sympy.S.Zero
    score: Expr = S
    # What the loads of score, sinks, weight and coefficient read.
    loads: list[Captured | Seed] = field(default_factory=list)
    dropouts: list[fx.Node] = field(default_factory=list)
    statistics: list[Lse] = field(default_factory=list)

    @property
    def operands(self) -> list[Operand]:
        """The queries and keys of every pair, and V, part by part."""
        return operands_of(self.pairs, self.value)

    @property
    def largest_s(self) -> float | None:
        """What |s| cannot exceed, where both operands are normalised."""
        rows = [x for pair in self.pairs for x in (pair.query, *pair.key.parts)]
        unit = all(unit_rows(x.place, D) for x in rows)
        return UNIT_PRODUCT if unit and len(self.pairs) == 1 else None


class _Split(Exception):
    """An axis has to be split before the skeleton can be read."""

    def __init__(self, symbol: sympy.Symbol, inner: Expr):
        self.symbol, self.inner = symbol, inner


def read(shadow: Shadow, skeleton: Skeleton, *, joins: bool) -> list[Reading]:
    """The skeleton's attentions, whose sum is its output. `Decline` where it is none.

    joins  whether scores that are a sum of products are read as one product
    """
    first: Decline | None = None
    alone = [[s] for s in reversed(skeleton.softmaxes)]
    together = [skeleton.softmaxes] if len(alone) > 1 else []
    mixed = [[*skeleton.softmaxes, *skeleton.added]] if skeleton.added else []
    for softmaxes in (*together, *alone, *([x] for x in skeleton.plain), *mixed):
        try:
            return _read(shadow, skeleton, softmaxes, joins)
        except Decline as decline:
            first = first or decline
    assert first is not None
    raise first


def check_not_attended(readings: Sequence[Reading], attended: set[fx.Node]) -> None:
    """`Decline` where weights without a softmax are a function of an earlier attention's output,
    which the rewrite has at hand: f(out) U is then a layer, and W V no product of queries and keys.
    """
    for reading in readings:
        products = {dot.node for dot in reading.scores.dots}
        if products & attended and not reading.term.softmax.normalizes:
            raise Decline(
                "product-chain",
                reading.skeleton.output,
                NOTHING,
                message="the scores are the output of another attention",
            )


def _read(
    shadow: Shadow, skeleton: Skeleton, softmaxes: Sequence[Softmax], joins: bool
) -> list[Reading]:
    output = shadow.aten_of.get(skeleton.output)
    if output is None:
        raise not_held(shadow, skeleton)
    shape = shape_of(output)
    if any(size == 0 for s in softmaxes for size in (*shape, *shape_of(s.scores))):
        raise Decline("empty", skeleton.output, NOTHING, message="there is nothing to compute")
    axes: list[list[sympy.Symbol]] = []
    sizes: dict[sympy.Symbol, Expr] = {}
    for i, size in enumerate(shape):
        symbols = [] if size == 1 else [axis_symbol(f"y{i}")]
        axes.append(symbols)
        sizes.update(dict.fromkeys(symbols, size))
    for _ in range(16):
        try:
            return _Reader(shadow, skeleton, softmaxes, output, axes, sizes, joins).read()
        except Opaque as opaque:
            raise declined(opaque, shadow) from opaque
        except _Split as split:
            symbol, inner = split.symbol, split.inner
        outer_axis, inner_axis = axis_symbol(f"{symbol.name}o"), axis_symbol(f"{symbol.name}i")
        count = quotient(sizes.pop(symbol), inner)
        assert count is not None
        sizes |= {outer_axis: count, inner_axis: inner}
        axes = [
            [x for a in dim for x in ([outer_axis, inner_axis] if a == symbol else [a])]
            for dim in axes
        ]
    raise Decline(
        "axes-unclear",
        skeleton.output,
        "Reshape heads and batch with fixed sizes.",
        message="the axes of the product with V cannot be told apart",
    )


class _Reader:
    """One reading of a skeleton, with its axes split as far as is known by now."""

    def __init__(self, shadow: Shadow, skeleton: Skeleton, softmaxes, output, axes, sizes, joins):
        self.shadow, self.skeleton, self.softmaxes = shadow, skeleton, softmaxes
        self.output, self.axes, self.sizes, self.joins = output, axes, dict(sizes), joins
        self.ranges: dict[sympy.Symbol, Expr] = dict(sizes)
        # The index at which the output is divided by the sums of its rows, if it is.
        self.divided_at: Index | None = None

    def read(self) -> list[Reading]:
        index = self._product_index()
        if self.skeleton.total is None:
            found = [self._part(self.skeleton.values, index)]
        else:
            addends = self._addends(self.skeleton.total, index)
            found = side_by_side([self._part(node, at) for node, at in addends])
        first = found[0]
        self._check_beside([x.weights for x in found])
        self.ranges[KV] = key_length = sum((x.keys for x in found), sympy.S.Zero)
        batches = {a for i in first.batch for a in i.free_symbols}
        readings = []
        for term in first.weights.terms:
            term.divided_at = self.divided_at
            self._check_axis(term, first.column)
            scores = read_scores(
                self.shadow, term, batches, self.ranges, self._node, first.weights, self.joins
            )
            self._check_apart(first.weights, scores)
            if not term.softmax.normalizes:
                scores.score = term.merge_into(scores.score)
                for dot in scores.dots:
                    self._check_dropout(term, scores.score, dot.index, first.column)
            finder = OperandFinder(
                self.shadow, self.skeleton.output, self.sizes, self.ranges, self._node
            )
            dtype = self.output.meta["val"].dtype
            values = [(x.values, x.values_index, x.keys) for x in found]
            pairs, value, factor = finder.find(scores, values, dtype)
            term.coefficient *= first.alpha
            readings.append(
                Reading(
                    self.skeleton,
                    self.axes,
                    self.sizes,
                    rows=(*first.batch, first.row),
                    head_dim=first.column,
                    key_length=key_length,
                    term=term,
                    scores=scores,
                    pairs=pairs,
                    value=value,
                    beside=sympy.S.Zero if readings else first.alpha * first.weights.beside,
                    score=scores.score.subs(S, factor * S) if factor != 1 else scores.score,
                    loads=scores.lifter.loads,
                    dropouts=[*first.weights.dropouts, *scores.lifter.dropouts],
                    statistics=self._statistics(term, scores),
                )
            )
        for r in readings:
            self._split(i for x in r.operands for i in x.place.index)
        return readings

    def _check_beside(self, parts: Sequence[Weights]) -> None:
        """What stands beside the softmaxes is of one V, and is made of none that are unread."""
        beside = parts[0].beside
        unread = descendants(s.node for s in self.skeleton.softmaxes if s not in self.softmaxes)
        read = (parts[0].loads[x.tensor] for x in loads_in(beside))
        made_of_them = any(
            isinstance(x, Captured) and self.shadow.aten_of.get(x.source) in unread for x in read
        )
        alone = len(parts) == 1 and self.divided_at is None and not made_of_them
        if any(x.beside != 0 for x in parts) and not alone:
            raise _added_to_softmax(self.skeleton, beside)

    def _check_apart(self, parts: Weights, scores: Scores) -> None:
        """What stands beside the softmaxes is taken as the program has it, and not made of their
        scores, which nothing computes then."""
        computed = descendants(dot.node for dot in scores.dots)
        read = (parts.loads[x.tensor] for x in loads_in(parts.beside))
        holders = (self.shadow.aten_of.get(x.source) for x in read if isinstance(x, Captured))
        if any(x in computed for x in holders):
            raise _added_to_softmax(self.skeleton, parts.beside)

    def _part(self, product: fx.Node, index: Index) -> Part:
        """The product with V, or with a part of it, read at [index]."""
        beta, alpha = factors_of(product)
        if beta != 0:
            raise Decline(
                "product-adds",
                self._node(product),
                "Add the other tensor to the attention's output.",
                message="the product with V adds another tensor to its result",
            )
        self._split(index)
        left, right = sides_of(product)
        keys_first = self._weights_are_right(left, right)
        side, values = (right, left) if keys_first else (left, right)
        keys = shape_of(side)[-2 if keys_first else -1]
        if keys == 1 and self.skeleton.total is None:
            raise Decline(
                "single-key", self.skeleton.output, NOTHING, message="there is only one key"
            )
        self.ranges[KV] = keys
        *batch, row, column = index
        if keys_first:
            row, column = column, row
        found = weights(
            self.shadow,
            self.softmaxes,
            side,
            (*batch, KV, row) if keys_first else (*batch, row, KV),
            self.ranges,
            at=self._node(side),
            read_at=self.skeleton.output,
        )
        values_index = (*batch, column, KV) if keys_first else (*batch, KV, column)
        return Part(tuple(batch), row, column, keys, values, values_index, found, alpha)

    def _addends(self, node: fx.Node, index: Index) -> list[tuple[fx.Node, Index]]:
        """The products that a sum of products is made of, each with its index."""
        if node in self.skeleton.parts:
            return [(node, index)]
        if is_movement(node):
            return self._addends(*step_back(node, index, self.ranges))
        terms = added(node)
        if any(shape_of(x) != shape_of(node) for x in terms):
            raise several_elements()
        return [found for x in terms for found in self._addends(x, index)]

    def _statistics(self, term: Term, scores: Scores) -> list[Lse]:
        if scores.less_row_terms:
            return []
        nonnegative = is_nonnegative_weight(scores.score)
        dots = [dot.node for dot in scores.dots]
        return statistics(
            self.shadow, term.softmax, term.at, self.sizes, dots, nonnegative=nonnegative
        )

    def _split(self, indices) -> None:
        if found := find_split(indices, self.sizes):
            raise _Split(*found)

    def _node(self, aten_node: fx.Node) -> fx.Node:
        holders = self.shadow.dynamo_of.get(aten_node)
        return holders[0] if holders else self.skeleton.output

    def _product_index(self) -> Index:
        index: Index = tuple(sympy.expand(_mixed_radix(axes, self.ranges)) for axes in self.axes)
        node = self.output
        division = self.softmaxes[0].division
        while node is not (self.skeleton.total or self.skeleton.values):
            if division is not None and node is division.node:
                self.divided_at, node = index, division.top
                index = index[len(index) - len(shape_of(node)) :]
                continue
            if not is_movement(node):
                raise not_held(self.shadow, self.skeleton)
            node, index = step_back(node, index, self.ranges)
        return index

    def _weights_are_right(self, left: fx.Node, right: fx.Node) -> bool:
        reached = descendants(s.node for s in self.softmaxes)
        if left in reached and right in reached:
            raise Decline(
                "weights-on-both-sides",
                self.skeleton.output,
                "V may not depend on the weights that it is weighed by.",
                message="both sides of the product are made of the softmax",
            )
        return right in reached

    def _check_axis(self, term: Term, column: Expr) -> None:
        """The softmax runs over the keys, and its rows are the output's."""
        at, dim = term.at, term.softmax.dim
        others = [x for d, x in enumerate(at) if d != dim]
        summed = term.softmax.summed if term.softmax.by_hand else None
        several = summed is not None and len(summed.args[1]) > 1  # pyright: ignore
        adds_up = any(depends_on(x, [KV]) for x in others)
        if (
            several
            or adds_up
            or depends_on(at[dim] - KV, self.ranges)
            or any(depends_on(x, column.free_symbols) for x in at)
        ):
            if any(not x.args[1].is_Integer for i in at for x in i.atoms(floordiv, mod)):
                raise split_by_a_size(self._node(term.softmax.node))
            raise another_axis(
                self._node(term.softmax.node),
                reordered=not (several or adds_up) and self._reorders_keys(at[dim]),
                several=several or depends_on(at[dim], [KV]),
                adds_up=adds_up and not several and depends_on(at[dim], [KV]),
                mixes=self._leads_to_v(shape_of(term.softmax.node)[dim]),
            )
        self._check_dropout(term, term.weight, at, column)

    def _reorders_keys(self, place: Expr) -> bool:
        """Whether keys are counted backwards, or from another than the first on around the end."""
        around = any(same(x.args[1], self.ranges[KV]) for x in place.atoms(mod))
        return place.free_symbols & {*self.ranges} == {KV} and (around or place.coeff(KV) == -1)

    def _leads_to_v(self, keys: Expr) -> bool:
        """Whether what is read as the output is weights of as many keys, which weigh another V."""
        after = products_after(self.shadow, self.skeleton.values)
        shape = self.output.meta["val"].shape
        if not after and any(same(x, keys) for x in shape_of(self.output)):
            return leads_to_a_product(self.skeleton.output, shape)
        return any(same(shape_of(x)[d], keys) for p in after for x, d in zip(sides_of(p), (-1, -2)))

    def _check_dropout(self, term: Term, weight: Expr, at: Index, column: Expr) -> None:
        """Each weight is dropped for itself, if `at` is where it was read before its dropout."""
        rows = {a for axes in self.axes for a in axes} - column.free_symbols
        if weight.has(uniform) and not rows <= {a for x in at for a in x.free_symbols}:
            raise Decline(
                "dropout-shared",
                self._node(term.softmax.node),
                "Expand the weights before their dropout.",
                message="several heads share one dropout of their weights",
            )


def _added_to_softmax(skeleton: Skeleton, beside: Expr) -> Decline:
    return Decline(
        "softmax-result-changed",
        skeleton.output,
        "Weigh V by each of what is added up alone, and add the results.",
        message=f"V is weighted by a softmax and by {beside}",
    )


def _mixed_radix(axes: list[sympy.Symbol], sizes) -> Expr:
    position = sympy.S.Zero
    for axis in axes:
        position = position * sizes[axis] + axis
    return position
