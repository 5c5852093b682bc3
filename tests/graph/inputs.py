"""Small tensors for the tests of the pass: [B, H, S, D] = [2, 4, 24, 16] unless said otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

B, H, S, D = 2, 4, 24, 16
SCALE = D**-0.5
INF = float("inf")
LOWEST = torch.finfo(torch.float32).min


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers that ask for a gradient."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).requires_grad_()


def uniform(*shape: int, seed: int = 0) -> Tensor:
    """Numbers from [0, 1), without gradient."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def chance(probability: float, *shape: int, seed: int = 0) -> Tensor:
    """A boolean tensor, True with that probability."""
    return uniform(*shape, seed=seed) < probability


def qkv(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Three different tensors of the shape, by default [B, H, S, D]."""
    shape = shape or (B, H, S, D)
    q, k, v = (normal(*shape, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    return q, k, v


def large(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """As `qkv`, with scores (at scale 1) of some tens of thousands: beyond a fill of -10000."""
    q, k, v = qkv(*shape, dtype=dtype)
    q, k = ((100 * x).detach().requires_grad_() for x in (q, k))
    return q, k, v


def queries_and_keys(q_len: int = S, kv_len: int = S) -> tuple[Tensor, Tensor]:
    """Positions of queries as a column and of keys as a row."""
    return torch.arange(q_len)[:, None], torch.arange(kv_len)[None, :]


def slope_at_bound() -> float:
    """The gradient of torch.clamp at its bound: 0 since PyTorch 2.14, 1 before."""
    x = torch.zeros((), requires_grad=True)
    return torch.autograd.grad(x.clamp(min=0), x)[0].item()


def attend(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ v


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * SCALE


def weights_of(q: Tensor, k: Tensor) -> Tensor:
    return scores_of(q, k).softmax(-1)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention that does nothing to its scores but scale them."""
    return attend(scores_of(q, k), v)


def future() -> Tensor:
    """[S, S], True at the keys behind a query."""
    return torch.ones(S, S, dtype=torch.bool).triu(1)
