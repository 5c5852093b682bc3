"""The logsumexp of a fused attention's scores, where the program uses it too; where there is no
softmax, the sum of its weights.

The operator returns it beside its output, so that flex_attention's `return_lse`, ring attention,
a z-loss and gates of the LSE cost nothing. Beside scores that the program keeps it is taken of
those: exp(s - LSE) is as near as eager's only if both have the same roundings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from fa3_compile.frontend.detect.operands import is_movement, step_back
from fa3_compile.frontend.lift.elements.movement import dimension
from fa3_compile.frontend.lift.lift import Index, ancestors, descendants, shape_of, sym
from fa3_compile.frontend.shadow.normalize import Softmax, without_abs
from fa3_compile.frontend.shadow.same import same_value
from fa3_compile.frontend.shadow.trace import Shadow
from fa3_compile.spec.expr import Expr
from fa3_compile.spec.index import same

aten = torch.ops.aten
SCALES = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


@dataclass
class Lse:
    """A Dynamo node that holds `factor` times the LSE or sum, its dimensions in atomic axes.

    scores  the Dynamo nodes that hold what it is taken of, from the product on
    """

    node: fx.Node
    dims: list[list[sympy.Symbol]]
    factor: float
    scores: list[fx.Node]


def statistics(
    shadow: Shadow,
    softmax: Softmax,
    index: Index,
    sizes: dict[sympy.Symbol, Expr],
    dots: Sequence[fx.Node],
    *,
    nonnegative: bool = False,
) -> list[Lse]:
    """Every holder of the logsumexp of what the softmax at `index` is taken of; without a softmax,
    of the sum of the weights, whose sizes are the weights where they are `nonnegative`.

    dots  the products that the scores are made of
    """
    scores, dim = softmax.scores, softmax.dim
    found = []
    for node in shadow.graph.nodes:
        target = aten.logsumexp.default if softmax.normalizes else aten.sum.dim_IntList
        if softmax.by_hand or node.target is not target:
            continue
        reduced = without_abs(node.args[0]) if nonnegative else node.args[0]
        if not same_value(reduced, scores):
            continue
        if [dimension(d, len(index)) for d in node.args[1]] != [dim]:
            continue
        rows = [x for d, x in enumerate(index) if d != dim]
        if shape_of(node) != [n for d, n in enumerate(shape_of(scores)) if d != dim]:
            rows.insert(dim, sympy.S.Zero)
        axes = [_atomic(x, sizes) for x in rows]
        if all(a is not None for a in axes):
            scores_of = _holders(shadow, node, dots)
            seen = (_seen(shadow, chain, axes, scores_of) for chain in _held(shadow, node))
            found += [x for x in seen if x is not None]
    return found


def _holders(shadow: Shadow, node: fx.Node, dots: Sequence[fx.Node]) -> list[fx.Node]:
    """The Dynamo nodes of what `node` is made of, from the products on."""
    between = {*ancestors(node)} & descendants(dots) - {node}
    return [holder for n in between for holder in shadow.dynamo_of.get(n, ())]


def _held(shadow: Shadow, node: fx.Node) -> list[list[fx.Node]]:
    """The chains of movements and scales from `node` to the nearest nodes that are held."""
    found, stack = [], [[node]]
    while stack:
        chain = stack.pop()
        if shadow.dynamo_of.get(chain[-1]):
            found.append(chain)
            continue
        for user in shadow.users(chain[-1]):
            scales = user.target in SCALES and user.args[0] is chain[-1]
            if scales and isinstance(user.args[1], (int, float)) or is_movement(user):
                stack.append([*chain, user])
    return found


def _seen(shadow: Shadow, chain: list[fx.Node], axes: list, scores: list[fx.Node]) -> Lse | None:
    """The end of a chain, its dimensions in the LSE's axes; None where they are mixed."""
    end, factor = chain[-1], 1.0
    own = [sympy.Symbol(f"w{d}", integer=True, nonnegative=True) for d in range(len(shape_of(end)))]
    index: Index = tuple(sympy.S.Zero if n == 1 else w for w, n in zip(own, shape_of(end)))
    ranges = dict(zip(own, shape_of(end)))
    for node in reversed(chain[1:]):
        if node.target in SCALES:
            by = float(sym(node.args[1]))
            factor = factor / by if node.target in SCALES[2:] else factor * by
        else:
            _, index = step_back(node, index, ranges)
    dims: list[list[sympy.Symbol]] = [[] for _ in own]
    for place, symbols in zip(index, axes, strict=True):
        if place in own:
            dims[own.index(place)] = symbols
        elif place != 0 or symbols:
            return None
    return Lse(shadow.dynamo_of[end][0], dims, factor, scores)


def _atomic(position: Expr, sizes: dict[sympy.Symbol, Expr]) -> list[sympy.Symbol] | None:
    """The axes whose mixed-radix number a position is, outermost first; None if it is none."""
    rest, stride, axes = sympy.expand(position), sympy.S.One, []
    while rest != 0:
        axis = next(
            (a for a in rest.free_symbols if a in sizes and same(rest.coeff(a), stride)), None
        )
        if axis is None:
            return None
        axes.insert(0, axis)
        rest, stride = sympy.expand(rest - stride * axis), stride * sizes[axis]
    return axes
