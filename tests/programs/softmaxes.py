"""Softmaxes of random attention programs as programs write them, weights without one, and sinks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.programs.masks import positions

Scores = Callable[[Tensor], Tensor]


def _shifted(s: Tensor) -> Tensor:
    return s - s.amax(-1, keepdim=True)


def _over_sum(e: Tensor) -> Tensor:
    return e / e.sum(-1, keepdim=True)


def _unshifted(s: Tensor) -> Tensor:
    e = torch.exp(s)
    return e / e.sum(-1).unsqueeze(-1)


def _detached_maximum(s: Tensor) -> Tensor:
    e = torch.exp(s - torch.max(s, dim=-1, keepdim=True).values.detach())
    return e / torch.sum(e, dim=-1, keepdim=True)


def _in_place(s: Tensor) -> Tensor:
    e = (s - s.max(-1, keepdim=True)[0]).exp_()
    return e * e.sum(-1, keepdim=True).reciprocal_()


def _log_sum_by_hand(s: Tensor) -> Tensor:
    top = s.amax(-1, keepdim=True)
    return (s - (top + (s - top).exp().sum(-1, keepdim=True).log())).exp()


def _base_two(s: Tensor) -> Tensor:
    s = s * math.log2(math.e)
    return _over_sum(torch.exp2(s - s.amax(-1, keepdim=True)))


def _off_by_one(s: Tensor) -> Tensor:
    top = s.amax(-1, keepdim=True)
    e = (s - top).exp()
    return e / (e.sum(-1, keepdim=True) + torch.exp(-top))


def _with_zero(s: Tensor) -> Tensor:
    """Off by one, with a maximum that 0 is one of."""
    top = s.amax(-1, keepdim=True).clamp(min=0)
    e = (s - top).exp()
    return e / (e.sum(-1, keepdim=True) + (-top).exp())


def _safe(s: Tensor) -> Tensor:
    """Rows without keys are zeros, here and in the next two."""
    top = s.amax(-1, keepdim=True)
    e = (s - torch.where(top == -math.inf, 0.0, top)).exp()
    total = e.sum(-1, keepdim=True)
    return e / torch.where(total == 0, 1.0, total)


def _finite_maximum(s: Tensor) -> Tensor:
    top = s.amax(-1, keepdim=True)
    e = (s - top.masked_fill(top.isinf(), 0.0)).exp()
    total = e.sum(-1, keepdim=True)
    return e / (total + (total == 0))


def _clamped_sum(s: Tensor) -> Tensor:
    e = (s - s.amax(-1, keepdim=True).nan_to_num(neginf=0.0)).exp()
    return e / e.sum(-1, keepdim=True).clamp(min=1e-6)


def _guarded_sum(s: Tensor) -> Tensor:
    e = _shifted(s).exp()
    total = e.sum(-1, keepdim=True)
    return e / total.masked_fill(total == 0, 1.0)


SOFTMAXES: dict[str, Scores] = {
    "function": lambda s: F.softmax(s, dim=-1),
    "method": lambda s: s.softmax(-1),
    "dtype": lambda s: F.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype),
    "float": lambda s: s.float().softmax(-1).to(s.dtype),
    "log": lambda s: F.log_softmax(s, -1).exp(),
    "softmin": lambda s: F.softmin(-s, dim=-1),
    "by hand": lambda s: _over_sum(_shifted(s).exp()),
    "detached maximum": _detached_maximum,
    "logsumexp": lambda s: (s - s.logsumexp(-1, keepdim=True)).exp(),
    "log of the sum": _log_sum_by_hand,
    "last dim": lambda s: torch.softmax(s, s.dim() - 1),
    "in place": _in_place,
    "base two": _base_two,
    "power of two": lambda s: _over_sum(2 ** (_shifted(s) * math.log2(math.e))),
    "power of e": lambda s: _over_sum(torch.pow(math.e, _shifted(s))),
    "normalize": lambda s: F.normalize(_shifted(s).exp(), p=1.0, dim=-1),
    # In float32 only: exp overflows half precision.
    "unshifted": _unshifted,
    "off by one": _off_by_one,
    "with zero": _with_zero,
    "safe": _safe,
    "finite maximum": _finite_maximum,
    "clamped sum": _clamped_sum,
    "guarded sum": _guarded_sum,
}
# Of a row that is all -inf, or one large negative number, these are no longer the softmax.
NEEDS_KEYS = ("unshifted", "off by one")
# The weights of a row do not sum to 1.
WITH_SINK = ("off by one", "with zero")
# Rows that are all -inf are zeros.
SAFE = ("safe", "finite maximum", "clamped sum")


def _distance(s: Tensor) -> Tensor:
    q, kv = positions(s)
    return kv - q


# Weights that nothing normalises, or the program itself by their sums.
UNNORMALISED: dict[str, Scores] = {
    "sigmoid": lambda s: torch.sigmoid(s - 1),
    "relu": lambda s: F.relu(s) / s.shape[-1],
    "elu": lambda s: F.elu(s) + 1,
    "squared relu": lambda s: F.relu(s).square() / s.shape[-1],
    "silu": lambda s: F.silu(s) / s.shape[-1],
    "retention": lambda s: s * torch.exp(-0.1 * _distance(s).abs()).to(s.dtype),
    "relu of its sum": lambda s: (w := F.relu(s)) / (w.sum(-1, keepdim=True) + 1),
}


def _sink_beside(s: Tensor, sink: Tensor, first: bool) -> Tensor:
    column = sink[:, None, None].expand(*s.shape[:-1], 1)
    return torch.cat((column, s) if first else (s, column), -1)


def _sink_shifted(s: Tensor, sink: Tensor) -> Tensor:
    """As gpt-oss has it."""
    return _shifted(_sink_beside(s, sink, False))


# name -> (scores, parameter [H]) -> scores with more columns, and how to drop them
SINKS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "last": (lambda s, x: _sink_beside(s, x, False), lambda p: p[..., :-1]),
    "first": (lambda s, x: _sink_beside(s, x, True), lambda p: p[..., 1:]),
    "shifted": (_sink_shifted, lambda p: p[..., :-1]),
    "two": (
        lambda s, x: _sink_beside(_sink_beside(s, x, True), x * 0.5, True),
        lambda p: p[..., 2:],
    ),
    "zero": (lambda s, x: F.pad(s, (1, 0)), lambda p: p[..., 1:]),
}


def _seen_over_sum(e: Tensor, seen: Tensor) -> Tensor:
    return _over_sum(e * seen)


def _seen_over_guarded_sum(s: Tensor, seen: Tensor) -> Tensor:
    e = _shifted(s).exp() * seen.to(s.dtype)
    total = e.sum(-1, keepdim=True)
    return e / (total + (total == 0).to(s.dtype))


def _seen_over_clamped_sum(s: Tensor, seen: Tensor) -> Tensor:
    e = _shifted(s).exp().masked_fill(~seen, 0.0)
    return e / e.sum(-1, keepdim=True).clamp(min=1e-6)


def _filled_and_multiplied(s: Tensor, seen: Tensor) -> Tensor:
    s = s.masked_fill(~seen, torch.finfo(s.dtype).min)
    return _seen_over_sum(_shifted(s).exp(), seen)


# The scores' masks hide exponentials, instead.
OF_MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "exponentials multiplied": lambda s, seen: _seen_over_sum(_shifted(s).exp(), seen),
    "exponentials chosen": lambda s, seen: _over_sum(torch.where(seen, _shifted(s).exp(), 0.0)),
    "filled and multiplied": _filled_and_multiplied,
    "over a guarded sum": _seen_over_guarded_sum,
    "over a clamped sum": _seen_over_clamped_sum,
}

ALL = (*SOFTMAXES, *UNNORMALISED, *OF_MASKS)
