"""Finding attention: softmax(f(Q K^T)) V, whatever lies between and around the two products.

Everything is expressed in the axes of the output node. Its element leads back to the product
with V, that to an element of the softmax, that to the score, and that to the product with K;
the operands' indices then say which axes are batch, heads, queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import sympy
import torch
from torch import fx

import fa3_compile.frontend.elements  # noqa: F401  (registers the element rules)
from fa3_compile.errors import Decline
from fa3_compile.frontend.dynamo_graph import is_mutation, overwrite
from fa3_compile.frontend.lift import (
    Index,
    Lifter,
    Opaque,
    declined,
    descendants,
    number,
    shape_of,
    sym,
)
from fa3_compile.frontend.logsumexp import Lse, statistics
from fa3_compile.frontend.normalize import Softmax, row_maximum, softmaxes
from fa3_compile.frontend.operands import is_movement, origins, step_back, view_of
from fa3_compile.frontend.region import Operand
from fa3_compile.frontend.trace import Shadow
from fa3_compile.spec.expr import KV, Expr, S, depends_on, floordiv, mod, where
from fa3_compile.spec.index import quotient, same, simplify_index

aten = torch.ops.aten
PRODUCTS = (aten.bmm.default, aten.mm.default, aten.baddbmm.default, aten.addmm.default)
# The contracted axis of Q K^T.
D = sympy.Symbol("d", integer=True, nonnegative=True)


class prob(sympy.Function):
    """An element of the softmax; its index stands in for the softmax's own axes."""

    is_real = True


class row_max(sympy.Function):
    """An element of a row statistic, on which a softmax does not depend."""

    is_real = True


@dataclass
class Skeleton:
    """The two products around a softmax."""

    softmax: Softmax
    values: fx.Node
    output: fx.Node

    def softmax_holder(self, shadow: Shadow) -> fx.Node:
        """The Dynamo node of the softmax, the line that its reader would call the attention."""
        holders = shadow.dynamo_of.get(self.softmax.node)
        return holders[0] if holders else shadow.within.get(self.softmax.node, self.output)


@dataclass
class Reading:
    """A skeleton read in atomic axes of its output."""

    axes: list[list[sympy.Symbol]]
    sizes: dict[sympy.Symbol, Expr]
    rows: Index = ()
    head_dim: Expr = sympy.S.Zero
    score: Expr = S
    sinks: list[Expr] = field(default_factory=list)
    dead_rows_zero: bool = False
    product: fx.Node | None = None
    query: Operand | None = None
    key: Operand | None = None
    value: Operand | None = None
    key_length: Expr = sympy.S.One
    statistics: list[Lse] = field(default_factory=list)
    loads: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)


def skeletons(shadow: Shadow) -> Iterator[Skeleton]:
    """Every softmax whose result is contracted with something, and by which product."""
    for softmax in softmaxes(shadow):
        for product in _productsafter(shadow, softmax.node):
            output = _output_node(shadow, product)
            # Without a product before it (a router) a softmax is no attention at all.
            if output is not None and products_before(softmax.scores):
                yield Skeleton(softmax, product, output)


def _productsafter(shadow: Shadow, node: fx.Node) -> list[fx.Node]:
    found, stack, seen = [], [node], set()
    while stack:
        current = stack.pop()
        for user in shadow.users(current):
            if user in seen:
                continue
            seen.add(user)
            if user.target in PRODUCTS:
                found.append(user)
            elif isinstance(user.meta.get("val"), torch.Tensor) or user.target is not None:
                if user.op == "call_function":
                    stack.append(user)
    order = {n: i for i, n in enumerate(shadow.graph.nodes)}
    return sorted(found, key=order.__getitem__)[:1]


