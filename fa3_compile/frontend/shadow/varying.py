"""Along which axes a value of the shadow may change."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten
REDUCTIONS = (
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.amax.default,
    aten.linalg_vector_norm.default,
)
# Their result has the axes of their first argument, or 1 in place of one.
KEEPING = (
    aten.expand.default,
    aten.repeat.default,
    aten.clone.default,
    aten.alias.default,
    aten._to_copy.default,
)


def varying_axes(node: fx.Node, known: dict[fx.Node, set[int]]) -> set[int]:
    """The axes along which a value may change, counted from the last, which is -1. `known` keeps
    what was found out about other nodes."""
    if node in known:
        return known[node]
    shape = node.meta["val"].shape
    found = {i - len(shape) for i, n in enumerate(shape) if not bool(n == 1)}
    sources = [x for x in node.all_input_nodes if isinstance(x.meta["val"], torch.Tensor)]
    same_rank = bool(sources) and sources[0].meta["val"].dim() == len(shape)
    keeps = node.target in KEEPING or node.target in REDUCTIONS and same_rank
    if keeps or is_element_wise(node):
        found &= set().union(*(varying_axes(x, known) for x in sources))
    known[node] = found
    return found


def is_element_wise(node: fx.Node) -> bool:
    """Whether an operator computes each element from those at the same place."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def holds_floats(argument) -> bool:
    """Whether it is a node of a tensor of floats, and no number or size."""
    value = argument.meta["val"] if isinstance(argument, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point()
