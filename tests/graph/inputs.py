"""Small tensors for the tests of the pass: [B, H, S, D] = [2, 4, 24, 16] unless said otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

B, H, S, D = 2, 4, 24, 16
SCALE = D**-0.5
INF = float("inf")
LOWEST = torch.finfo(torch.float32).min


# Shapes of what is given beside the scores [B, H, S, S], and how a kernel reads it.
PASSED_IN = {
    "keys": ((S,), "kv"),
    "queries and keys": ((S, S), "q, kv"),
    "keys of each sequence": ((B, 1, 1, S), "b, 0, 0, kv"),
    "keys of each head": ((1, H, 1, S), "0, h, 0, kv"),
    "keys of each sequence and head": ((B, H, 1, S), "b, h, 0, kv"),
    "three axes": ((H, S, S), "h, q, kv"),
    "all axes": ((B, H, S, S), "b, h, q, kv"),
    "one head's": ((1, 1, S, S), "0, 0, q, kv"),
}


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


def of_lengths(*lengths: int, batch: int | None = None, heads: int = H) -> list[tuple[Tensor, ...]]:
    """q, k, v of [batch, heads, length, D] for each length."""
    return [tuple(normal(batch or B, heads, n, D, seed=i) for i in range(3)) for n in lengths]


def large(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """As `qkv`, with scores (at scale 1) of some tens of thousands: beyond a fill of -10000."""
    q, k, v = qkv(*shape, dtype=dtype)
    q, k = ((100 * x).detach().requires_grad_() for x in (q, k))
    return q, k, v


def queries_and_keys(q_len: int = S, kv_len: int = S) -> tuple[Tensor, Tensor]:
    """Positions of queries as a column and of keys as a row."""
    return torch.arange(q_len)[:, None], torch.arange(kv_len)[None, :]


def distance() -> Tensor:
    """[S, S], how far a key is behind its query."""
    rows, columns = queries_and_keys()
    return columns - rows


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


PLAIN = "attention(score=0.25*s)"  # the spec of it


def future(first: int = 1) -> Tensor:
    """[S, S], True at the keys behind a query; with first = 0 at its own too, so that the first
    query has no key."""
    return torch.ones(S, S, dtype=torch.bool).triu(first)


def triangle() -> Tensor:
    """[S, S], 1 at a query's own key and those before it."""
    return torch.ones(S, S).tril()


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain attention to the keys up to the query's own, of any length."""
    n = q.size(-2)
    return attend(scores_of(q, k).masked_fill(torch.ones(n, n).triu(1).bool(), -INF), v)
