"""Sums of element-wise products, found: which factors they contract, and along which axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from fa3_compile.frontend.detect.operands import moved
from fa3_compile.frontend.detect.product import sides_of
from fa3_compile.frontend.dynamo.sizes import sym
from fa3_compile.frontend.lift.elements.movement import dimension
from fa3_compile.frontend.lift.lift import shape_of
from fa3_compile.frontend.shadow.varying import holds_floats, varying_axes
from fa3_compile.spec.expr import Expr
from fa3_compile.spec.index import same

aten = torch.ops.aten
SUMS = (aten.sum.dim_IntList, aten.mean.dim)
# A product or a quotient, and what by.
Scale = tuple[Callable[..., torch.Tensor], fx.Node]


@dataclass
class Contraction:
    """`node` is factor * (left * right).sum(summed), times or over each of `scales`. Axes are
    counted from the last, -1, of left * right: those that are summed, that both factors have, and
    that only one has. `whole` has the sizes of that product."""

    node: fx.Node
    whole: fx.Node
    left: fx.Node
    right: fx.Node
    factor: float
    scales: list[Scale]
    summed: list[int]
    both: list[int]
    of_left: list[int]
    of_right: list[int]
    size: dict[int, int | torch.SymInt]

    @property
    def is_of_queries_and_keys(self) -> bool:
        """Whether one factor has an axis of keys that the other one has not. One vector for all
        rows of several batches is a layer's."""
        return bool(self.both) or bool(self.of_left) == bool(self.of_right) or self.has_few_axes

    @property
    def has_few_axes(self) -> bool:
        """Whether the factors have one axis between them beside those that are summed."""
        return len(self.both + self.of_left + self.of_right) == 1

    def weighs(self, weights: set[fx.Node], keys: Expr) -> bool:
        """Whether it is a sum over so many keys of weights times V, which has an axis of its
        own: weights of each feature are none of a product of matrices."""
        sides = ((self.left, self.right, self.of_right), (self.right, self.left, self.of_left))
        own = any(x in weights and y not in weights and alone for x, y, alone in sides)
        return own and len(self.summed) == 1 and same(sym(self.size[self.summed[0]]), keys)


def contraction(node: fx.Node, given: Callable[[fx.Node], bool]) -> Contraction | None:
    """The contraction that a node is; None where it is none of matrices."""
    known: dict[fx.Node, set[int]] = {}
    rows = single_rows(node)
    if rows is not None:
        left, column = rows
        right, whole, summed, factor = _row_of(column, known), left, [-1], 1.0
        scales: list[Scale] = []
    else:
        whole, summed, factor = _summed(node)
        factors = _factors(whole, {*summed}) if summed else None
        if factors is None:
            return None
        left, right, number, scales = factors
        factor *= number
    if not given(left) or not given(right):
        return None
    shape = whole.meta["val"].shape
    size = {d: shape[d] for d in range(-len(shape), 0)}
    a, b = varying_axes(left, known), varying_axes(right, known)
    kept = [d for d in size if d not in summed]
    if any(d not in a or d not in b for d in summed):
        return None
    if any(d not in a | b and not bool(size[d] == 1) for d in kept):
        return None
    both = [d for d in kept if d in a & b]
    of_left, of_right = ([d for d in kept if d in x - y] for x, y in ((a, b), (b, a)))
    if not of_left and not of_right:
        return None
    # An infinite one for a key would make a NaN of its score, and -inf of the product's.
    ranks = [x.meta["val"].dim() for x in (left, right)]
    for _, x in scales:
        if not varying_axes(x, known) <= {*both} or x.meta["val"].dim() > min(ranks):
            return None
    return Contraction(
        node, whole, left, right, factor, scales, summed, both, of_left, of_right, size
    )