def _output_node(shadow: Shadow, product: fx.Node) -> fx.Node | None:
    """The last Dynamo node that is still only the product's elements moved."""
    current, chosen = product, None
    while True:
        holders = shadow.dynamo_of.get(current, [])
        if holders:
            chosen = holders[-1]
        followers = shadow.users(current)
        outside = {u for h in holders for u in h.users} - set(holders)
        if len(followers) != 1:
            return chosen
        following = followers[0]
        if not is_movement(following) or following.target is aten.expand.default:
            return chosen
        if following.target in (aten.slice.Tensor, aten.select.int):
            return chosen
        ahead = set(_dynamo_ahead(shadow, following))
        if holders and (not outside <= ahead or any(is_mutation(u) for u in outside)):
            return chosen
        current = following


def _dynamo_ahead(shadow: Shadow, node: fx.Node) -> list[fx.Node]:
    """The first Dynamo nodes that hold what a chain of movements leads to."""
    while True:
        holders = shadow.dynamo_of.get(node)
        if holders:
            return holders
        followers = shadow.users(node)
        if len(followers) != 1 or not is_movement(followers[0]):
            return []
        node = followers[0]


def read(shadow: Shadow, skeleton: Skeleton) -> Reading:
    """The skeleton in atomic axes of its output. `Decline` where it is no attention."""
    output = shadow.aten_of[skeleton.output]
    shape = shape_of(output)
    if any(size == 0 for size in (*shape, *shape_of(skeleton.softmax.scores))):
        raise Decline("empty", skeleton.output, message="there is nothing to compute")
    axes: list[list[sympy.Symbol]] = []
    sizes: dict[sympy.Symbol, Expr] = {}
    for i, size in enumerate(shape):
        symbols = [] if size == 1 else [_axis(f"y{i}")]
        axes.append(symbols)
        sizes.update(dict.fromkeys(symbols, size))
    for _ in range(16):
        try:
            reading = _Reader(shadow, skeleton, output, axes, sizes).read()
        except Opaque as opaque:
            raise declined(opaque, shadow) from opaque
        split = needed_split(reading)
        if split is None:
            return reading
        symbol, inner = split
        outer_axis, inner_axis = _axis(f"{symbol.name}o"), _axis(f"{symbol.name}i")
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


def _axis(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, nonnegative=True)


def needed_split(reading: Reading) -> tuple[sympy.Symbol, Expr] | None:
    """An axis that some index divides, and by what."""
    sizes = reading.sizes
    operands = [reading.query, reading.key, reading.value]
    indices = [i for operand in operands if operand for i in operand.place.index]
    return find_split((*indices, *reading.rows), sizes)


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
                part = quotient(by, stride) if stride.is_positive else None
                if part is not None and part != 1 and quotient(sizes[symbol], part) is not None:
                    if not same(part, sizes[symbol]):
                        found.append((symbol, part))
    found.sort(key=lambda pair: (pair[0].name, str(pair[1])))
    return found[0] if found else None


