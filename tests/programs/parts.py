"""What random attention programs are made of: sizes, fills, score modifiers, scales, and what
scores capture.

Everything takes its sizes and device from the tensors it is given, so that a program may run with
dynamic shapes, and its dtype from the scores, so that float64 eager is the same program.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.programs.choices import Choices
from tests.programs.masks import BATCH, HEADS, positions

Scores = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    """Queries, keys, head dim, and the device of a program's tensors."""

    n: int
    m: int
    dim: int
    device: str


def sizes(choices: Choices, device: str, square: bool = False) -> Sizes:
    """On a GPU such that a kernel has several tiles; `square`: as many queries as keys."""
    on_gpu = device != "cpu"
    n = choices.one_of("n", *((1, 9, 16, 130, 200, 300) if on_gpu else (1, 5, 6, 9, 16)))
    others = (150, 260) if on_gpu else (7, 12)
    m = choices.one_of("m", *((n, *others, *others) if n == 1 else (n, n, *others)))
    dim = choices.one_of("dim", *((8, 32, 64, 80, 128) if on_gpu else (8, 8, 5, 16)))
    return Sizes(m if square else n, m, dim, device)


def normal(seed: int, *shape: int, device: str = "cpu") -> Tensor:
    """The same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


# What is done to the numbers of Q, K and V before the program is given them.
NUMBERS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "": lambda *qkv: qkv,
    "small Q": lambda q, *others: (q * 1e-3, *others),
    "K of zeros": lambda q, k, *others: (q, k * 0, *others),
    "equal keys": lambda q, k, *others: (q, k.mean(-2, keepdim=True).expand_as(k), *others),
    "K off zero": lambda q, k, *others: (q, k + 2, *others),
    "V off zero": lambda q, k, *others: (q, k, *(x + 20 for x in others)),
    "Q of one row of zeros": lambda q, *others: (_without_first(q), *others),
}


def _without_first(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., 0, :] = 0
    return x


FILLS = {
    "-inf": -math.inf,
    "finfo.min": None,
    "-1e30": -1e30,
    "-1e9": -1e9,
    "-65504": -65504.0,
    "-1e4": -1e4,
    "-100": -100.0,
}


def _value(fill: str, like: Tensor) -> float:
    lowest = max(torch.finfo(like.dtype).min, torch.finfo(torch.float32).min)
    value = FILLS[fill]
    return lowest if value is None else value if value == -math.inf else max(value, lowest)


HOWS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "masked_fill": lambda s, seen, x: s.masked_fill(~seen, x),
    "masked_fill_": lambda s, seen, x: (s * 1).masked_fill_(seen.logical_not(), x),
    "where": lambda s, seen, x: torch.where(seen, s, x),
    "where tensor": lambda s, seen, x: torch.where(seen, s, torch.full((), x, dtype=s.dtype)),
    "where other way": lambda s, seen, x: torch.where(~seen, x, s),
    "added": lambda s, seen, x: (
        s + torch.zeros(seen.shape, dtype=s.dtype, device=s.device).masked_fill(~seen, x)
    ),
    "added where": lambda s, seen, x: s + torch.where(seen, 0.0, x).to(s.dtype),
    "added in place": lambda s, seen, x: (s * 1).add_(torch.where(seen, 0.0, x).to(s.dtype)),
    "product": lambda s, seen, x: s + (1.0 - seen.to(s.dtype)) * x,
    "both": lambda s, seen, x: s * seen + (1 - seen.to(s.dtype)) * x,
    "logarithm": lambda s, seen, x: s + seen.to(s.dtype).log(),
    "minimum": lambda s, seen, x: torch.minimum(s, torch.where(seen, math.inf, x).to(s.dtype)),
}
IN_PLACE = ("masked_fill_", "added in place")
NEEDS_FINITE = ("product", "both")


def fill(s: Tensor, seen: Tensor, how: str, name: str) -> Tensor:
    return HOWS[how](s, seen, _value(name, s))


def _distance(s: Tensor) -> Tensor:
    q, kv = positions(s)
    return kv - q


def _slopes(s: Tensor) -> Tensor:
    return torch.tensor([0.5, 0.25, 0.125, 0.0625], device=s.device)[:, None, None]


MODIFIERS: dict[str, Scores] = {
    "softcap": lambda s: 5 * torch.tanh(s / 5),
    "clamp": lambda s: s.clamp(-3, 3),
    "abs": lambda s: s.abs(),
    "cube": lambda s: s + 0.1 * s**3,
    "sigmoid": lambda s: 4 * torch.sigmoid(s),
    "ALiBi": lambda s: s + (_slopes(s) * _distance(s)).to(s.dtype),
    "distance": lambda s: s - 0.1 * _distance(s).abs(),
    "key bias": lambda s: s + positions(s)[1] * 0.03,
    "query bias": lambda s: s + positions(s)[0] * 0.1,
    "half": lambda s: s / 2 + 1,
    "leaky": lambda s: torch.where(s > 0, s, 0.1 * s),
    "relu": lambda s: torch.relu(s) - s * 0.5,
    "in place": lambda s: (s * 1).mul_(0.7).add_(0.2),
    "softplus": lambda s: F.softplus(s),
    "silu": lambda s: s + F.silu(s),
    "gelu": lambda s: F.gelu(s) - 0.3 * s,
    "elu": lambda s: F.elu(s, 0.5),
    "CogView": lambda s: (s / 4 - (s / 4).amax(-1, keepdim=True)) * 4,
    "square root": lambda s: torch.sign(s) * (s.abs() + 0.01).sqrt(),
    "decay": lambda s: s * torch.exp(-0.05 * _distance(s).abs()).to(s.dtype),
}


# Functions of the scores with their masks in.
LATE: dict[str, Scores] = {
    "finite": lambda s: s.nan_to_num(neginf=-20.0),
    "relu": F.relu,
    "elu": F.elu,
    "leaky": F.leaky_relu,
    "clamp": lambda s: s.clamp(-4, 4),
    "tanh": lambda s: 3 * torch.tanh(s / 3),
    "sigmoid": lambda s: 5 * torch.sigmoid(s),
    "maximum": lambda s: torch.maximum(s, 0.3 * s),
    "exp": lambda s: torch.exp(s.clamp(max=3)),
    "half": lambda s: s * 0.5 - 0.25,
    # As BEATs has it, of scores with their masks in.
    "maximum off": lambda s: (s - s.amax(-1, keepdim=True)) * 2,
}


# Of the scores and of V, along the keys, once the scores are made.
SLICES: dict[str, Callable[[int], slice]] = {
    "first": lambda m: slice(0, m - m // 3),
    "last": lambda m: slice(m // 3, None),
    "every other": lambda m: slice(0, None, 2),
}


def scaled(q: Tensor, k: Tensor, scale: str) -> tuple[Tensor, Tensor]:
    dim = q.shape[-1]
    if scale == "on q":
        return q * dim**-0.5, k
    if scale == "on q in place":
        return (q * 1).mul_(dim**-0.5), k
    if scale == "on k":
        return q, k / math.sqrt(dim)
    if scale == "both":
        return q * dim**-0.25, k * dim**-0.25
    return q, k


SCALES = ("after", "on q", "on q in place", "on k", "both", "divided", "tensor", "none", "sharp")


def rescaled(s: Tensor, scale: str, dim: int) -> Tensor:
    if scale == "divided":
        return s / math.sqrt(dim)
    if scale == "tensor":
        return s / torch.sqrt(torch.tensor(dim, dtype=s.dtype))
    if scale == "sharp":
        return s * 20
    return s * dim**-0.5 if scale == "after" else s


def captured(name: str, sizes: Sizes, seed: int):
    """(tensors, (scores, *tensors) -> scores)"""
    n, m, device = sizes.n, sizes.m, sizes.device

    def leaf(i, *shape):
        return normal(seed + i, *shape, device=device).requires_grad_()

    if name == "bias":
        return (leaf(50, 1, HEADS, n, m),), lambda s, x: s + x
    if name == "wide bias":
        return (leaf(54, HEADS, n, m),), lambda s, x: s + x.float()
    if name == "temperature":
        return (leaf(51, HEADS, 1, 1),), lambda s, x: s * x.exp()
    if name == "padding":
        keep = torch.ones(BATCH, m, dtype=torch.long, device=device)
        keep[0, m // 2 :] = 0
        return (keep,), lambda s, x: s.masked_fill(x[:, None, None, :] == 0, -math.inf)
    if name in ("empty sequence", "added empty sequence"):
        keep = torch.ones(BATCH, 1, 1, m, dtype=torch.bool, device=device)
        keep[1] = False
        if name == "empty sequence":
            return (keep,), lambda s, x: s.masked_fill(~x, -math.inf)
        return (keep,), lambda s, x: s + (1.0 - x.to(s.dtype)) * torch.finfo(s.dtype).min
    if name == "additive padding":
        keep = torch.ones(BATCH, m, device=device)
        keep[1, : m // 3] = 0
        return (
            keep,
        ), lambda s, x: s + (1.0 - x[:, None, None, :].to(s.dtype)) * torch.finfo(s.dtype).min
    if name == "random mask":
        seen = normal(seed + 52, BATCH, 1, n, m, device=device) > 0
        return (seen,), lambda s, x: s.masked_fill(~x, -1e4)
    if name == "two paddings":
        some = torch.ones(BATCH, 1, 1, m, device=device)
        some[0, ..., 3 * m // 4 :] = 0
        more = torch.ones(m, device=device)
        more[1::4] = 0

        def both(s: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return s - (x.to(s.dtype) + y.to(s.dtype) - 2) * (_value("finfo.min", s) / 4)

        return (some, more), both
    if name == "documents" and n == m:
        ids = torch.arange(n, device=device) // max(5, n // 4)
        return (ids.expand(BATCH, n).contiguous(),), lambda s, x: torch.where(
            x[:, None, :, None] == x[:, None, None, :], s, torch.finfo(s.dtype).min
        )
    if name == "table":
        return (
            leaf(53, 9, HEADS),
        ), lambda s, x: s + x[_distance(s).clamp(-4, 4) + 4].permute(2, 0, 1)
    if name in ("int32 ids", "seconds"):
        ids = torch.arange(n, device=device) // 3, torch.arange(m, device=device) // 4

        def near(s: Tensor, x: Tensor, y: Tensor) -> Tensor:
            if name == "seconds":
                x, y = x.double() * 60 + 1.7e9, y.double() * 60 + 1.7e9
                return s.masked_fill((x[:, None] - y).abs() > 60, -30.0)
            return s - (x.long()[:, None] - y.long()).abs().to(s.dtype)

        return tuple(x.int() for x in ids), near
    if name == "bytes":
        keep = (torch.arange(m, device=device) % 3 != 1).to(torch.uint8)
        return (keep,), lambda s, x: s + (x - 1).to(s.dtype) * 0.01 - (1 - x.int()) * 0.5
    if name == "slopes":
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device)
        return (slopes,), lambda s, x: s + x[:, None, None] * _distance(s)
    if name == "infinite bias":
        bias = normal(seed + 55, HEADS, n, m, device=device)
        bias[(bias > 0.5) & (torch.arange(m, device=device) > 0)] = -math.inf
        return (bias,), lambda s, x: s + x
    if name == "lengths":
        return (torch.tensor([m, m // 2], device=device),), lambda s, x: s.masked_fill(
            positions(s)[1] >= x[:, None, None, None], -math.inf
        )
    return (), lambda s: s


CAPTURED = (
    "",
    "",
    "bias",
    "wide bias",
    "temperature",
    "padding",
    "empty sequence",
    "added empty sequence",
    "additive padding",
    "two paddings",
    "random mask",
    "documents",
    "table",
    "lengths",
    "int32 ids",
    "seconds",
    "bytes",
    "slopes",
    "infinite bias",
)
