"""The shipped tile configurations of the Triton forward kernel, and others worth measuring."""

from __future__ import annotations

import functools
from dataclasses import asdict

from fa3_compile.lower.choose import Problem
from fa3_compile.lower.config import TritonConfig, bits, head_class, nearest_arch
from fa3_compile.lower.hoist import arrange
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.expr import KV, Q, S, loads_in

# Beside the table's choice.
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
    ((9, 0), 64): (C(128, 128, 4, 3), C(128, 64, 4, 4)),
    ((9, 0), 96): (C(128, 128, 8, 2), C(64, 64, 4, 3)),
    ((9, 0), 128): (C(128, 128, 8, 3), C(64, 64, 4, 3)),
    ((9, 0), 192): (C(128, 64, 8, 2), C(64, 32, 4, 3)),
    ((9, 0), 256): (C(128, 64, 8, 2, tma=True), C(128, 64, 8, 2)),
    ((10, 0), 64): (C(128, 128, 8, 3, tma=True), C(128, 128, 8, 3, tma=True)),
    ((10, 0), 96): (C(128, 64, 8, 3, tma=True), C(128, 64, 8, 3, tma=True)),
    ((10, 0), 128): (C(128, 128, 8, 2, tma=True), C(128, 64, 8, 3, tma=True)),
    ((10, 0), 192): (C(128, 64, 8, 2, tma=True), C(128, 64, 8, 2, tma=True)),
    ((10, 0), 256): (C(128, 32, 8, 3, tma=True), C(128, 32, 8, 3, tma=True)),
}
TABLE |= {((12, 0), d): x for (arch, d), x in list(TABLE.items()) if arch == (8, 9)}
# With a factor after the softmax, where the numbers of dropout need registers of their own: causal
# on an H100 0.52 ms, the others' tile 0.63.
WEIGHTED = {((9, 0), 64): C(64, 64, 4, 3)}
# Instead of `other` where a tensor is loaded for each query and key.
DENSE = {((9, 0), 128): C(128, 64, 8, 3)}
# float32 multiplies without tensor cores ("ieee"): small tiles, the same everywhere.
FLOAT32 = {
    64: C(32, 32, 4, 2),
    96: C(32, 32, 4, 2),
    128: C(32, 32, 8, 2),
    192: C(32, 16, 8, 2),
    256: C(32, 16, 8, 2),
}
# Devices that share another's row: the shared memory of sm_86 is sm_89's, of sm_87 sm_80's.
ROW = {(8, 6): (8, 9), (8, 7): (8, 0)}


@functools.lru_cache(maxsize=4096)
def is_plain(spec: AttentionSpec) -> bool:
    """Whether an element of the score costs one FFMA: a scale, and no mask."""
    plain = not spec.has_mask and spec.weight is None and not spec.sinks
    return plain and arrange(spec.score).x == S


@functools.lru_cache(maxsize=4096)
def _is_dense(spec: AttentionSpec) -> bool:
    return any({Q, KV} <= x.free_symbols for x in loads_in(spec.score))


def table_config(problem: Problem) -> TritonConfig:
    """The shipped configuration."""
    if bits(problem.dtype) == 32:
        return FLOAT32[head_class(problem)].for_queries(problem.q_len)
    arch = nearest_arch(problem.capability or (8, 0))
    row = ROW.get(arch, arch), head_class(problem)
    plain, other = TABLE[row]
    config = plain if is_plain(problem.spec) else other
    if _is_dense(problem.spec):
        config = DENSE.get(row, config)
    if problem.spec.weight is not None:
        config = WEIGHTED.get((arch, head_class(problem)), config)
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


def candidates(problem: Problem) -> list[TritonConfig]:
    """What `autotune` measures, the table's choice first."""
    capability = problem.capability or (8, 0)
    first = table_config(problem)
    fitting = [
        x
        for x in _candidates(capability, problem.dtype.itemsize)
        if x != first and x.fits(problem, capability) and x.block_q <= max(16, 2 * problem.q_len)
    ]
    if problem.autotune == "quick":
        # Neighbours of the table's choice: one thing changed, or the tensor descriptors added.
        def distance(x: TritonConfig) -> int:
            return sum(a != b for a, b in zip(asdict(x).values(), asdict(first).values()))

        fitting = sorted(fitting, key=distance)[:QUICK]
    return [first, *fitting]