class _Reader:
    """One reading of a skeleton, with its axes split as far as is known by now."""

    def __init__(self, shadow: Shadow, skeleton: Skeleton, output, axes, sizes):
        self.shadow, self.skeleton, self.output, self.axes = shadow, skeleton, output, axes
        contracted = skeleton.values.args
        self.contraction = 1 if skeleton.values.target in PRODUCTS[:2] else 2
        self.left, self.right = contracted[-2:] if self.contraction == 1 else contracted[1:3]
        self.reading = Reading(axes, dict(sizes))
        self.ranges: dict[sympy.Symbol, Expr] = dict(sizes)

    def read(self) -> Reading:
        reading = self.reading
        product_index = self._product_index()
        reading.rows = product_index
        if needed_split(reading):
            return reading
        softmax, x = self.skeleton.softmax, self.skeleton.softmax.scores
        keys_first = self._weights_are_right()
        weights, values = (self.right, self.left) if keys_first else (self.left, self.right)
        reading.key_length = shape_of(weights)[-2 if keys_first else -1]
        if reading.key_length == 1:
            raise Decline("single-key", self.skeleton.output, message="there is only one key")
        self.ranges[KV] = reading.key_length
        row, column = product_index[-2], product_index[-1]
        if keys_first:
            row, column = column, row
        batch = product_index[:-2]
        weights_index = (*batch, KV, row) if keys_first else (*batch, row, KV)
        values_index = (*batch, column, KV) if keys_first else (*batch, KV, column)
        at = self._softmax_index(weights, weights_index, column)
        scores_index, extra = self._scores_index(at, x, softmax.dim)
        product, lifter = self._find_product(x, scores_index)
        reading.rows = (*batch, row)
        reading.head_dim = column
        element = lifter.element(x, scores_index)
        reading.score = self._without_row_maxima(number(element), x)
        for position in extra:
            index = (*scores_index[: softmax.dim], position, *scores_index[softmax.dim + 1 :])
            sink = self._without_row_maxima(number(lifter.element(x, index)), x)
            if depends_on(sink, [S, KV]):
                raise Decline("weights-partly-used", self._node(x), "")
            reading.sinks.append(sink)
        reading.score = simplify_index(reading.score, self.ranges)
        reading.sinks = [simplify_index(x, self.ranges) for x in reading.sinks]
        reading.statistics = statistics(
            self.shadow, x, softmax.dim, scores_index, self.reading.sizes
        )
        self._operands(lifter, product, values, values_index)
        reading.loads, reading.product = lifter.loads, product.node
        return reading

    def _node(self, aten_node: fx.Node) -> fx.Node:
        holders = self.shadow.dynamo_of.get(aten_node)
        return holders[0] if holders else self.skeleton.output

    def _product_index(self) -> Index:
        index: Index = tuple(sympy.expand(_mixed_radix(axes, self.ranges)) for axes in self.axes)
        node = self.output
        while node is not self.skeleton.values:
            if not is_movement(node):
                raise Decline("output-unclear", self.skeleton.output, "")
            node, index = step_back(node, index, self.ranges)
        return index

    def _weights_are_right(self) -> bool:
        reached = after(self.skeleton.softmax.node)
        left, right = self.left in reached, self.right in reached
        if left and right:
            raise Decline("weights-on-both-sides", self.skeleton.output, "")
        return right

    def _softmax_index(self, weights: fx.Node, index: Index, column: Expr) -> Index:
        """Which element of the softmax multiplies V[kv]."""
        softmax = self.skeleton.softmax
        special = {softmax.node: lambda i: prob(*i)}
        lifter = Lifter(self.shadow, self.ranges, special)
        element = lifter.element(weights, index)
        hint = "Apply what follows the softmax to its output instead, or inside the score."
        element = number(element)
        if isinstance(element, where) and isinstance(element.args[1], prob):
            if element.args[2] == 0:
                raise Decline(
                    "mask-after-softmax",
                    self._node(weights),
                    "Mask the scores, before the softmax.",
                    message="weights are set to zero after the softmax",
                )
        if not isinstance(element, prob):
            code = "softmax-result-changed" if element.atoms(prob) else "no-softmax"
            raise Decline(code, self._node(weights), hint, message=f"V is weighted by {element}")
        if lifter.zeroed:
            self.reading.dead_rows_zero = True
        at = tuple(element.args)
        others = [x for d, x in enumerate(at) if d != softmax.dim]
        if any(depends_on(x, [KV]) for x in others):
            raise Decline(
                "softmax-axis",
                self._node(softmax.node),
                "The softmax has to run over the keys, the axis contracted with V.",
                message="the softmax runs over another axis than the product with V",
            )
        if depends_on(at[softmax.dim] - KV, self.ranges) or any(
            depends_on(x, column.free_symbols) for x in at
        ):
            raise Decline(
                "softmax-axis",
                self._node(softmax.node),
                "The softmax has to run over the keys, the axis contracted with V.",
                message="the softmax runs over another axis than the product with V",
            )
        return at

    def _scores_index(self, at: Index, x: fx.Node, dim: int) -> tuple[Index, list[Expr]]:
        """The scores' index, and the positions along the softmax that V does not see."""
        offset = sympy.expand(at[dim] - KV)
        size = shape_of(x)[dim]
        rest = sympy.expand(size - self.reading.key_length)
        if rest == 0:
            return at, []
        if not (offset.is_Integer and rest.is_Integer and 0 <= offset <= rest <= 4):
            raise Decline(
                "weights-partly-used", self._node(x), "V has to weigh every key of the softmax."
            )
        length = self.reading.key_length
        before = [sympy.Integer(i) for i in range(int(offset))]
        after = [length + offset + i for i in range(int(rest - offset))]
        return at, [*before, *after]

    def _find_product(self, x: fx.Node, index: Index) -> tuple[_Product, Lifter]:
        """The product that is Q K^T: its row is a query, its column is the key."""
        candidates = products_before(x)
        if not candidates:
            raise Decline("no-product", self._node(x), "")
        first: Exception | None = None
        for node in candidates:
            product = _Product(node)
            try:
                return product, self._lift_around(product, x, index)
            except Opaque as opaque:
                first = first or declined(opaque, self.shadow)
            except Decline as decline:
                first = first or decline
        assert first is not None
        raise first

    def _lift_around(self, product: _Product, x: fx.Node, index: Index) -> Lifter:
        """A lifter that has met the product once, in the scores' element."""
        computed = after(product.node)
        special = {
            node: lambda i: row_max(*i)
            for node in self.shadow.graph.nodes
            if row_maximum(node) and node in computed
        }
        lifter = Lifter(
            self.shadow,
            self.ranges,
            {**special, product.node: product},
            wide=_is_wide(product.node),
            read_at=self.skeleton.output,
        )
        product.lifter = lifter
        lifter.element(x, index)
        product.check(self._node(product.node))
        return lifter

    def _without_row_maxima(self, score: Expr, x: fx.Node) -> Expr:
        for statistic in sorted(score.atoms(row_max), key=str):
            # Expanding would multiply out what the program keeps in factors.
            rest = score + statistic
            if rest.has(statistic):
                rest = _less_a_multiple(score, statistic)
            if rest is None or depends_on(statistic, [KV]):
                raise Decline("row-statistic", self._node(x), "")
            score = rest
        return score

    def _operands(self, lifter: Lifter, product, values: fx.Node, values_index: Index) -> None:
        reading = self.reading
        width = shape_of(product.left)[-1]
        self.ranges[D] = width
        (query, query_index), (key, key_index) = product.sides()
        dtype = self.output.meta["val"].dtype
        for casts in (True, False):
            factor = sympy.S.One
            found = []
            for node, index, inner, varying in (
                (query, query_index, D, _row_axes(query_index)),
                (key, key_index, D, {KV}),
                (values, values_index, None, None),
            ):
                operand = self._operand(lifter, node, index, inner, varying, casts)
                found.append(operand)
                factor *= operand.place.factor
            value_dtype = found[2].dtype
            if value_dtype == dtype or not casts:
                break
        reading.query, reading.key, reading.value = found
        reading.score = reading.score.subs(S, factor * S) if factor != 1 else reading.score

    def _operand(self, lifter, node, index, inner, varying, casts) -> Operand:
        best = deeper = None
        best_lost = False
        scaled = inner is not None
        for place in origins(
            node,
            index,
            lifter,
            inner=D,
            casts=casts,
            varying=varying or set(),
        ):
            if not scaled and place.factor != 1:
                break
            if place.cast is not None and (best or deeper):
                break
            holders = self.shadow.dynamo_of.get(place.node)
            if not holders:
                continue
            source, since = holders[0], self.shadow.since[place.node, holders[0]]
            lost = overwrite(source, since, until=self.skeleton.output) is not None
            if best and lost and not best_lost:
                continue
            if any(i.has(floordiv, mod) for i in place.index):
                # K and V of grouped heads: read unexpanded once the heads' axis is split.
                deeper = Operand(source, since, place, None)
                continue
            view = view_of(place, self.ranges)
            if view is not None:
                best, deeper, best_lost = Operand(source, since, place, view), None, lost
        if deeper is not None and find_split(deeper.place.index, self.reading.sizes):
            return deeper
        if best is None:
            raise Decline(
                "operand-unclear",
                self._node(node),
                "Give the product a tensor whose axes are heads, positions and head dimension.",
                message="an operand cannot be seen as [batch, heads, length, head dim] by views",
            )
        return best


