"""Sums of element-wise products, read as the products of matrices that they are:
`(q[:, None] * k).sum(-1)` is one of queries and keys, `(w[..., None] * v).sum(-2)` one with V. So
are products of single rows with single columns, where queries are expanded along batches of keys.

Only those before a softmax and behind it are read so. Both factors come with the data: what is
multiplied by a vector of the model is a layer.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fa3_compile.frontend.detect.operands import is_movement, moved
from fa3_compile.frontend.detect.product import PRODUCTS, products_before, sides_of
from fa3_compile.frontend.dynamo.sizes import sym
from fa3_compile.frontend.lift.elements.movement import dimension
from fa3_compile.frontend.lift.lift import descendants, shape_of
from fa3_compile.frontend.shadow.activations import comes_with_data
from fa3_compile.frontend.shadow.normalize import Softmax, divided_late, softmaxes
from fa3_compile.frontend.shadow.trace import SIZES, Shadow
from fa3_compile.frontend.shadow.varying import holds_floats, varying_axes
from fa3_compile.spec.expr import Expr
from fa3_compile.spec.index import same

aten = torch.ops.aten
SUMS = (aten.sum.dim_IntList, aten.mean.dim)


def read_as_products(shadow: Shadow) -> None:
    """Puts products of matrices in the place of such sums, those of queries and keys first."""
    given = comes_with_data(shadow)
    for softmax in _softmaxes(shadow):
        for node in _before(softmax.scores):
            found = _contraction(node, given)
            if found is not None and found.is_of_queries_and_keys and _both_held(shadow, found):
                _replace(shadow, found)
    for softmax in _softmaxes(shadow):
        # A router's scores are a product with a table of the model.
        if any(all(map(given, sides_of(p))) for p in products_before(softmax.scores)):
            keys = shape_of(softmax.node)[softmax.dim]
            weights = descendants([softmax.node])
            for node in _behind(shadow, softmax.node):
                found = _contraction(node, given)
                if found is not None and found.weighs(weights, keys):
                    _replace(shadow, found)


def _softmaxes(shadow: Shadow) -> list[Softmax]:
    return [*softmaxes(shadow), *divided_late(shadow)]


@dataclass
class _Contraction:
    """`node` is factor * (left * right).sum(summed). Axes are counted from the last, -1, of
    left * right: those that are summed, that both factors have, and that only one has. `whole` has
    the sizes of that product."""

    node: fx.Node
    whole: fx.Node
    left: fx.Node
    right: fx.Node
    factor: float
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


def _before(scores: fx.Node) -> list[fx.Node]:
    """The sums that scores are made of, no product or other sum looked behind."""
    return [*_reached([scores], lambda x: () if x.target in SIZES else x.all_input_nodes)]


def _behind(shadow: Shadow, weights: fx.Node) -> list[fx.Node]:
    """The sums that weights lead to."""
    return [*_reached(shadow.users(weights), shadow.users)]


def _reached(
    nodes: Sequence[fx.Node], following: Callable[[fx.Node], Sequence[fx.Node]]
) -> Iterator[fx.Node]:
    stack, seen = [*nodes], set()
    while stack:
        node = stack.pop()
        if node in seen or node.target in PRODUCTS:
            continue
        seen.add(node)
        if node.target in SUMS or _single_rows(node) is not None:
            yield node
        else:
            stack += following(node)


def _contraction(node: fx.Node, given: Callable[[fx.Node], bool]) -> _Contraction | None:
    """The contraction that a node is; None where it is none of matrices."""
    known: dict[fx.Node, set[int]] = {}
    rows = _single_rows(node)
    if rows is not None:
        left, column = rows
        right, whole, summed, factor = _row_of(column, known), left, [-1], 1.0
    else:
        whole, summed, factor = _summed(node)
        factors = _factors(whole) if summed else None
        if factors is None:
            return None
        left, right, number = factors
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
    return _Contraction(node, whole, left, right, factor, summed, both, of_left, of_right, size)


def _single_rows(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
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
    rank = column.meta["val"].dim()
    with column.graph.inserting_after(column):
        row = _permute(column, [*range(rank - 2), rank - 1, rank - 2], [*range(rank)])
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


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """(x, y, c) of c * x * y, two tensors of floats and a finite number."""
    number = 1.0
    while True:
        tensors = [x for x in node.args if isinstance(x, fx.Node)]
        numbers = [x for x in node.args if isinstance(x, (int, float))]
        if node.target is aten._to_copy.default and _widens(tensors[0], node):
            [node] = tensors
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
    return (left, right, number) if lossless else None


def _widens(before: fx.Node, after: fx.Node) -> bool:
    """Whether a cast of floats to another value's type loses no digits."""
    if not holds_floats(before) or not holds_floats(after):
        return False
    wider = after.meta["val"].dtype
    return torch.promote_types(before.meta["val"].dtype, wider) == wider


