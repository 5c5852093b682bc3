"""Maxima and logsumexps of rows, which programs take off their scores: looked for behind what
broadcasts them, holds them constant or makes them finite."""

from __future__ import annotations

import operator

import torch
from torch import fx

from fa3_compile.frontend.lift.elements.movement import dimension
from fa3_compile.frontend.shadow.operators import STOP
from fa3_compile.frontend.shadow.safe_softmax import made_finite

aten = torch.ops.aten
MAXIMA = (aten.amax.default, aten.max.default, aten.max.dim)


def row_statistic(node: fx.Node) -> bool:
    """Whether the node is a maximum or a logsumexp, which is finite where any score is. It may be
    detached: a softmax does not depend on what is taken off a whole row, nor does its gradient. It
    may be made finite elsewhere too."""
    node = undetached(node)
    if not isinstance(node, fx.Node):
        return False
    if (inner := made_finite(node)) is not None:
        return row_statistic(unexpanded(inner)[0])
    if node.target in (aten.amax.default, aten.max.default, aten.logsumexp.default):
        return True
    taken = node.target is operator.getitem and node.args[1] == 0
    return taken and is_call(node.args[0], aten.max.dim)


def statistic_of(node: fx.Node) -> tuple[fx.Node, list[int]]:
    """What a row statistic is of, and along which dimensions; of none where it is of all."""
    node = undetached(node)
    while (inner := made_finite(node)) is not None:
        node = undetached(unexpanded(inner)[0])
    reduced = reduction(node)
    return reduced.args[0], dims_of(reduced)  # pyright: ignore[reportReturnType]


def reduction(statistic: fx.Node) -> fx.Node:
    """The call that a statistic is a result of: max.dim gives places as well."""
    taken = statistic.target is operator.getitem
    return statistic.args[0] if taken else statistic  # pyright: ignore[reportReturnType]


def dims_of(reduced: fx.Node) -> list[int]:
    """The dimensions that a maximum is of; none of the maximum of all elements."""
    x, *dims = reduced.args[:2]
    dims = dims[0] if dims and isinstance(dims[0], (list, tuple)) else dims
    return [dimension(d, x.meta["val"].dim()) for d in dims]


def unexpanded(node) -> tuple[fx.Node, list[int]]:
    """The node before it was broadcast, and the dimensions that were added."""
    added: list[int] = []
    while isinstance(node, fx.Node):
        if is_call(node, aten.unsqueeze.default):
            added.append(dimension(node.args[1], node.meta["val"].dim()))
        elif node.target not in (aten.expand.default, aten.detach.default, aten.alias.default):
            break
        node = node.args[0]
    return node, added


def unsqueezed(node):
    """The node before dimensions of length 1 were added or left out."""
    node, _ = unexpanded(node)
    while isinstance(node, fx.Node) and node.target in (aten.squeeze.dim, aten.squeeze.dims):
        node, _ = unexpanded(node.args[0])
    return node


def undetached(node):
    """A node, or what it holds constant."""
    return unexpanded(node.args[0])[0] if is_call(node, STOP) else node


def is_call(node, target) -> bool:
    return isinstance(node, fx.Node) and node.target is target