def _less_a_multiple(score: Expr, statistic: Expr) -> Expr | None:
    """The score without the -c * statistic in it, for a number c > 0; None where that is not all.

    (x / c - max(x / c)) * c, as CogView scales its scores to keep them in half precision.
    """
    expanded = sympy.expand(score)
    multiple = expanded.coeff(statistic)
    rest = sympy.expand(expanded - multiple * statistic)
    return rest if multiple.is_number and multiple.is_negative and not rest.has(statistic) else None


def _row_axes(index: Index) -> set[sympy.Symbol]:
    return set(index[-2].free_symbols)


def _is_wide(node: fx.Node) -> bool:
    return node.meta["val"].dtype in (torch.float32, torch.float64) and all(
        a.meta["val"].dtype in (torch.float32, torch.float64)
        for a in node.args[-2:]
        if isinstance(a, fx.Node)
    )


def _mixed_radix(axes: list[sympy.Symbol], sizes) -> Expr:
    position = sympy.S.Zero
    for axis in axes:
        position = position * sizes[axis] + axis
    return position


def after(node: fx.Node) -> set[fx.Node]:
    """The node and everything computed from it."""
    return descendants([node])


def products_before(node: fx.Node) -> list[fx.Node]:
    """The products that the scores are made of, nearest first, not looking behind them."""
    found, seen, queue = [], set(), [node]
    while queue:
        current = queue.pop(0)
        if current in seen:
            continue
        seen.add(current)
        if current.target in PRODUCTS:
            found.append(current)
            if current.target in PRODUCTS[2:]:
                queue.append(current.args[0])
            continue
        queue.extend(current.all_input_nodes)
    return found


