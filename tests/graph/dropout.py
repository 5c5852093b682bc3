"""Dropout that can be compared: eager code whose dropout draws what a fused one draws.

A fused attention cannot repeat the random numbers of eager's dropout, but its own are known: a
seed by `torch.randint` where the program drops, and `uniform` of that seed and of (b, h, q, kv).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fa3_compile.lower.printers.philox import uniform
from fa3_compile.report import Report, collect
from tests.graph.harness import rewrite_only

Drop = Callable[[Tensor, float], Tensor]


def drawn_as_fused(weights: Tensor, p: float) -> Tensor:
    """Dropout of weights [.., H, Sq, Skv] (batches flattened) by the numbers of a fused one."""
    device, shape = weights.device, (-1, *weights.shape[-3:])
    seed = torch.randint(2**63 - 1, (1,), device=device)
    places = (torch.arange(n, device=device) for n in weights.view(shape).shape)
    b, h, q, kv = torch.meshgrid(*places, indexing="ij")
    keeps = (uniform(seed, b, h, q, kv) >= p).view(weights.shape)
    return weights * keeps / (1 - p)


def dropped(weights: Tensor, p: float) -> Tensor:
    """Dropout where it is compiled, and in eager what a fused one drops."""
    return (F.dropout if torch.compiler.is_compiling() else drawn_as_fused)(weights, p)


def check_dropout(
    made: Callable[[Drop], Callable[..., Tensor]], *args: Tensor, backend=rewrite_only
) -> Report:
    """What became of `made(F.dropout)`; outputs and gradients are those of
    `made(drawn_as_fused)` in eager, from the same `manual_seed`."""

    def run(function) -> list[Tensor]:
        torch.manual_seed(0)
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in args]
        out = function(*leaves)
        wanted = [x for x in leaves if x.requires_grad]
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        return [out.detach(), *(x.grad for x in wanted if x.grad is not None)]

    torch._dynamo.reset()
    with collect() as report:
        ours = run(torch.compile(made(F.dropout), backend=backend))
    torch.testing.assert_close(ours, run(made(drawn_as_fused)), atol=2e-5, rtol=2e-5)
    return report
