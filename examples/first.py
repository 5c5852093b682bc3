"""A first model to look at: python -m fa3_compile explain examples/first.py:make"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class SelfAttention(nn.Module):
    """Causal self-attention with ALiBi, written out as people write it."""

    slopes: torch.Tensor

    def __init__(self, dim: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, heads + 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        at = torch.arange(length, device=x.device)
        distance = at[:, None] - at[None, :]
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = scores - self.slopes[:, None, None] * distance
        weights = F.softmax(scores.masked_fill(distance < 0, float("-inf")), dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, dim))


def make() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """(model, arguments), on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return SelfAttention().to(device, dtype), (
        torch.randn(2, 1024, 128, device=device, dtype=dtype),
    )
