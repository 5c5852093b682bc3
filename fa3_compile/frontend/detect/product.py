"""The products of queries and keys that scores are made of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.dynamo.sizes import UnknownScalar
from fa3_compile.frontend.lift.lift import Index, Lifter, Opaque, shape_of, sym
from fa3_compile.frontend.lift.placeholders import D
from fa3_compile.frontend.shadow.trace import SIZES
from fa3_compile.spec.expr import KV, Expr, S, depends_on
from fa3_compile.spec.index import is_nonnegative, same

aten = torch.ops.aten
PLAIN = (aten.bmm.default, aten.mm.default)
ADDING = (aten.baddbmm.default, aten.addmm.default)
PRODUCTS = (*PLAIN, *ADDING)


def sides_of(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two tensors that a product contracts."""
    left, right = node.args[:2] if node.target in PLAIN else node.args[1:3]
    return left, right  # pyright: ignore[reportReturnType]


def factors_of(node: fx.Node, lifter: Lifter | None = None) -> tuple[Expr, Expr]:
    """(beta, alpha) of beta * added + alpha * product; a number that changes is a read of
    `lifter`'s, and `Opaque` without one."""
    if node.target in PLAIN:
        return sym(0), sym(1)
    given = [node.kwargs.get(name, 1) for name in ("beta", "alpha")]
    if lifter is not None:
        beta, alpha = (lifter.broadcast(x, ()) for x in given)
        return beta, alpha
    try:
        beta, alpha = map(sym, given)
    except UnknownScalar as unknown:
        raise Opaque(node, str(unknown)) from unknown
    return beta, alpha


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
            if current.target in ADDING:
                queue.append(current.args[0])
            continue
        queue.extend(() if current.target in SIZES else current.all_input_nodes)
    return found


def several_elements() -> Decline:
    """The decline of scores that are a function of several products, and not of their sum."""
    return Decline(
        "product-read-twice",
        None,
        "Let each score depend on its own query and key alone.",
        message="one score is made of several elements of Q K^T",
    )


@dataclass(frozen=True)
class Dot:
    """One element of a product, as the scores read it.

    A matrix product may have the keys of every batch as rows of one side, one batch behind the
    other, as `matmul(queries, keys)` does of one table of queries: `keys_of_batch` is how many of
    them are one batch's.
    """

    node: fx.Node
    index: Index
    keys_of_batch: Expr | None = None

    @property
    def width(self) -> Expr:
        """How many elements the contracted axis has."""
        return shape_of(sides_of(self.node)[0])[-1]

    @property
    def keys(self) -> Expr:
        """How many keys the product has."""
        if self.keys_of_batch is not None:
            return self.keys_of_batch
        return shape_of(self.node)[-2 if depends_on(self.index[-2], [KV]) else -1]

    def has_keys(self, count: Expr) -> bool:
        """Whether the product has so many keys from the first that is read: all, or a slice."""
        found = [x for x in self.index[-2:] if depends_on(x, [KV])]
        first = _first_key(found[0]) if len(found) == 1 else None
        if first is None or self.keys_of_batch is not None:
            return same(self.keys, count)
        return is_nonnegative(self.keys - first - count)

    @property
    def is_dot(self) -> bool:
        """Whether it is of one query and one key."""
        keys = [x for x in self.index[-2:] if depends_on(x, [KV])]
        plain = len(keys) == 1 and _first_key(keys[0]) is not None
        alone = plain or self.keys_of_batch is not None
        return alone and not any(depends_on(x, [KV]) for x in self.index[:-2])

    def sides(self, d: Expr = D):
        """((Q node, its index), (K node, its index)) with d the place on the contracted axis."""
        left, right = sides_of(self.node)
        *batch, row, column = self.index
        queries = (left, (*batch, row, d))
        keys = (right, (*batch, d, column))
        return (keys, queries) if depends_on(row, [KV]) else (queries, keys)


