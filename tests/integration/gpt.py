"""A small GPT in eager PyTorch, the backend that its tests compile it with, and its training."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils.checkpoint import checkpoint

from fa3_compile import report
from fa3_compile.backend import fa3
from fa3_compile.options import Options
from fa3_compile.pipeline import rewrite_attention
from fa3_compile.testing import Result, assert_close_to_oracle

VOCABULARY, LENGTH, HEADS, WIDTH = 17, 16, 2, 16


class Attention(nn.Module):
    """Causal, with a learned bias of the distance."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.zeros(HEADS, 2 * LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        at = torch.arange(n, device=x.device)
        distance = at[:, None] - at
        scores = q @ k.mT / math.sqrt(q.shape[-1]) + self.bias[:, distance + LENGTH]
        scores = scores.masked_fill(distance < 0, -math.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = Attention()
        self.inner = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.inner(self.norms[1](x))


class GPT(nn.Module):
    """wrapped   how each block is called: as it is, or checkpointed"""

    def __init__(self, layers: int = 1, wrapped: Callable | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.wrapped = wrapped

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean cross entropy of the next token."""
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x) if self.wrapped is None else self.wrapped(block, x)
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


def batch(size: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (size, LENGTH), generator=generator)


def rewritten(gm: torch.fx.GraphModule, inputs: list, **_):
    """backend="fa3" without Inductor's compile time: the pass, AOTAutograd, the partitioner."""
    rewrite_attention(gm, Options(kernels=("reference",), strict=True), report.enter_graph())
    return lookup_backend("aot_eager_decomp_partition")(gm, inputs)


def compiled(model: Callable, device: str = "cpu", **kwargs) -> Callable:
    """By `rewritten`; for a GPU with the kernels that are chosen there."""
    backend = rewritten if device == "cpu" else fa3
    return torch.compile(model, backend=backend, **kwargs)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def step(model: Callable, tokens: Tensor, device: str) -> None:
    """The gradients of one batch, on a GPU under autocast to bfloat16."""
    kind = torch.device(device).type
    with torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu"):
        loss = model(tokens.to(device))
    loss.backward()


def assert_as_close_as_eager(
    ours: dict[str, Tensor], eager: dict[str, Tensor], tokens: Tensor, layers: int = 1
) -> None:
    """By the rule of fa3_compile.testing; the oracle is the GPT on one batch."""
    exact = GPT(layers).double()
    exact(tokens).backward()
    there = ({n: g.cpu() for n, g in found.items()} for found in (ours, eager, gradients(exact)))
    assert_close_to_oracle(*(Result({}, x) for x in there))


def assert_same_gradients(ours: nn.Module, eager: nn.Module, tolerance: float = 1e-5) -> None:
    expected = gradients(eager)
    assert expected
    torch.testing.assert_close(gradients(ours), expected, atol=tolerance, rtol=tolerance)
