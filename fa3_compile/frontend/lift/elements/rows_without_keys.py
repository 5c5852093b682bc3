"""Conditions that say of a row that all its scores are -inf, by which weights are filled with 0."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from fa3_compile.frontend.lift.elements.movement import dimension
from fa3_compile.frontend.lift.lift import shape_of
from fa3_compile.frontend.shadow.operators import DROPOUT
from fa3_compile.frontend.shadow.same import same_value
from fa3_compile.spec.index import same

aten = torch.ops.aten

NOT = (aten.logical_not.default, aten.bitwise_not.default)
LARGEST = (aten.amax.default, aten.logsumexp.default, aten.max.dim)


def holds_without_keys(condition: fx.Node, weights: fx.Node) -> bool | None:
    """Whether `condition` holds in the rows whose scores, those of the softmax that `weights` are
    of, are -inf alone, and nowhere else; False: in all other rows; None: it says something else."""
    found = _said_of_rows(condition)
    softmax = _softmax_of(weights)
    if softmax is None or found is None:
        return None
    scores, dim, holds = found
    sizes, row = shape_of(softmax), shape_of(condition)
    of, along = _uncast(softmax.args[0]), dimension(softmax.args[1], len(sizes))
    if len(row) != len(sizes) or dimension(dim, len(shape_of(scores))) != along:
        return None
    alike = all(same(1 if i == along else sizes[i], row[i]) for i in range(len(sizes)))
    return holds if alike and same_value(scores, of) else None


def _softmax_of(weights: Any) -> fx.Node | None:
    """The softmax that weights are, perhaps cast or dropped."""
    while weights.target in (DROPOUT, aten._to_copy.default, aten.clone.default):
        weights = weights.args[0]
    return weights if weights.target is aten._softmax.default else None


def _said_of_rows(condition: Any) -> tuple[fx.Node, int, bool] | None:
    """(scores, the dimension of their keys, whether it holds where all of a row are -inf)."""
    holds, node = True, condition
    while node.target in (*NOT, aten.unsqueeze.default):
        holds ^= node.target in NOT
        node = node.args[0]
    every = node.target is aten.all.dim
    if every or node.target is aten.any.dim:
        inner = is_infinite(node.args[0])
        if inner is None or inner[1] is not every:
            return None
        return _uncast(inner[0]), node.args[1], holds == every
    of_largest = is_infinite(node)
    if of_largest is None:
        return None
    largest, infinite = of_largest
    if largest.target is operator.getitem and largest.args[1] == 0:
        largest = largest.args[0]
    if largest.target not in LARGEST:
        return None
    dims = largest.args[1]
    dims = [dims] if isinstance(dims, int) else dims
    return (_uncast(largest.args[0]), dims[0], holds == infinite) if len(dims) == 1 else None


def is_infinite(node: Any) -> tuple[fx.Node, bool] | None:
    """(x, True) of `x == -inf`, (x, False) of `x != -inf`. No score is +inf, or its row is NaN."""
    holds = True
    while node.target in NOT:
        node, holds = node.args[0], not holds
    if not node.args:
        return None
    x, *other = node.args
    if node.target is aten.isinf.default:
        return x, holds
    if other == [-math.inf] and node.target in (aten.eq.Scalar, aten.le.Scalar):
        return x, holds
    if other == [-math.inf] and node.target in (aten.ne.Scalar, aten.gt.Scalar):
        return x, not holds
    if node.target is aten.mul.Tensor:  # isfinite
        x = _finite(*node.args)
        return x and (x, not holds)
    return None


def _finite(itself: Any, size: Any) -> fx.Node | None:
    """x of (x == x) * (abs(x) != inf)."""
    if not all(isinstance(n, fx.Node) for n in (itself, size)):
        return None
    if itself.target is not aten.eq.Tensor or itself.args[0] is not itself.args[1]:
        return None
    if size.target is not aten.ne.Scalar or size.args[1] != math.inf:
        return None
    x, of = itself.args[0], size.args[0]
    return x if of.target is aten.abs.default and of.args[0] is x else None


def _uncast(node: Any) -> fx.Node:
    """What was cast to a type that holds all its numbers."""
    while node.target is aten._to_copy.default:
        wide, narrow = (n.meta["val"].dtype for n in (node, node.args[0]))
        if torch.promote_types(wide, narrow) != wide:
            break
        node = node.args[0]
    return node
