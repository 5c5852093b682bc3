"""One meaning for every spelling of softmax in the shadow."""

from __future__ import annotations

import operator
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
    if node.target is aten.exp.default and _is(node.args[0], aten.sub.Tensor):
        return _less_logsumexp(node, *node.args[0].args[:2])
    if node.target is aten.div.Tensor:
        return _by_hand(node)
    return None


def _of(node, scores, dim, *, dead_rows_zero=False) -> Softmax:
    return Softmax(node, scores, dimension(dim, scores.meta["val"].dim()), dead_rows_zero)


def _less_logsumexp(node: fx.Node, scores, normaliser) -> Softmax | None:
    """exp(x - logsumexp(x, dim)), kept or unsqueezed."""
    taken, added = _unexpanded(normaliser)
    if not _is(taken, aten.logsumexp.default):
        return None
    source, dims = taken.args[:2]
    keeps = bool(taken.args[2]) if len(taken.args) > 2 else False
    if source is not scores or len(dims) != 1:
        return None
    at = dimension(dims[0], scores.meta["val"].dim())
    return _of(node, scores, at) if added == ([] if keeps else [at]) else None


def _by_hand(node: fx.Node) -> Softmax | None:
    """exp(x) / exp(x).sum(dim), kept or unsqueezed, with or without the row's maximum off."""
    top, bottom = node.args[:2]
    if not _is(top, aten.exp.default) or not isinstance(bottom, fx.Node):
        return None
    summed, added = _unexpanded(bottom)
    if not _is(summed, aten.sum.dim_IntList):
        return None
    source, dims = summed.args[:2]
    keeps = bool(summed.args[2]) if len(summed.args) > 2 else False
    if source is not top or len(dims) != 1:
        return None
    rank = top.meta["val"].dim()
    if added != ([] if keeps else [dimension(dims[0], rank)]):
        return None
    scores = top.args[0]
    shifted = _is(scores, aten.sub.Tensor) and row_maximum(_unexpanded(scores.args[1])[0])
    return replace(_of(node, scores, dims[0]), unshifted=not shifted)


def _unexpanded(node) -> tuple[fx.Node, list[int]]:
    """The node before it was broadcast, and the dimensions that were added."""
    added: list[int] = []
    while isinstance(node, fx.Node):
        if _is(node, aten.unsqueeze.default):
            added.append(dimension(node.args[1], node.meta["val"].dim()))
        elif node.target not in (aten.expand.default, aten.detach.default, aten.alias.default):
            break
        node = node.args[0]
    return node, added


def _is(node, target) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def row_maximum(node: fx.Node) -> bool:
    """Whether the node is the maximum of a tensor along one dimension."""
    if not isinstance(node, fx.Node):
        return False
    if node.target is aten.amax.default:
        return len(node.args) > 1 and len(node.args[1]) == 1
    taken = node.target is operator.getitem and node.args[1] == 0
    return taken and _is(node.args[0], aten.max.dim)
