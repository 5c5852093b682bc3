"""Tensors of any broadcast shape that scores of random attention programs meet: masks, biases, factors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.programs.masks import BATCH, HEADS
from tests.programs.parts import Sizes, normal

# What a shape has of the scores' axes, or 1.
SHAPES = ("", "1", "k", "1k", "q1", "qk", "h11", "h1k", "hq1", "hqk", "b111", "b11k", "b1q1", "b1qk", "bh11", "1hqk", "bhqk")  # fmt: skip


def _lowest(s: Tensor) -> float:
    return max(torch.finfo(s.dtype).min, torch.finfo(torch.float32).min)


# Of numbers, whose gradients are compared.
NUMBERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "added": lambda s, x: s + x,
    "taken off": lambda s, x: s - x,
    "added wide": lambda s, x: s + x.float(),
    "factor": lambda s, x: s * x,
    "divisor": lambda s, x: s / (x.abs() + 0.5),
    "exponential": lambda s, x: s * x.clamp(max=1.5).exp(),
    "gate": lambda s, x: s * torch.sigmoid(x),
    "logarithm of a gate": lambda s, x: s + torch.sigmoid(x).log(),
    "softcap": lambda s, x: (x.abs() + 1) * torch.tanh(s / (x.abs() + 1)),
    "power": lambda s, x: torch.sign(s) * (s.abs() + 0.1) ** (x.abs().clamp(max=1) + 0.5),
    "between": lambda s, x: torch.lerp(s, s.tanh(), torch.sigmoid(x).to(s.dtype)),
    "least": lambda s, x: torch.maximum(s, x),
    "detached": lambda s, x: s + x.detach() - 0.3 * x,
}
# Of booleans that hide keys; the first key is seen.
MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "filled": lambda s, x: s.masked_fill(~x, -math.inf),
    "filled with the least": lambda s, x: torch.where(x, s, _lowest(s)),
    "filled with -1e9": lambda s, x: s.masked_fill(x.logical_not(), max(-1e9, _lowest(s))),
    "integers": lambda s, x: s.masked_fill(x.long() == 0, -math.inf),
    "bytes": lambda s, x: s.masked_fill(x.to(torch.uint8) < 1, -math.inf),
    "added": lambda s, x: s + torch.zeros_like(x, dtype=s.dtype).masked_fill(~x, -math.inf),
    "wide": lambda s, x: (s.float() + torch.where(x, 0.0, -math.inf)).to(s.dtype),
    "logarithm": lambda s, x: s + x.to(s.dtype).log(),
}
# Of numbers that are 0 and -inf, as a mask that was made before.
ADDED = "as it is added"
# Of 1 and 0, as tokenizers give it.
ADDITIVE = "inverted"

# Kinds that make scores many times as large, that add -inf, and that hide keys.
FACTORS = ("number factor", "number divisor", "number exponential")
INFINITE = (ADDED, *(f"mask {kind}" for kind in ("added", "wide", "logarithm")))
HIDING = (ADDED, ADDITIVE, *(f"mask {kind}" for kind in MASKS))


def names() -> tuple[str, ...]:
    """Each kind with each shape that it may have."""
    hiding = [x for x in SHAPES if x.endswith("k")]
    found = [f"given {x or '0'} number {kind}" for x in SHAPES for kind in NUMBERS]
    found += [f"given {x} mask {kind}" for x in hiding for kind in MASKS]
    found += [f"given {x} {kind}" for x in hiding for kind in (ADDED, ADDITIVE)]
    return tuple(found)


def given(name: str, sizes: Sizes, seed: int):
    """(tensors, (scores, *tensors) -> scores) of one of `names`."""
    _, axes, kind = name.split(" ", 2)
    lengths = {"b": BATCH, "h": HEADS, "q": sizes.n, "k": sizes.m, "1": 1}
    shape = [] if axes == "0" else [lengths[x] for x in axes]
    x = normal(seed + 56, *shape, device=sizes.device)
    if kind.startswith("number "):
        return (x.requires_grad_(),), NUMBERS[kind.removeprefix("number ")]
    seen = x > -0.5
    seen[..., 0] = True
    if kind.startswith("mask "):
        return (seen,), MASKS[kind.removeprefix("mask ")]
    if kind == ADDED:
        return (torch.zeros_like(x).masked_fill(~seen, -math.inf),), lambda s, x: s + x
    return (seen.float(),), lambda s, x: s + (1.0 - x.to(s.dtype)) * _lowest(s)
