"""One meaning for every spelling of softmax in the shadow."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from fa3_compile.frontend.elements.movement import dimension
from fa3_compile.frontend.trace import Shadow

aten = torch.ops.aten


@dataclass(frozen=True)
class Softmax:
    """`node` is the softmax of `scores` along `dim`; rows of -inf alone give zeros or NaN."""

    node: fx.Node
    scores: fx.Node
    dim: int
    dead_rows_zero: bool = False
    # exp of the scores themselves: a row without keys is 0 / 0 whatever its fill is.
    unshifted: bool = False


def softmaxes(shadow: Shadow) -> list[Softmax]:
    """Every softmax of the shadow, in order."""
    return [found for node in shadow.graph.nodes if (found := _softmax(node))]


def _softmax(node: fx.Node) -> Softmax | None:
    if node.op != "call_function":
        return None
    if node.target is aten._softmax.default:
        return _of(node, node.args[0], node.args[1])
    if node.target is aten._safe_softmax.default:
        return _of(node, node.args[0], node.args[1], dead_rows_zero=True)
    if node.target is aten.exp.default and _is(node.args[0], aten._log_softmax.default):
        inner = node.args[0]
        return _of(node, inner.args[0], inner.args[1])
    if node.target is aten.div.Tensor:
        return _by_hand(node)
    return None


def _of(node, scores, dim, *, dead_rows_zero=False) -> Softmax:
    return Softmax(node, scores, dimension(dim, scores.meta["val"].dim()), dead_rows_zero)


def _by_hand(node: fx.Node) -> Softmax | None:
    """exp(x) / exp(x).sum(dim, keepdim=True), with or without the row's maximum taken off."""
    top, bottom = node.args[:2]
    if not (isinstance(top, fx.Node) and isinstance(bottom, fx.Node)):
        return None
    while _is(bottom, aten.expand.default):
        bottom = bottom.args[0]
    if not _is(bottom, aten.sum.dim_IntList) or not _is(top, aten.exp.default):
        return None
    summed, dims = bottom.args[:2]
    keeps = bottom.args[2] if len(bottom.args) > 2 else False
    if summed is not top or len(dims) != 1 or not keeps:
        return None
    scores = top.args[0]
    shifted = _is(scores, aten.sub.Tensor) and row_maximum(_unexpanded(scores.args[1]))
    return replace(_of(node, scores, dims[0]), unshifted=not shifted)


def _unexpanded(node):
    while _is(node, aten.expand.default):
        node = node.args[0]
    return node


def _is(node, target) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def row_maximum(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(x, dim) if the node is the maximum of x along dim, kept as a dimension."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.amax.default and len(node.args) > 1 and len(node.args[1]) == 1:
        x, dims = node.args[:2]
        keeps = node.args[2] if len(node.args) > 2 else False
    elif getattr(node.target, "__name__", "") == "getitem" and node.args[1] == 0:
        inner = node.args[0]
        if not _is(inner, aten.max.dim):
            return None
        x, dims = inner.args[0], [inner.args[1]]
        keeps = inner.args[2] if len(inner.args) > 2 else False
    else:
        return None
    return (x, dimension(dims[0], x.meta["val"].dim())) if keeps else None
