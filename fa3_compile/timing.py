"""Medians of calls that take turns, and the memory that a call takes."""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 0.4, 9, 30


def interleaved(calls: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Median milliseconds of each: every round calls each of them once, in an order of its own.

    On a GPU the times are of events on its stream, and the host never waits in between. Rounds
    fill SECONDS. What runs before a call sets the clock it runs at: on an H100, 0.80 ms of a
    backward are 0.90 after a few large products.
    """
    started = time.perf_counter()
    for call in [*calls.values()] * 2:
        call()
    synchronize(device)
    estimate = (time.perf_counter() - started) / 2
    rounds = int(min(max(SECONDS / max(estimate, 1e-6), LEAST_ROUNDS), MOST_ROUNDS))
    stopwatch = _on_cpu
    if device.type == "cuda":
        stopwatch = functools.partial(_on_gpu, torch.cuda.current_stream(device))
    times: dict[str, list[Callable[[], float]]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            times[name].append(stopwatch(calls[name]))
    synchronize(device)
    return {name: statistics.median(read() for read in reads) for name, reads in times.items()}


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Most memory held during the call beyond what was held before it; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def synchronize(device: torch.device) -> None:
    """Waits for the device; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _on_gpu(stream: torch.cuda.Stream, call: Callable[[], Any]) -> Callable[[], float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(stream)
    call()
    end.record(stream)
    return lambda: start.elapsed_time(end)


def _on_cpu(call: Callable[[], Any]) -> Callable[[], float]:
    start = time.perf_counter()
    call()
    milliseconds = (time.perf_counter() - start) * 1e3
    return lambda: milliseconds
