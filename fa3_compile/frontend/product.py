"""The product of queries and keys that scores are made of."""

from __future__ import annotations

import torch
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.lift import Index, Lifter, Opaque, sym
from fa3_compile.frontend.placeholders import D
from fa3_compile.frontend.sizes import UnknownScalar
from fa3_compile.frontend.trace import SIZES
from fa3_compile.spec.expr import KV, Expr, S, depends_on

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


class Product:
    """A candidate for Q K^T, and where it is read: the element rule of its node."""

    def __init__(self, node: fx.Node):
        self.node = node
        self.left, self.right = sides_of(node)
        self.index: Index | None = None
        self.lifter: Lifter | None = None

    def __call__(self, index: Index) -> Expr:
        if self.index is not None and self.index != index:
            raise Decline(
                "product-read-twice",
                None,
                "Let each score depend on its own query and key alone.",
                message="one score is made of several elements of Q K^T",
            )
        self.index = index
        beta, alpha = factors_of(self.node, self.lifter)
        scaled = alpha * S
        return scaled if beta == 0 else beta * self._added(index) + scaled

    def _added(self, index: Index) -> Expr:
        assert self.lifter is not None
        return self.lifter.broadcast(self.node.args[0], index)

    def check(self, at: fx.Node) -> None:
        """`Decline` if the product is not of one query and one key an element."""
        if self.index is None:
            raise Decline(
                "no-product",
                at,
                "Take the softmax of a product of queries and keys.",
                message="the scores are not made of the product before them",
            )
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
        return (right, left) if row == KV else (left, right)
