"""One meaning for every spelling of softmax in the shadow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx

from fa3_compile.frontend.lift.elements.movement import dimension
from fa3_compile.frontend.shadow.empty_rows import become_zeros
from fa3_compile.frontend.shadow.operators import STOP
from fa3_compile.frontend.shadow.row_statistics import (
    dims_of,
    is_call,
    reduction,
    row_statistic,
    statistic_of,
    undetached,
    unexpanded,
    unsqueezed,
)
from fa3_compile.frontend.shadow.safe_softmax import hides, made_finite, unmasked
from fa3_compile.frontend.shadow.same import same_value
from fa3_compile.frontend.shadow.trace import SIZES, Shadow

aten = torch.ops.aten
EXPONENTIALS = (
    aten.exp.default,
    aten.exp2.default,
    aten.pow.Scalar,
    aten.pow.Tensor_Tensor,
    aten._softmax.default,
)
# What `detach` leaves in a shadow.
CONSTANT = (STOP, aten.detach.default, aten.alias.default)
# How far a normaliser's sum and its exponentials are looked for.
NEAR = 16


@dataclass(frozen=True)
class Division:
    """`node` is `top` divided by the rows' sums, after the product with V."""

    node: fx.Node
    top: fx.Node


@dataclass(frozen=True)
class Softmax:
    """`node` is the softmax of `scores` along `dim`; rows of -inf alone give zeros or NaN.

    Written by hand it is e / (e.sum(dim) + rest), and `scores` is e: its logarithm is what the
    softmax is of. `divisor` is what e is divided by, `summed` the sum in it. Where it is e V that
    is divided, `node` is e, and `division` says by which node.
    """

    node: fx.Node
    scores: fx.Node
    dim: int
    dead_rows_zero: bool = False
    divisor: fx.Node | None = None
    summed: fx.Node | None = None
    division: Division | None = None
    # False: `node` is weights that no softmax makes, and `scores` is `node`; `dim` is found when
    # they are read. `summed` is the sum of their rows, if they are divided by something made of it.
    normalizes: bool = True
    # exp(x - logsumexp(x)): a row of one large fill has the fill as its logsumexp, rounded, so
    # that its weights are 1 and not 1 / n.
    less_logsumexp: bool = False

    @property
    def by_hand(self) -> bool:
        return self.divisor is not None

    @property
    def adds_up(self) -> bool:
        """Whether its rows add up to 1, or are NaN."""
        if self.by_hand:
            return self.division is None and unexpanded(self.divisor)[0] is self.summed
        return self.node.target is aten._softmax.default and not self.dead_rows_zero


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
    if node.target is aten.exp.default and is_call(node.args[0], aten._log_softmax.default):
        inner = node.args[0]
        return _of(node, inner.args[0], inner.args[1])
    if node.target is aten.exp.default and is_call(node.args[0], aten.sub.Tensor):
        return _less_logsumexp(node, *node.args[0].args[:2])
    if node.target in (aten.div.Tensor, aten.mul.Tensor):
        return _by_hand(node)
    return None


def _of(node, scores, dim, *, dead_rows_zero=False) -> Softmax:
    return Softmax(node, scores, dimension(dim, scores.meta["val"].dim()), dead_rows_zero)


def _less_logsumexp(node: fx.Node, scores, normaliser) -> Softmax | None:
    """exp(x - logsumexp(x, dim)), kept or unsqueezed, or with a logsumexp by hand."""
    taken, added = unexpanded(normaliser)
    summed = taken if is_call(taken, aten.logsumexp.default) else _log_of_sum(taken)
    if summed is None:
        return None
    dims = summed.args[1]
    keeps = bool(summed.args[2]) if len(summed.args) > 2 else False
    source = taken.args[0] if summed is taken else summed.args[0].args[0].args[0]
    if not same_value(source, scores) or len(dims) != 1:
        return None
    at = dimension(dims[0], scores.meta["val"].dim())
    if added != ([] if keeps else [at]):
        return None
    return Softmax(node, scores, at, less_logsumexp=True)


def _log_of_sum(node) -> fx.Node | None:
    """exp(x - m).sum(dim) of m + log(exp(x - m).sum(dim)), a logsumexp of x for its maximum m."""
    if not is_call(node, aten.add.Tensor):
        return None
    for top, log in (node.args[:2], node.args[1::-1]):
        summed = log.args[0] if is_call(log, aten.log.default) else None
        e = summed.args[0] if is_call(summed, aten.sum.dim_IntList) else None
        if not is_call(e, aten.exp.default) or not is_call(e.args[0], aten.sub.Tensor):
            continue
        x, shift = e.args[0].args[:2]
        maximum = unexpanded(shift)[0]
        if not row_statistic(maximum) or not same_value(unsqueezed(top), unsqueezed(maximum)):
            continue
        source, dims = statistic_of(maximum)
        at = [dimension(d, x.meta["val"].dim()) for d in summed.args[1]]
        if same_value(source, x) and dims == at:
            return summed
    return None


