"""What random attention programs do with their weights, between the softmax and V."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.graph.dropout import dropped
from tests.programs.masks import HEADS, MASKS, positions
from tests.programs.parts import Sizes, normal

AFTER = (
    *("", "", "", "", "key gate", "head gate", "dropout", "nan_to_num", "isnan"),
    *("multiplied", "filled", "rows asked for keys"),
    *("gate over its sum", "gate normalised", "multiplied over its sum"),
)  # fmt: skip
# By masks of its own.
OF_MASKS = ("multiplied", "filled", "multiplied over its sum")
# By a tensor of all keys.
OF_KEYS = ("key gate", "gate over its sum", "gate normalised")
REPLACES_NAN = ("nan_to_num", "isnan")
FILLS = ("filled", "rows asked for keys")
# Which makes rows sum to 1 again.
NORMALISES = ("gate over its sum", "gate normalised", "multiplied over its sum")


def after(name: str, masks: Sequence[str], sizes: Sizes, seed: int):
    """(tensors, (weights, what the scores' masks show or None, *tensors) -> weights)"""

    def leaf(i, *shape):
        return normal(seed + i, *shape, device=sizes.device).requires_grad_()

    def shown(p: Tensor) -> list[Tensor]:
        return [MASKS[mask](*positions(p)) for mask in masks]

    if name == "key gate":
        return (leaf(70, sizes.m),), lambda p, seen, x: p * torch.sigmoid(x)
    if name == "head gate":
        return (leaf(71, HEADS, 1, 1),), lambda p, seen, x: p * x
    if name == "gate over its sum":
        return (leaf(70, sizes.m),), lambda p, seen, x: _over_sum(p * torch.sigmoid(x))
    if name == "gate normalised":
        return (leaf(70, sizes.m),), lambda p, seen, x: F.normalize(p * x.sigmoid(), p=1, dim=-1)
    return (), lambda p, seen: _WITHOUT_TENSORS.get(name, _as_it_is)(p, seen, shown)


def _over_sum(p: Tensor) -> Tensor:
    return p / p.sum(-1, keepdim=True)


def _as_it_is(p: Tensor, seen: Tensor | None, shown: Callable) -> Tensor:
    return p


def _multiplied(p: Tensor, seen: Tensor | None, shown: Callable) -> Tensor:
    for mask in shown(p):
        p = p * mask.to(p.dtype)
    return p


def _filled(p: Tensor, seen: Tensor | None, shown: Callable) -> Tensor:
    for mask in shown(p):
        p = p.masked_fill(~mask, 0.0)
    return p


def _rows_asked(p: Tensor, seen: Tensor | None, shown: Callable) -> Tensor:
    return p if seen is None else p.masked_fill(seen.sum(-1, keepdim=True) == 0, 0.0)


def _multiplied_over_sum(p: Tensor, seen: Tensor | None, shown: Callable) -> Tensor:
    p = _multiplied(p, seen, shown)
    return p / (p.sum(-1, keepdim=True) + 1e-6)


_WITHOUT_TENSORS: dict[str, Callable[[Tensor, Tensor | None, Callable], Tensor]] = {
    "dropout": lambda p, seen, shown: dropped(p, 0.25),
    "nan_to_num": lambda p, seen, shown: p.nan_to_num(0.0),
    "isnan": lambda p, seen, shown: p.masked_fill(p.isnan(), 0.0),
    "multiplied": _multiplied,
    "filled": _filled,
    "rows asked for keys": _rows_asked,
    "multiplied over its sum": _multiplied_over_sum,
}
