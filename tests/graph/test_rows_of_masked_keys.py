"""Gradients of rows that see nothing but keys with a mask's fill, which an LSE near float32's
limits does not tell apart: padding on the left, added, beside a causal mask."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fa3_compile.options import Options
from fa3_compile.pipeline import rewrite_attention
from fa3_compile.report import Report
from fa3_compile.testing import assert_matches_eager

INF = float("inf")
LOWEST = torch.finfo(torch.float32).min
LENGTH = 24


def on_cpu(gm: torch.fx.GraphModule, _):
    rewrite_attention(gm, Options(kernels=("cpu", "reference"), strict=True), "graph")
    return gm


def check(function, *captured: Tensor) -> Report:
    def attention(q, k, v, *captured):
        s = q @ k.mT / math.sqrt(q.shape[-1])
        return torch.softmax(function(s, *captured), -1) @ v

    generator = torch.Generator().manual_seed(3)
    qkv = [torch.randn(2, 2, LENGTH, 8, generator=generator).requires_grad_() for _ in range(3)]
    return assert_matches_eager(attention, *qkv, *captured, backend=on_cpu, training=True)


def padding(fill: float) -> Tensor:
    return torch.zeros(2, 1, 1, LENGTH).index_fill(3, torch.arange(5), fill)


def causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("fill", [LOWEST, -1e30])
def test_left_padding_beside_a_causal_mask(fill: float) -> None:
    report = check(lambda s, added: (s + added).masked_fill(causal(), -INF), padding(fill))
    assert [x.kernel for x in report.regions] == ["reference"]
    report = check(
        lambda s, added: (s + added).masked_fill(causal(), LOWEST), padding(max(fill, -1e30))
    )
    assert [x.kernel for x in report.regions] == ["reference"]


@pytest.mark.parametrize("fill", [LOWEST, -1e30, -INF])
def test_masks_that_are_added(fill: float) -> None:
    """Nothing but a bias: it says which keys are hidden by more of them than others."""
    rows = torch.zeros(LENGTH, 1).index_fill(0, torch.tensor([3]), fill)
    seen = torch.zeros(LENGTH, LENGTH).masked_fill(causal(), fill)
    for left in (rows, seen):
        report = check(lambda s, keys, left: s + keys + left, padding(fill), left)
        assert [x.kernel for x in report.regions] == ["cpu"]


def test_masks_that_are_chosen_and_added() -> None:
    padded, rows = padding(1.0) > 0, torch.arange(LENGTH)[:, None] == 3
    report = check(
        lambda s, x, y: s + torch.where(x, -1e9, 0.0) + torch.where(y, -1e9, 0.0), padded, rows
    )
    assert [x.kernel for x in report.regions] == ["cpu"]


@pytest.mark.parametrize("fill", [LOWEST, -INF])
def test_whole_heads_that_are_hidden(fill: float) -> None:
    check(lambda s, heads: s + heads, torch.tensor([fill, 0.0]).view(2, 1, 1))


def test_what_hides_alone_keeps_its_kernel() -> None:
    left = [
        (lambda s, added: s + added, padding(LOWEST)),
        (lambda s, padded: s.masked_fill(padded | causal(), -INF), padding(1.0) > 0),
        (lambda s, slope: s - slope * torch.arange(LENGTH).flip(0), torch.rand(2, 1, 1)),
    ]
    for function, captured in left:
        assert [x.kernel for x in check(function, captured).regions] == ["cpu"]
