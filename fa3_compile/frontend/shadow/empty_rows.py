"""What rows without a key are in a softmax by hand: NaN, or zeros over a sum kept from 0."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fa3_compile.frontend.shadow.operators import STOP
from fa3_compile.frontend.shadow.row_statistics import MAXIMA, reduction
from fa3_compile.frontend.shadow.safe_softmax import (
    SAME,
    constant,
    hides,
    is_zero,
    made_finite,
    unmasked,
)
from fa3_compile.frontend.shadow.same import same_value

aten = torch.ops.aten

EXPONENTIALS = (aten.exp.default, aten.exp2.default)
PRODUCTS = (aten.bmm.default, aten.mm.default)
# What is finite where its first operand is. A factor counts as finite.
KEEP_FINITE = (
    *SAME,
    aten.clamp.default,
    aten.clone.default,
    aten.div.Tensor,
    aten.leaky_relu.default,
    aten.permute.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.view.default,
)
# What is finite where all its operands are.
COMBINE = (aten.add.Tensor, aten.sub.Tensor, aten.where.self)


def become_zeros(e: fx.Node, divisor: fx.Node, summed: fx.Node) -> bool | None:
    """Whether rows of e / divisor that have no key are zeros: e is 0 there, and the divisor is not.
    False: they are NaN, or what a sink leaves of them. None: they may be either.

    summed  the sum of e that the divisor is made of
    """
    zero = is_zero(divisor, summed)
    exponential = e
    while (inner := unmasked(exponential))[1] is not None:
        exponential = inner[0]
    scores, shift = _shifted(exponential)
    if made_finite(_origin(shift)) is not None:
        return None if zero is None else not zero
    if zero is not False or (shift is None and _is_sink(divisor, summed)):
        return False
    if scores is None:
        return None
    if shift is None or _is_finite(scores) or _is_finite(_reduced(shift)):
        return True
    if exponential is e and same_value(_reduced(shift), scores):
        return False  # -inf less -inf
    return True if _filled_alike(e, scores) else None


def _shifted(e: fx.Node) -> tuple[Any, Any]:
    """(x, m) of exp(x - m), (x, None) of exp(x), (x, x) of softmax(x); (None, None) of others."""
    if e.target is aten._softmax.default:
        return e.args[0], e.args[0]
    if e.target not in EXPONENTIALS:
        return None, None
    x = e.args[0]
    if isinstance(x, fx.Node) and x.target is aten.sub.Tensor:
        return x.args[:2]
    return x, None


def _is_sink(divisor: fx.Node, summed: fx.Node) -> bool:
    """Whether a number is added to the sum, however the sum turns out."""
    plain = divisor.target is aten.add.Tensor
    return (
        plain
        and any(_origin(x) is summed for x in divisor.args)
        and any(constant(x) is not None for x in divisor.args)
    )


def _filled_alike(e: fx.Node, scores: Any) -> bool:
    """Whether scores are -inf only where e, which is NaN then, is filled with 0 as well."""
    fills = []
    while e.target is aten.where.self and (found := unmasked(e))[1] is not None:
        fills.append(found)
        e = found[0]
    if unmasked(e)[1] is not None:
        return False  # NaN times 0
    while isinstance(scores, fx.Node) and scores.target is aten.where.self:
        hidden = any(hides(scores, condition, holds) for _, condition, holds in fills)
        if -math.inf not in map(constant, scores.args[1:]):
            break
        if not hidden:
            return False
        _, a, b = scores.args
        scores = b if constant(a) == -math.inf else a
    return _is_finite(scores)


def _reduced(shift: Any) -> Any:
    """What a maximum is of; itself of anything else."""
    node = _origin(shift)
    if not isinstance(node, fx.Node):
        return node
    reduced = reduction(node)
    return reduced.args[0] if reduced.target in MAXIMA else reduced


def _is_finite(x: Any) -> bool:
    """Whether no score is known to be able to be -inf. A product of queries and keys is finite, a
    tensor of numbers that the program is given may be anything."""
    if not isinstance(x, fx.Node):
        return isinstance(x, (int, float)) and math.isfinite(x)
    number, value = constant(x), x.meta.get("val")
    if number is not None:
        return math.isfinite(number)
    if isinstance(value, torch.Tensor) and not value.dtype.is_floating_point:
        return True
    if x.target in PRODUCTS:
        return True
    if x.target in KEEP_FINITE:
        return _is_finite(x.args[0])
    if x.target is aten.mul.Tensor:
        return any(isinstance(y, fx.Node) and _is_finite(y) for y in x.args)
    return x.target in COMBINE and all(map(_is_finite, x.args))


def _origin(node: Any) -> Any:
    """A node before it was broadcast, or held constant."""
    while isinstance(node, fx.Node) and node.target in (*SAME, STOP):
        node = node.args[0]
    return node
