"""Scores of every query and key that are made by broadcasting, without a product: a sum of
element-wise products, a distance, a term of the query plus one of the key."""

from __future__ import annotations

import torch
from torch import fx

from fa3_compile.errors import NOTHING, Decline
from fa3_compile.frontend.lift.lift import ancestors
from fa3_compile.frontend.shadow.trace import Shadow
from fa3_compile.frontend.shadow.varying import (
    REDUCTIONS,
    holds_floats,
    is_element_wise,
    varying_axes,
)

aten = torch.ops.aten
MULTIPLY = "Write q @ k.transpose(-2, -1), which needs no tensor of all queries, keys and features."
DISTANCES = (
    "-|q - k|^2 is 2 * q @ k.mT - (q * q).sum(-1)[..., None] - (k * k).sum(-1)[..., None, :], "
    "which is fused."
)


def by_broadcasting(shadow: Shadow, scores: fx.Node) -> Decline | None:
    """Why scores that are made so are none of a product."""
    axes: dict[fx.Node, set[int]] = {}
    for node in ancestors(scores):
        holders = shadow.dynamo_of.get(node)
        if not holders or not holds_floats(node):
            continue
        summed = node.args[0] if node.target in REDUCTIONS else None
        if node.target is aten.sum.dim_IntList and broadcasts(summed, aten.mul.Tensor, axes):
            why = "the scores are a sum of element-wise products"
            return Decline("no-product", holders[0], MULTIPLY, message=why)
        if isinstance(summed, fx.Node) and any(
            broadcasts(x, aten.sub.Tensor, axes) for x in _element_wise_ancestors(summed)
        ):
            why = "the scores are distances, not products"
            return Decline("no-product", holders[0], DISTANCES, message=why)
        if broadcasts(node, aten.add.Tensor, axes):
            why = "the scores are sums of a term of the query and one of the key, not products"
            return Decline("no-product", holders[0], NOTHING, message=why)
    return None


def broadcasts(node, target, axes: dict[fx.Node, set[int]] | None = None) -> bool:
    """Whether an operator's two floats, both of the program, each change along an axis that the
    other one is the same along. `axes` keeps what was found out about other nodes."""
    if not isinstance(node, fx.Node) or node.target is not target:
        return False
    if not all(map(holds_floats, node.args)):
        return False
    given = all(any(y.op == "placeholder" for y in ancestors(x)) for x in node.args)
    left, right = (varying_axes(x, {} if axes is None else axes) for x in node.args)
    return given and not left <= right and not right <= left


def _element_wise_ancestors(node: fx.Node) -> list[fx.Node]:
    """A value, and what it is computed from element by element."""
    found, stack = [], [node]
    while stack:
        current = stack.pop()
        if current not in found:
            found.append(current)
            stack += current.all_input_nodes if is_element_wise(current) else []
    return found