def _both_held(shadow: Shadow, found: _Contraction) -> bool:
    """Whether nodes of the program hold both factors, for the operator to read: what a call such
    as `cosine_similarity` makes of them inside is none."""
    return all(_is_held(shadow, x) for x in (found.left, found.right))


def _is_held(shadow: Shadow, node: fx.Node) -> bool:
    while node not in shadow.dynamo_of:
        if not is_movement(node) and node.target is not aten._to_copy.default:
            return False
        node = moved(node)
    return True


def _replace(shadow: Shadow, found: _Contraction) -> None:
    """The product of matrices in the place of a sum, for all that holds or reads it."""
    node = found.node
    dtype, rank = node.meta["val"].dtype, node.meta["val"].dim()
    both, summed = found.both, found.summed
    with shadow.graph.inserting_before(node):
        left = _matrices(found, found.left, [both, found.of_left, summed], dtype)
        right = _matrices(found, found.right, [both, summed, found.of_right], dtype)
        shape = [*left.meta["val"].shape[:2], right.meta["val"].shape[2]]
        made = _call(aten.bmm.default, left, right, shape=shape)
        axes = [*both, *found.of_left, *found.of_right]
        made = _view(found, made, [[d] for d in axes])
        made = _permute(made, sorted(axes), axes)
        whole = [d for d in sorted(found.size) if rank == len(found.size) or d not in summed]
        for at, d in enumerate(whole):
            if d not in axes:
                shape = [*made.meta["val"].shape]
                made = _call(aten.unsqueeze.default, made, at, shape=[*shape[:at], 1, *shape[at:]])
        if found.factor != 1:
            made = _call(aten.mul.Tensor, made, found.factor, shape=made.meta["val"].shape)
    node.replace_all_uses_with(made)
    _take_its_place(shadow, node, made)


def _matrices(
    found: _Contraction, node: fx.Node, groups: list[list[int]], dtype: torch.dtype
) -> fx.Node:
    """A factor as [batch, rows, columns], each of them a group of its axes."""
    shape = [*node.meta["val"].shape]
    axes = [*range(-len(shape), 0)]
    wanted = [d for group in groups for d in group]
    for at in reversed(range(len(shape))):
        if axes[at] not in wanted:
            del axes[at], shape[at]
            node = _call(aten.select.int, node, at, 0, shape=[*shape])
    node = _view(found, _permute(node, wanted, axes), groups)
    if node.meta["val"].dtype is not dtype:
        node = _call(aten._to_copy.default, node, shape=node.meta["val"].shape, dtype=dtype)
    return node


def _permute(node: fx.Node, wanted: list[int], axes: list[int]) -> fx.Node:
    """A tensor of some axes with them in another order."""
    order = [axes.index(d) for d in wanted]
    shape = [node.meta["val"].shape[i] for i in order]
    return _call(aten.permute.default, node, order, shape=shape)


def _view(found: _Contraction, node: fx.Node, groups: list[list[int]]) -> fx.Node:
    """A tensor with each group of axes as one."""
    sizes, shape = [], []
    for group in groups:
        size: int | fx.Node = 1
        count: int | torch.SymInt = 1
        for d in group:
            length: int | fx.Node = found.size[d]  # pyright: ignore
            if not isinstance(length, int):
                length = node.graph.call_function(
                    aten.sym_size.int, (found.whole, d + len(found.size))
                )
                length.meta["val"] = found.size[d]
            count *= found.size[d]
            if isinstance(size, int) and isinstance(length, int):
                size *= length
            else:
                size = node.graph.call_function(operator.mul, (size, length))
                size.meta["val"] = count
        sizes, shape = [*sizes, size], [*shape, count]
    return _call(aten.view.default, node, sizes, shape=shape)


def _call(target, node: fx.Node, *args, shape: Sequence, **kwargs) -> fx.Node:
    """A node of the shadow whose value has this shape."""
    made = node.graph.call_function(target, (node, *args), kwargs)
    made.meta["val"] = node.meta["val"].new_empty([*shape], **kwargs)
    return made


def _take_its_place(shadow: Shadow, node: fx.Node, made: fx.Node) -> None:
    """Says of what held a node's value that it holds another's."""
    for holder, held in shadow.aten_of.items():
        if held is node:
            shadow.aten_of[holder] = made
    if node in shadow.dynamo_of:
        shadow.dynamo_of[made] = shadow.dynamo_of.pop(node)
    if node in shadow.within:
        shadow.within[made] = shadow.within.pop(node)
    for value, holder in [key for key in shadow.since if key[0] is node]:
        shadow.since[made, holder] = shadow.since.pop((value, holder))
