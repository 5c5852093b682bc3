"""Philox4x32-10 in torch operators: `uniform` of the vocabulary, for the reference.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 4.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The four words of each counter; int64 tensors of values below 2**32 that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = _product(MULTIPLIERS[0], c0), _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def _product(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """(upper, lower) 32 bits of a * x, which has 64 and would not fit an int64."""
    upper, lower = a * (x >> 16), a * (x & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, (lower + ((upper & 0xFFFF) << 16)) & WORD


def uniform(
    seed: Tensor | int,
    b: Tensor | int,
    h: Tensor | int,
    q: Tensor | int,
    kv: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`spec.expr.uniform` of integers that broadcast; a tensor of `dtype` in [0, 1)."""
    seed, b, h, q = (torch.as_tensor(x, device=kv.device).to(torch.int64) for x in (seed, b, h, q))
    kv = kv.to(torch.int64)
    words = philox((kv >> 2, q, h, b), (seed & WORD, (seed >> 32) & WORD))
    lane = kv & 3
    word = words[3]
    for i in range(3):
        word = torch.where(lane == i, words[i], word)
    return (word >> 8).to(dtype) * 2.0**-24
