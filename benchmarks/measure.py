"""How `benchmarks/run.py` measures: correctness first, then interleaved medians, then memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Roundings of the largest element that are forgiven on top of twice eager's own error, as in
# fa3_compile.testing.
FLOOR_ROUNDINGS = 8
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 0.6, 7, 40
GRAPH_CALLS = 10


def interleaved(calls: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Median milliseconds of each: every round calls each of them once, in turn.

    On a GPU the times are of events on its stream, and the host never waits in between. Rounds
    fill SECONDS.
    """
    started = time.perf_counter()
    for call in [*calls.values()] * 2:
        call()
    _synchronize(device)
    estimate = (time.perf_counter() - started) / 2
    rounds = int(min(max(SECONDS / max(estimate, 1e-6), LEAST_ROUNDS), MOST_ROUNDS))
    stopwatch = _on_gpu if device.type == "cuda" else _on_cpu
    times: dict[str, list[Any]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(stopwatch(call))
    _synchronize(device)
    return {name: statistics.median(read() for read in reads) for name, reads in times.items()}


def _on_gpu(call: Callable[[], Any]) -> Callable[[], float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    return lambda: start.elapsed_time(end)


def _on_cpu(call: Callable[[], Any]) -> Callable[[], float]:
    start = time.perf_counter()
    call()
    milliseconds = (time.perf_counter() - start) * 1e3
    return lambda: milliseconds


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


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Most memory held during the call beyond what was held before it; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    _synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    _synchronize(device)
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a device-to-device copy of 1 GiB, reads and writes counted."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**24, dtype=torch.uint8).to(device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, device)
    return 2 * source.numel() / times["copy"] * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


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
