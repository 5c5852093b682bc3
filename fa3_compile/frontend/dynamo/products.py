"""Products in a Dynamo graph, by their names, and what leads from one to another: also past calls
that the shadow does not run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fa3_compile.frontend.dynamo.graph import (
    example_value,
    is_softmax_like,
    opaque_target,
)
from fa3_compile.frontend.dynamo.seeds import is_product
from fa3_compile.frontend.dynamo.sizes import hint

# The most by which scores may be padded for a convolution.
PADDED = 16


def made_of_a_product(
    nodes: Iterable[fx.Node], shape: Sequence, given: set[fx.Node] | None = None
) -> bool:
    """Whether values of this shape, or nearly so, lead from a product to one of the nodes: from
    one of `given` alone if there is such."""
    stack, seen = [*nodes], set()
    while stack:
        node = stack.pop()
        value = example_value(node)
        if node in seen or not isinstance(value, torch.Tensor):
            continue
        if not alike(value.shape, shape):
            continue
        seen.add(node)
        if is_product(node):
            if given is None or given.issuperset(node.all_input_nodes):
                return True
            continue
        if not opaque_target(node):
            stack += node.all_input_nodes
    return False


def alike(shape: Sequence, other: Sequence) -> bool:
    """Whether a tensor may be the other's, its elements moved, padded or cropped."""
    if statically_known_true(math.prod(shape) == math.prod(other)):
        return True
    last = zip(shape[-2:], other[-2:])
    return len(shape) == len(other) and all(abs(hint(a) - hint(b)) <= PADDED for a, b in last)


def leads_to_a_product(node: fx.Node, shape: Sequence, given: set[fx.Node] | None = None) -> bool:
    """Whether values of this shape lead from the node to a product; if there is `given`, of those
    alone, and by no softmax."""
    return next(ways_to_a_product([node], shape, given), None) is not None


def ways_to_a_product(
    nodes: Sequence[fx.Node], shape: Sequence, given: set[fx.Node] | None
) -> Iterator[list[fx.Node]]:
    """What values of this shape pass on their way to a product, nearest first."""
    seen = set()
    stack: list[tuple[fx.Node, list[fx.Node]]] = [(node, []) for node in nodes]
    while stack:
        node, way = stack.pop()
        for user in node.users:
            if is_product(user):
                if given is None or given.issuperset(user.all_input_nodes):
                    yield way
                continue
            if given is not None and is_softmax_like(user):
                continue
            value = example_value(user)
            parts = value if isinstance(value, (tuple, list)) else [value]
            whole = any(isinstance(x, torch.Tensor) and alike(x.shape, shape) for x in parts)
            if user not in seen and whole:
                seen.add(user)
                stack.append((user, [*way, user]))
