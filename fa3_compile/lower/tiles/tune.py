"""Which tile configuration runs, measured on the device: for the families that have a choice.

`autotune="none"` takes the shipped table's; "quick" measures it against a few others, "full"
against all that fit. Measured choices are kept on disk, per spec, shape bucket and device.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TypeVar

import torch

from fa3_compile import resources
from fa3_compile.lower.binaries import cache
from fa3_compile.lower.choose import Problem
from fa3_compile.lower.launch.launch_cuda import beside_captures

log = logging.getLogger(__name__)

KIND = "tuned"
FILE = "config.json"
UNFIT = float("inf")
ConfigT = TypeVar("ConfigT")  # a dataclass


def effort(problem: Problem) -> str:
    """ "none", "quick" or "full": what the user asked for, where measuring is possible.

    Another choice may round differently, so that none is made where the same bits are wanted in
    every run; and a CUDA graph that is being captured must not be waited for.
    """
    if problem.autotune == "none" or problem.deterministic:
        return "none"
    capturing = problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return "none" if capturing else problem.autotune


def tuned(
    problem: Problem,
    family: str,
    compiler: str,
    candidates: Sequence[ConfigT],
    measure: Callable[[ConfigT], float],
) -> ConfigT:
    """The fastest candidate, the first where none can be measured.

    family    name of the kernels that the configurations are for
    compiler  its version: neither another one nor other sources of ours speak for this one
    measure   seconds, or UNFIT for one that does not build, spills or serialises

    One process measures at a time; the others find what it wrote.
    """
    key = _key(problem, family, compiler)
    with cache.lock(KIND, f"{key}.measure"):
        if (stored := _stored(key, candidates)) is not None:
            return stored
        times: dict[ConfigT, float] = {}
        for config in candidates:
            _progress(f"fa3: tuning {family}, {len(times) + 1} of {len(candidates)}: {config}")
            times[config] = measure(config)
        _progress("")
        best = min(times, key=lambda x: times[x])
        if times[best] < UNFIT:
            cache.update(KIND, key, FILE, _record(problem, family, best, times))
            log.info("tuned %s: %s of %d for %s", family, best, len(times), problem.spec)
        return best


def bucket(length: int) -> int:
    """Lengths are tuned by powers of two."""
    return 1 << max(length - 1, 0).bit_length()


def seconds(call: Callable[[], object], repeats: int = 10) -> float:
    """Median time of a call on the current CUDA stream."""
    with beside_captures():
        call()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        events[-1].synchronize()  # and not the device, whose other streams may be captured
    times = sorted(a.elapsed_time(b) for a, b in zip(events, events[1:]))
    return times[repeats // 2] / 1e3


def _key(problem: Problem, family: str, compiler: str) -> str:
    device = "none"
    if problem.device.type == "cuda":
        device = torch.cuda.get_device_name(problem.device)
    shape = (problem.dim, problem.v_dim, bucket(problem.q_len), bucket(problem.kv_len))
    heads = (bucket(problem.batch * problem.heads), problem.group)
    fields = (str(problem.spec), str(problem.dtype), problem.aux_dtypes, shape, heads, device)
    # Some tiles are for calls alone whose LSE nobody reads.
    asked = (problem.autotune, problem.wants_lse)
    sources = (family, compiler, resources.source_hash())
    return hashlib.sha256(repr((fields, asked, sources)).encode()).hexdigest()[:24]


def _record(problem: Problem, family: str, best, times: dict) -> str:
    measured = [
        {"config": asdict(config), "ms": None if t == UNFIT else round(t * 1e3, 4)}
        for config, t in sorted(times.items(), key=lambda x: x[1])
    ]
    record = {
        "family": family,
        "spec": str(problem.spec),
        "config": asdict(best),
        "measured": measured,
    }
    return json.dumps(record, indent=1)


def _stored(key: str, candidates: Sequence[ConfigT]) -> ConfigT | None:
    """The candidate that an earlier process chose: nothing else that may stand in the file."""
    content = cache.read(KIND, key)
    if content is None:
        return None
    try:
        chosen = json.loads(content[FILE])["config"]
    except (KeyError, ValueError, TypeError):
        return None
    return next((x for x in candidates if _as_read(x) == chosen), None)


def _as_read(config) -> dict:
    """Its fields as they come out of JSON: lists for tuples."""
    return json.loads(json.dumps(asdict(config)))


def _progress(line: str) -> None:
    """One line that rewrites itself, on a terminal and in one process only."""
    import torch.distributed as dist

    alone = not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0
    if alone and sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
