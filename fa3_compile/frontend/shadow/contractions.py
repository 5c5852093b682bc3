"""Sums of element-wise products, read as the products of matrices that they are:
`(q[:, None] * k).sum(-1)` is one of queries and keys, `(w[..., None] * v).sum(-2)` one with V. So
are products of single rows with single columns, where queries are expanded along batches of keys.

Only those before a softmax and behind it are read so. Both factors come with the data: what is
multiplied by a vector of the model is a layer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import fx

from fa3_compile.frontend.detect.operands import is_movement, moved
from fa3_compile.frontend.detect.product import PRODUCTS, products_before, sides_of
from fa3_compile.frontend.lift.lift import descendants, shape_of
from fa3_compile.frontend.shadow.activations import comes_with_data
from fa3_compile.frontend.shadow.multiply_and_sum import SUMS, Contraction, contraction, single_rows
from fa3_compile.frontend.shadow.normalize import Softmax, divided_late, softmaxes
from fa3_compile.frontend.shadow.trace import SIZES, Shadow

aten = torch.ops.aten


def read_as_products(shadow: Shadow) -> None:
    """Puts products of matrices in the place of such sums, those of queries and keys first."""
    given = comes_with_data(shadow)
    for softmax in _softmaxes(shadow):
        for node in _before(softmax.scores):
            found = contraction(node, given)
            if found is not None and found.is_of_queries_and_keys and _both_held(shadow, found):
                _replace(shadow, found)
    for softmax in _softmaxes(shadow):
        # A router's scores are a product with a table of the model.
        if any(all(map(given, sides_of(p))) for p in products_before(softmax.scores)):
            keys = shape_of(softmax.node)[softmax.dim]
            weights = descendants([softmax.node])
            for node in _behind(shadow, softmax.node):
                found = contraction(node, given)
                if found is not None and found.weighs(weights, keys):
                    _replace(shadow, _with_scaled_weights(found, weights))


def _softmaxes(shadow: Shadow) -> list[Softmax]:
    return [*softmaxes(shadow), *divided_late(shadow)]


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
        if node.target in SUMS or single_rows(node) is not None:
            yield node
        else:
            stack += following(node)


def _both_held(shadow: Shadow, found: Contraction) -> bool:
    """Whether nodes of the program hold both factors, for the operator to read: what a call such
    as `cosine_similarity` makes of them inside is none."""
    return all(_is_held(shadow, x) for x in (found.left, found.right))


def _is_held(shadow: Shadow, node: fx.Node) -> bool:
    while node not in shadow.dynamo_of:
        if not is_movement(node) and node.target is not aten._to_copy.default:
            return False
        node = moved(node)
    return True


def _with_scaled_weights(found: Contraction, weights: set[fx.Node]) -> Contraction:
    """The contraction with its scales on the weights: a node of the program holds the product with
    V, and none what is scaled afterwards."""
    of_left = found.left in weights
    scaled = found.left if of_left else found.right
    shape = scaled.meta["val"].shape
    with scaled.graph.inserting_before(found.node):
        if found.factor != 1:
            scaled = _call(aten.mul.Tensor, scaled, found.factor, shape=shape)
        for target, scale in found.scales:
            scaled = _call(target, scaled, scale, shape=shape)
    sides = (scaled, found.right) if of_left else (found.left, scaled)
    return replace(found, left=sides[0], right=sides[1], factor=1.0, scales=[])


def _replace(shadow: Shadow, found: Contraction) -> None:
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
        made = _permuted(made, sorted(axes), axes)
        whole = [d for d in sorted(found.size) if rank == len(found.size) or d not in summed]
        for at, d in enumerate(whole):
            if d not in axes:
                shape = [*made.meta["val"].shape]
                made = _call(aten.unsqueeze.default, made, at, shape=[*shape[:at], 1, *shape[at:]])
        if found.factor != 1:
            made = _call(aten.mul.Tensor, made, found.factor, shape=made.meta["val"].shape)
        for target, scale in found.scales:
            if rank < len(found.size):
                scale = _selected(scale, [d for d in found.size if d not in summed])
            made = _call(target, made, scale, shape=made.meta["val"].shape)
    node.replace_all_uses_with(made)
    _take_its_place(shadow, node, made)


def _matrices(
    found: Contraction, node: fx.Node, groups: list[list[int]], dtype: torch.dtype
) -> fx.Node:
    """A factor as [batch, rows, columns], each of them a group of its axes."""
    wanted = [d for group in groups for d in group]
    node, axes = _selected(node, wanted), sorted(wanted)
    node = _view(found, _permuted(node, wanted, axes), groups)
    if node.meta["val"].dtype is not dtype:
        node = _call(aten._to_copy.default, node, shape=node.meta["val"].shape, dtype=dtype)
    return node


def _selected(node: fx.Node, wanted: list[int]) -> fx.Node:
    """A tensor without those of its axes that are not wanted, along which it is the same."""
    shape = [*node.meta["val"].shape]
    rank = len(shape)
    for at in reversed(range(rank)):
        if at - rank not in wanted:
            del shape[at]
            node = _call(aten.select.int, node, at, 0, shape=[*shape])
    return node


def _permuted(node: fx.Node, wanted: list[int], axes: list[int]) -> fx.Node:
    """A tensor of some axes with them in another order."""
    order = [axes.index(d) for d in wanted]
    shape = [node.meta["val"].shape[i] for i in order]
    return _call(aten.permute.default, node, order, shape=shape)


def _view(found: Contraction, node: fx.Node, groups: list[list[int]]) -> fx.Node:
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