def _first_key(x: Expr) -> Expr | None:
    """Where the keys begin that are read one after another; None of any other reading."""
    first = sympy.expand(x - KV)
    return first if first.is_Integer and first >= 0 else None


class Products:
    """Candidates for Q K^T, and where each is read: the element rules of their nodes.

    The first read of the first node is `s`; every other read has a symbol of its own.

    batches  the axes of the product with V that are not its rows or columns
    """

    def __init__(self, nodes: Sequence[fx.Node], batches: set[sympy.Symbol]):
        self.nodes, self.batches = [*nodes], batches
        self.lifter: Lifter | None = None
        self.dots: dict[Dot, sympy.Symbol] = {}

    @property
    def rules(self) -> dict[fx.Node, Callable[[Index], Expr]]:
        """What `Lifter` takes as `special`."""
        return {node: functools.partial(self._element, node) for node in self.nodes}

    def _element(self, node: fx.Node, index: Index) -> Expr:
        beta, alpha = factors_of(node, self.lifter)
        scaled = alpha * self._symbol(Dot(node, index, self._keys_of_batch(index)))
        if beta == 0:
            return scaled
        assert self.lifter is not None
        return beta * self.lifter.broadcast(node.args[0], index) + scaled

    def _keys_of_batch(self, index: Index) -> Expr | None:
        """How many keys a batch has, where `index` is of a row or column for each batch and key."""
        *batch, row, column = index
        keyed = [x for x in (row, column) if depends_on(x, [KV])]
        if any(x.free_symbols for x in batch) or len(keyed) != 1 or keyed[0] == KV:
            return None
        assert self.lifter is not None
        ranges = self.lifter.ranges
        first = sympy.expand(keyed[0] - KV)
        others = first.free_symbols & {*ranges}
        from_zero = first.subs(dict.fromkeys(others, 0)) == 0
        return ranges[KV] if from_zero and others <= self.batches else None

    def _symbol(self, dot: Dot) -> sympy.Symbol:
        if dot not in self.dots:
            first = dot.node is self.nodes[0] and S not in self.dots.values()
            name = f"{S}_{len(self.dots)}"
            self.dots[dot] = S if first else sympy.Symbol(name, real=True)
        return self.dots[dot]

    def biases(self) -> list[fx.Node]:
        """The nodes behind the first that are read otherwise than by one query and one key."""
        return [n for n in self.nodes[1:] if any(d.node is n and not d.is_dot for d in self.dots)]

    def check(self, at: fx.Node) -> None:
        """`Decline` at `at` if a read is not of one query and one key, or there is none."""
        if S not in self.dots.values():
            raise Decline(
                "no-product",
                at,
                "Take the softmax of a product of queries and keys.",
                message="the scores are not made of the product before them",
            )
        if not all(dot.is_dot for dot in self.dots):
            if len(self.dots) > 1:
                raise several_elements()
            if any(_mixes_scores(dot) for dot in self.dots):
                raise Decline(
                    "product-axes",
                    at,
                    "Mix heads after the product with V; heads that are mixed before the softmax "
                    "have no fused kernel.",
                    message="the scores of several heads are mixed by a product before the "
                    "softmax, so that each weight is made of every head's (talking heads)",
                )
            raise Decline(
                "product-axes",
                at,
                "One side of the product has to be indexed by the key alone.",
                message="the product before the softmax is not indexed by query and key",
            )


def _mixes_scores(dot: Dot) -> bool:
    """Whether a product is none of queries and keys, but of scores: one of its sides has them as
    rows, query and key together, and is as large as the product that it is made of."""
    of_keys = [x for x in dot.index[-2:] if depends_on(x, [KV])]
    if len(of_keys) != 1 or len(of_keys[0].free_symbols) < 2:
        return False
    sides = [(x, before) for x in sides_of(dot.node) for before in products_before(x)]
    return any(same(sympy.Mul(*shape_of(x)), sympy.Mul(*shape_of(y))) for x, y in sides)
