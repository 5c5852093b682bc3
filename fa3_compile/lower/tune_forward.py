"""Which TritonConfig an attention runs with: a shipped table, or measured on the device.

"none" takes the table's; "quick" measures it against the most promising others, "full" against
all that fit. Measured choices are kept on disk, per spec, shape bucket and device.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict

import torch

from fa3_compile.lower import cache
from fa3_compile.lower.choose import Problem
from fa3_compile.lower.config import TritonConfig, bits, head_class, nearest_arch
from fa3_compile.lower.hoist import arrange
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.expr import S

log = logging.getLogger(__name__)

KIND = "tuned"
QUICK = 4

# (arch, head class) -> the tile of a plain score without a mask, and of any other, for 16 bits.
# Each is the largest that compiles without a spill (tests/numerics/test_triton_compile.py).
C = TritonConfig
TABLE: dict[tuple[tuple[int, int], int], tuple[TritonConfig, TritonConfig]] = {
    ((8, 0), 64): (C(128, 64, 4, 3), C(128, 32, 4, 3)),
    ((8, 0), 96): (C(128, 64, 8, 3), C(128, 64, 8, 3)),
    ((8, 0), 128): (C(128, 64, 8, 3), C(128, 64, 8, 3)),
    ((8, 0), 192): (C(128, 32, 8, 2), C(128, 16, 8, 2)),
    ((8, 0), 256): (C(64, 32, 8, 2), C(64, 32, 8, 2)),
    ((8, 9), 64): (C(128, 64, 4, 2), C(128, 32, 4, 3)),
    ((8, 9), 96): (C(128, 32, 8, 2), C(128, 32, 8, 2)),
    ((8, 9), 128): (C(128, 32, 8, 2), C(128, 32, 8, 2)),
    ((8, 9), 192): (C(128, 16, 8, 2), C(128, 16, 8, 2)),
    ((8, 9), 256): (C(64, 32, 8, 2), C(64, 32, 8, 2)),
    ((9, 0), 64): (C(128, 128, 4, 3), C(128, 64, 4, 3)),
    ((9, 0), 96): (C(128, 128, 8, 2), C(128, 64, 8, 3)),
    ((9, 0), 128): (C(128, 128, 8, 2), C(128, 64, 8, 3)),
    ((9, 0), 192): (C(128, 64, 8, 2), C(128, 64, 8, 2)),
    ((9, 0), 256): (C(128, 64, 8, 2), C(128, 32, 8, 3)),
    ((10, 0), 64): (C(128, 128, 8, 3, tma=True), C(128, 128, 8, 3, tma=True)),
    ((10, 0), 96): (C(128, 64, 8, 3, tma=True), C(128, 64, 8, 3, tma=True)),
    ((10, 0), 128): (C(128, 128, 8, 2, tma=True), C(128, 64, 8, 3, tma=True)),
    ((10, 0), 192): (C(128, 64, 8, 2, tma=True), C(128, 64, 8, 2, tma=True)),
    ((10, 0), 256): (C(128, 32, 8, 3, tma=True), C(128, 32, 8, 3, tma=True)),
}
TABLE |= {((12, 0), d): x for (arch, d), x in list(TABLE.items()) if arch == (8, 9)}
# float32 multiplies without tensor cores ("ieee"): small tiles, the same everywhere.
FLOAT32 = {
    64: C(64, 32, 8, 2),
    96: C(64, 32, 8, 2),
    128: C(32, 32, 8, 2),
    192: C(32, 16, 8, 2),
    256: C(32, 16, 8, 2),
}
# Devices that share another's row: the shared memory of sm_86 is sm_89's, of sm_87 sm_80's.
ROW = {(8, 6): (8, 9), (8, 7): (8, 0)}


@functools.lru_cache(maxsize=4096)
def is_plain(spec: AttentionSpec) -> bool:
    """Whether an element of the score costs one FFMA: a scale, and no mask."""
    return not spec.has_mask and arrange(spec.score).x == S and not spec.sinks


def table_config(problem: Problem) -> TritonConfig:
    """The shipped configuration."""
    if bits(problem.dtype) == 32:
        return FLOAT32[head_class(problem)].for_queries(problem.q_len)
    arch = nearest_arch(problem.capability or (8, 0))
    plain, other = TABLE[ROW.get(arch, arch), head_class(problem)]
    config = plain if is_plain(problem.spec) else other
    return config.for_queries(problem.q_len)


@functools.lru_cache(maxsize=1024)
def _candidates(capability: tuple[int, int], item: int) -> tuple[TritonConfig, ...]:
    tma = (False, True) if capability >= (9, 0) and item == 2 else (False,)
    return tuple(
        TritonConfig(q, kv, warps, stages, tma=descriptors)
        for descriptors in tma
        for q, warps in ((64, 4), (128, 4), (128, 8), (256, 8), (32, 4), (16, 4))
        for kv in (128, 64, 32, 16)
        for stages in (3, 2, 4, 1)
    )


def candidates(problem: Problem, effort: str) -> list[TritonConfig]:
    """What "quick" or "full" measures, the table's choice first."""
    capability = problem.capability or (8, 0)
    first = table_config(problem)
    fitting = [
        x
        for x in _candidates(capability, problem.dtype.itemsize)
        if x != first and x.fits(problem, capability) and x.block_q <= max(16, 2 * problem.q_len)
    ]
    if effort == "quick":
        # Neighbours of the table's choice: one thing changed, or the tensor descriptors added.
        def distance(x: TritonConfig) -> int:
            return sum(a != b for a, b in zip(asdict(x).values(), asdict(first).values()))

        fitting = sorted(fitting, key=distance)[:QUICK]
    return [first, *fitting]


def tuned_config(
    problem: Problem, effort: str, measure: Callable[[TritonConfig], float]
) -> TritonConfig:
    """The fastest candidate; `measure` gives seconds, or infinity where one does not build."""
    key = _key(problem, effort)
    if (stored := _stored(key)) is not None:
        return stored
    times: dict[TritonConfig, float] = {}
    for config in candidates(problem, effort):
        times[config] = measure(config)
        _progress(f"fa3: tuning {len(times)} {config}: {times[config] * 1e3:.3f} ms")
    _progress("")
    best = min(times, key=lambda x: times[x])
    cache.update(KIND, key, "config.json", json.dumps(asdict(best), indent=1))
    log.info("tuned %s: %s", problem.spec, best)
    return best


def bucket(length: int) -> int:
    """Lengths are tuned by powers of two."""
    return 1 << max(length - 1, 0).bit_length()


def _key(problem: Problem, effort: str) -> str:
    device = "none"
    if problem.device.type == "cuda":
        device = torch.cuda.get_device_name(problem.device)
    shape = (problem.dim, problem.v_dim, bucket(problem.q_len), bucket(problem.kv_len))
    heads = (bucket(problem.batch * problem.heads), problem.group)
    # Neither Triton nor the table of an older release speaks for this one.
    import triton

    fields = (str(problem.spec), str(problem.dtype), shape, heads, device, triton.__version__)
    return hashlib.sha256(repr((fields, effort, _sources())).encode()).hexdigest()[:24]


def _sources() -> str:
    from fa3_compile.lower.render_forward import ForwardKey

    return ForwardKey(AttentionSpec(), 64, 64).digest


def _stored(key: str) -> TritonConfig | None:
    if not cache.valid(KIND, key):
        return None
    try:
        return TritonConfig(**json.loads((cache.folder(KIND, key) / "config.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _progress(line: str) -> None:
    """One line that rewrites itself, on a terminal and in one process only."""
    import torch.distributed as dist

    alone = not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0
    if alone and sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
