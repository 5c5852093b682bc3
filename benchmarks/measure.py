"""What `benchmarks/run.py` measures beside medians and memory: errors, CUDA graphs, bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fa3_compile.timing import interleaved

# Roundings of the largest element that are forgiven on top of twice eager's own error, as in
# fa3_compile.testing.
FLOOR_ROUNDINGS = 8
GRAPH_CALLS = 10


def graphed(call: Callable[[], Any]) -> Callable[[], None]:
    """GRAPH_CALLS calls as one CUDA graph, so that a kernel of microseconds is not timed by how
    fast Python calls it. Divide the time by GRAPH_CALLS."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(GRAPH_CALLS):
                call()
    torch.cuda.synchronize()
    return graph.replay


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a device-to-device copy of 1 GiB, reads and writes counted."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**24, dtype=torch.uint8).to(device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, device)
    return 2 * source.numel() / times["copy"] * 1e3


@dataclass(frozen=True)
class Error:
    """Largest distance from float64, ours and what the rule allows."""

    ours: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.ours <= self.limit


def error_of(ours: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]) -> Error:
    """The worst of several results, as a share of its limit: twice eager's own error and a floor.

    NaN anywhere gives an infinite error.
    """
    worst = Error(0.0, 1.0)
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        wide = truth.double()
        off = (mine.double() - wide).abs().max().item()
        allowed = (theirs.double() - wide).abs().max().item()
        floor = FLOOR_ROUNDINGS * torch.finfo(mine.dtype).eps * wide.abs().max().item()
        found = Error(off if off == off else float("inf"), 2 * allowed + floor)
        if found.ours / found.limit >= worst.ours / worst.limit:
            worst = found
    return worst