def single_rows(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The rows [..., 1, d] and columns [..., d, 1] of `matmul(rows, columns)`, whose batches may
    have the keys, as ProteinMPNN's do."""
    product = node.args[0] if node.target is aten.view.default else None
    if not isinstance(product, fx.Node) or product.target is not aten.bmm.default:
        return None
    rows, columns = (_unflattened(x) for x in sides_of(product))
    before, after, made = (shape_of(x) for x in (rows, columns, node))
    if len(made) < 3 or before[-2] != 1 or after[-1] != 1 or before[-1] == 1:
        return None
    return (rows, columns) if before[:-2] == after[:-2] == made[:-2] else None


def _unflattened(side: fx.Node) -> fx.Node:
    """A side of a product before its batches were made one axis."""
    return moved(side) if side.target is aten.view.default else side


def _row_of(column: fx.Node, known: dict[fx.Node, set[int]]) -> fx.Node:
    """Columns [..., d, 1] as rows [..., 1, d]."""
    with column.graph.inserting_after(column):
        row = column.graph.call_function(aten.transpose.int, (column, -2, -1))
    row.meta["val"] = column.meta["val"].new_empty(column.meta["val"].transpose(-2, -1).shape)
    known[row] = {{-1: -2, -2: -1}.get(d, d) for d in varying_axes(column, known)}
    return row


def _summed(node: fx.Node) -> tuple[fx.Node, list[int], float]:
    """(what a sum or a mean adds up, along which axes, times what); no axes where that is not
    known."""
    whole, *rest = node.args
    assert isinstance(whole, fx.Node)
    dims = rest[0] if rest else None
    shape = whole.meta["val"].shape
    if not isinstance(dims, (list, tuple)) or not _widens(whole, node):
        return whole, [], 1.0
    summed = sorted(dimension(d, len(shape)) - len(shape) for d in dims)  # pyright: ignore
    if node.target is not aten.mean.dim:
        return whole, summed, 1.0
    count = math.prod(shape[d] for d in summed)
    return (whole, summed, 1 / count) if isinstance(count, int) and count else (whole, [], 1.0)


def _factors(node: fx.Node, summed: set[int]) -> tuple[fx.Node, fx.Node, float, list[Scale]] | None:
    """(x, y, c, scales) of c * x * y, times or over the scales: two tensors of floats, a finite
    number, and tensors that are the same along the summed axes."""
    number, scales = 1.0, []
    while True:
        tensors = [x for x in node.args if isinstance(x, fx.Node)]
        numbers = [x for x in node.args if isinstance(x, (int, float))]
        scaled = _scaled(node, summed)
        if node.target is aten._to_copy.default and _widens(tensors[0], node):
            [node] = tensors
        elif scaled is not None:
            node, scale = scaled
            scales.append(scale)
        elif node.target in (aten.mul.Tensor, aten.mul.Scalar) and len(numbers) == 1:
            number *= numbers[0]
            [node] = tensors
        elif node.target in (aten.div.Tensor, aten.div.Scalar) and node.args[1:] == (*numbers,):
            if not numbers[0]:
                return None
            number /= numbers[0]
            [node] = tensors
        else:
            break
    if node.target is not aten.mul.Tensor or len(tensors) != 2 or not math.isfinite(number):
        return None
    left, right = tensors
    lossless = all(_widens(x, node) for x in tensors)
    return (left, right, number, scales) if lossless else None


def _scaled(node: fx.Node, summed: set[int]) -> tuple[fx.Node, Scale] | None:
    """(what is scaled, its scale) of a product or quotient of that with a tensor that has none of
    the summed axes."""
    by = (aten.mul.Tensor, aten.div.Tensor)
    pair = [x for x in node.args if isinstance(x, fx.Node) and _widens(x, node)]
    if node.target not in by or len(pair) != 2:
        return None
    for x, scale in (pair, pair[::-1]):
        shape = shape_of(scale)
        without = all(shape[d] == 1 for d in summed if d >= -len(shape))
        if without and shape_of(x) == shape_of(node):
            return x, (node.target, scale)
        if node.target is aten.div.Tensor:
            break
    return None


def _widens(before: fx.Node, after: fx.Node) -> bool:
    """Whether a cast of floats to another value's type loses no digits."""
    if not holds_floats(before) or not holds_floats(after):
        return False
    wider = after.meta["val"].dtype
    return torch.promote_types(before.meta["val"].dtype, wider) == wider