def _by_hand(node: fx.Node) -> Softmax | None:
    """e / (e.sum(dim) + rest), or e times the reciprocal of that."""
    for top, bottom in _quotients(node):
        for summed in _sums_of_exponentials(bottom):
            zeros = become_zeros(top, bottom, summed)
            if same_value(without_abs(summed.args[0]), top) and zeros is not None:
                return Softmax(node, top, _summed_dim(summed), zeros, bottom, summed)
    return None


def unnormalised(node: fx.Node) -> list[Softmax]:
    """Weights as a product meets them, and, where they are w / g(w.sum(dim)), as w."""
    found = [Softmax(node, node, -1, normalizes=False)]
    if node.target in (aten.div.Tensor, aten.mul.Tensor):
        for top, bottom in _quotients(node):
            for x in _behind(bottom):
                if x.target is aten.sum.dim_IntList and same_value(added_up(x).weights, top):
                    found.append(Softmax(top, top, -1, summed=x, normalizes=False))
    return found


class AddedUp(NamedTuple):
    """What a sum is of: weights, or their sizes, perhaps as constants to the gradient."""

    weights: fx.Node
    sizes: bool
    constant: bool


def added_up(summed: fx.Node) -> AddedUp:
    """What a sum of a row's weights is of."""
    passed, node = [], summed.args[0]
    while isinstance(node, fx.Node) and node.target in (*CONSTANT, aten.abs.default):
        passed.append(node.target)
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return AddedUp(node, aten.abs.default in passed, STOP in passed)


def without_abs(node: fx.Node) -> fx.Node:
    """x of abs(x)."""
    return node.args[0] if node.target is aten.abs.default else node  # pyright: ignore


def divided_late(shadow: Shadow) -> list[Softmax]:
    """Every (e V) / (e.sum(dim) + rest): a softmax that is normalised after the product."""
    found = []
    for node in shadow.graph.nodes:
        if node.target not in (aten.div.Tensor, aten.mul.Tensor):
            continue
        for top, bottom in _quotients(node):
            for summed in _sums_of_exponentials(bottom):
                e = summed.args[0]
                dim, division = _summed_dim(summed), Division(node, top)
                zeros = become_zeros(e, bottom, summed)
                if zeros is not None:
                    found.append(Softmax(e, e, dim, zeros, bottom, summed, division))
    return found


def _quotients(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """(a, b) of a / b, or of a times the reciprocal of b."""
    if node.target is aten.div.Tensor:
        pairs = [node.args[:2]]
    else:
        pairs = [(x, _reciprocal_of(y)) for x, y in (node.args[:2], node.args[1::-1])]
    return [(a, b) for a, b in pairs if isinstance(a, fx.Node) and isinstance(b, fx.Node)]


def _sums_of_exponentials(node: fx.Node) -> list[fx.Node]:
    """The sums of exponentials that a divisor is made of."""
    return [
        x
        for x in _behind(node)
        if x.target is aten.sum.dim_IntList
        and x.args[1]
        and any(n.target in EXPONENTIALS for n in _behind(x.args[0]))
    ]


def _summed_dim(summed: fx.Node) -> int:
    return dimension(summed.args[1][0], summed.args[0].meta["val"].dim())


def _reciprocal_of(node) -> fx.Node | None:
    """y of 1 / y."""
    node, _ = unexpanded(node)
    if is_call(node, aten.mul.Tensor) and 1 in node.args:
        # 1 / y of a tensor y.
        node = node.args[0] if node.args[1] == 1 else node.args[1]
    if is_call(node, aten.reciprocal.default):
        return node.args[0]
    if is_call(node, aten.div.Tensor) and node.args[0] == 1:
        return node.args[1]
    if is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == -1:
        return node.args[0]
    return None


def _behind(node: fx.Node) -> list[fx.Node]:
    """The node and what it is made of, nearest first, products and sums not looked behind."""
    found, queue = [], [node]
    while queue and len(found) < NEAR:
        current = queue.pop(0)
        if current in found or current.op != "call_function" or current.target in SIZES:
            continue
        found.append(current)
        if current.target not in (aten.bmm.default, aten.mm.default, aten.sum.dim_IntList):
            queue.extend(current.all_input_nodes)
    return found


def largest_is_one(softmax: Softmax) -> bool:
    """Whether a softmax by hand divides exp(x - x.max(dim)): each sum is then at least 1, or, of a
    maximum that is made finite, 0 in a row without keys."""
    e, condition, holds = unmasked(softmax.scores)
    if not is_call(e, aten.exp.default) or not is_call(e.args[0], aten.sub.Tensor):
        return False
    x, shift = e.args[0].args[:2]
    statistic = undetached(unexpanded(shift)[0])
    if (inner := made_finite(statistic)) is not None:
        statistic = undetached(unexpanded(inner)[0])
    if condition is not None and (inner is None or not hides(x, condition, holds)):
        return False
    if not row_statistic(statistic) or statistic.target is aten.logsumexp.default:
        return False
    reduced = reduction(statistic)
    return same_value(reduced.args[0], x) and dims_of(reduced) == [softmax.dim]
