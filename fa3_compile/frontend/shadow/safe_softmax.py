"""Softmaxes by hand that are made safe for rows without keys: the maximum that is taken off is
finite in them as well, and what the exponentials are divided by is not 0."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from fa3_compile.frontend.lift.elements.rows_without_keys import NOT, is_infinite
from fa3_compile.frontend.shadow.same import same_value

aten = torch.ops.aten

SAME = (
    aten._to_copy.default,
    aten.alias.default,
    aten.detach.default,
    aten.expand.default,
    aten.unsqueeze.default,
)
ARITHMETIC = {
    aten.add.Tensor: operator.add,
    aten.maximum.default: max,
    aten.eq.Scalar: operator.eq,
    aten.ne.Scalar: operator.ne,
    aten.gt.Scalar: operator.gt,
    aten.ge.Scalar: operator.ge,
    aten.lt.Scalar: operator.lt,
    aten.le.Scalar: operator.le,
}


def made_finite(node: Any) -> fx.Node | None:
    """m of `where(isfinite(m), m, 0)` or `nan_to_num(m)`: m, and a number where it is infinite."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.nan_to_num.default:
        x, *numbers = node.args
        return x if all(n is None or math.isfinite(n) for n in numbers) else None  # pyright: ignore
    if node.target is not aten.where.self:
        return None
    condition, *branches = node.args
    found = is_infinite(condition)
    if found is None:
        return None
    x, infinite = found
    instead, kept = branches if infinite else branches[::-1]
    number = constant(instead)
    return x if number is not None and math.isfinite(number) and same_value(kept, x) else None


def unmasked(e: fx.Node) -> tuple[fx.Node, fx.Node | None, bool]:
    """(x, condition, holds) of what is x, and 0 where the condition is `holds`; None for a
    condition where it is not."""
    if e.target is aten.where.self:
        condition, a, b = e.args
        for x, instead, holds in ((b, a, True), (a, b, False)):
            if constant(instead) == 0:
                return (x, *_positive(condition, holds))  # pyright: ignore
    if e.target is aten.mul.Tensor:
        for x, mask in (e.args, e.args[::-1]):
            if _is_mask(mask):
                return (x, *_positive(mask, False))  # pyright: ignore
    return e, None, True


def hides(x: Any, condition: fx.Node, holds: bool) -> bool:
    """Whether x is -inf where the condition is `holds`."""
    while isinstance(x, fx.Node) and x.target is aten.where.self:
        given, *branches = x.args
        for filled, rest, when in ((*branches, True), (*branches[::-1], False)):
            if constant(filled) == -math.inf:
                mine, held = _positive(given, when)
                if held == holds and same_value(mine, condition):
                    return True
                x = rest
                break
        else:
            return False
    return False


def is_zero(divisor: fx.Node, summed: fx.Node) -> bool | None:
    """Whether a divisor is 0 where the sum that it is made of is; None where that is unknown."""
    value = _where_zero(divisor, summed)
    if value is None:
        return None
    return torch.tensor(value, dtype=divisor.meta["val"].dtype).item() == 0


def _where_zero(node: Any, summed: fx.Node) -> float | None:
    if node is summed:
        return 0.0
    number = constant(node)
    if number is not None or not isinstance(node, fx.Node):
        return number
    if node.target in SAME:
        return _where_zero(node.args[0], summed)
    if node.target is aten.where.self:
        condition, a, b = (_where_zero(x, summed) for x in node.args)
        return None if condition is None else a if condition else b
    if node.target is aten.clamp.default:
        x, low, *high = node.args
        value, floor = _where_zero(x, summed), constant(low)
        return None if value is None or floor is None or any(high) else max(value, floor)
    combine = ARITHMETIC.get(node.target)  # pyright: ignore[reportArgumentType]
    if combine is None or node.kwargs or len(node.args) != 2:
        return None
    a, b = (_where_zero(x, summed) for x in node.args)
    return None if a is None or b is None else float(combine(a, b))


def constant(x: Any) -> float | None:
    """A number, or the one that a tensor is full of."""
    while isinstance(x, fx.Node) and x.target in SAME:
        x = x.args[0]
    if isinstance(x, fx.Node):
        if x.target in (aten.full.default, aten.full_like.default):
            x = x.args[1]
        elif x.target is aten.scalar_tensor.default:
            x = x.args[0]
    return float(x) if isinstance(x, (int, float)) else None


def _positive(condition: Any, holds: bool) -> tuple[Any, bool]:
    """The condition without negations and casts, and the value at which it says the same."""
    while isinstance(condition, fx.Node) and (
        condition.target in NOT or condition.target is aten._to_copy.default
    ):
        holds ^= condition.target in NOT
        condition = condition.args[0]
    return condition, holds


def _is_mask(x: Any) -> bool:
    while isinstance(x, fx.Node) and x.target is aten._to_copy.default:
        x = x.args[0]
    return isinstance(x, fx.Node) and x.meta["val"].dtype == torch.bool