class _Product:
    """A candidate for Q K^T, and where it is read."""

    def __init__(self, node: fx.Node):
        self.node = node
        added = node.target in PRODUCTS[2:]
        self.left, self.right = node.args[1:3] if added else node.args[:2]
        self.index: Index | None = None
        self.lifter: Lifter | None = None

    def __call__(self, index: Index) -> Expr:
        if self.index is not None and self.index != index:
            raise Decline("product-read-twice", None, "")
        self.index = index
        if self.node.target not in PRODUCTS[2:]:
            return S
        beta, alpha = (sym(self.node.kwargs.get(k, 1)) for k in ("beta", "alpha"))
        scaled = alpha * S
        return scaled if beta == 0 else beta * self._added(index) + scaled

    def _added(self, index: Index) -> Expr:
        assert self.lifter is not None
        return self.lifter.broadcast(self.node.args[0], index)

    def check(self, at: fx.Node) -> None:
        if self.index is None:
            raise Decline("no-product", at, "")
        row, column = self.index[-2:]
        keys = [x for x in (row, column) if depends_on(x, [KV])]
        if keys != [KV] or any(depends_on(x, [KV]) for x in self.index[:-2]):
            raise Decline(
                "product-axes",
                at,
                "One side of the product has to be indexed by the key alone.",
                message="the product before the softmax is not indexed by query and key",
            )

    def sides(self):
        """((Q node, its index), (K node, its index)) with d the contracted axis."""
        assert self.index is not None
        *batch, row, column = self.index
        left = (self.left, (*batch, row, D))
        right = (self.right, (*batch, D, column))
        if row == KV:
            (right_node, right_index), (left_node, left_index) = right, left
            return (right_node, right_index), (left_node, left_index)
        return left, right
