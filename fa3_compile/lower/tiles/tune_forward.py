"""The shipped tile configurations of the Triton forward kernel, and others worth measuring."""

from __future__ import annotations

import functools
from dataclasses import asdict, replace

from fa3_compile.lower.choose import Problem
from fa3_compile.lower.printers.hoist import arrange
from fa3_compile.lower.render.render import padded
from fa3_compile.lower.tiles.config import (
    FEW_QUERIES,
    TritonConfig,
    bits,
    head_class,
    is_wide,
    nearest_arch,
)
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.blocks import kv_bounds, kv_full_bounds
from fa3_compile.spec.expr import KV, H, Q, S, loads_in

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
# Of heads wider than those: architecture -> the tile up to each width.
WIDE = {
    (8, 0): {576: C(32, 32, 8, 2), 768: C(16, 32, 8, 1), 1024: C(16, 16, 8, 1)},
    (8, 9): {
        320: C(32, 32, 8, 2),
        576: C(32, 32, 8, 1),
        768: C(16, 32, 8, 1),
        1024: C(16, 16, 8, 1),
    },
    (9, 0): {
        320: C(64, 64, 8, 2, tma=True),
        384: C(64, 32, 8, 3, tma=True),
        576: C(64, 32, 8, 2, tma=True),
        768: C(32, 16, 8, 2),
        1024: C(16, 16, 8, 1),
    },
    # Tensor memory has 512 columns of 128 rows.
    (10, 0): {
        320: C(128, 32, 8, 2, tma=True),
        384: C(128, 32, 8, 1, tma=True),
        576: C(64, 32, 8, 2, tma=True),
        768: C(16, 32, 8, 1),
        1024: C(16, 16, 8, 1),
    },
}
WIDE[12, 0] = WIDE[8, 9]
# Where V is a part of K, which is in shared memory once: up to a width of 576.
WIDE_SHARED = {(9, 0): C(64, 64, 8, 2, tma=True), (8, 9): C(32, 32, 8, 2)}
WIDE_SHARED[12, 0] = WIDE_SHARED[8, 9]
WIDE_SHARED_FEW = C(16, 32, 4, 3)  # everywhere, for up to 16 rows
WIDE_FLOAT32 = {x: {1024: C(16, 16, 8, 1)} for x in WIDE}
WIDE_FLOAT32 |= {x: {768: C(16, 16, 8, 1)} for x in ((8, 9), (12, 0))}
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


def table_config(problem: Problem, shared: bool = False) -> TritonConfig:
    """The shipped configuration; `shared` where V is a part of K."""
    if is_wide(problem):
        return _packed(problem, _wide_config(problem, shared))
    if bits(problem.dtype) == 32:
        return _packed(problem, FLOAT32[head_class(problem)])
    row = _row(problem), head_class(problem)
    plain, other = TABLE[row]
    config = plain if is_plain(problem.spec) else other
    if _is_dense(problem.spec):
        config = DENSE.get(row, config)
    if problem.spec.weight is not None:
        config = WEIGHTED.get(row, config)
    return _packed(problem, config)


def _wide_config(problem: Problem, shared: bool) -> TritonConfig:
    arch, width = _row(problem), max(padded(problem.dim), padded(problem.v_dim))
    if shared and width <= 576 and bits(problem.dtype) == 16:
        if problem.q_len * problem.group <= WIDE_SHARED_FEW.block_q:
            return WIDE_SHARED_FEW
        if arch in WIDE_SHARED:
            return WIDE_SHARED[arch]
    return next(x for largest, x in _wide_tiles(problem).items() if width <= largest)


def widest(problem: Problem) -> int:
    """The largest head dim that there is a tile for."""
    return max(_wide_tiles(problem))


def _wide_tiles(problem: Problem) -> dict[int, TritonConfig]:
    return (WIDE if bits(problem.dtype) == 16 else WIDE_FLOAT32)[_row(problem)]


def _row(problem: Problem) -> tuple[int, int]:
    arch = nearest_arch(problem.capability or (8, 0))
    return ROW.get(arch, arch)


def _packed(problem: Problem, config: TritonConfig) -> TritonConfig:
    """With the rows of all heads that share a KV head in a tile, where few queries or wide heads
    make it worthwhile, and no more rows than there are. A tile has one range of KV blocks, so that
    heads whose masks end at different keys have tiles of their own."""
    packed = problem.group > 1 and (is_wide(problem) or problem.q_len <= FEW_QUERIES)
    packed = packed and not _bounded_by_head(problem.spec)
    rows = problem.q_len * problem.group if packed else problem.q_len
    warps = config.num_warps if is_wide(problem) else 4
    return replace(config, packed=packed).for_rows(rows, warps)


def _bounded_by_head(spec: AttentionSpec) -> bool:
    bounds = *kv_bounds(spec.mask, Q, Q), *kv_full_bounds(spec.mask, Q, Q)
    return any(H in x.free_symbols for x in bounds)


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
    rows = problem.q_len * (problem.group if first.packed else 1)
    fitting = [
        replace(x, packed=first.packed)
        for x in _candidates(capability, problem.dtype.itemsize)
        if x.fits(problem, capability) and x.block_q <= max(16, 2 * rows)
    ]
    fitting = [x for x in fitting if x != first]
    if problem.autotune == "quick":
        # Neighbours of the table's choice: one thing changed, or the tensor descriptors added.
        def distance(x: TritonConfig) -> int:
            return sum(a != b for a, b in zip(asdict(x).values(), asdict(first).values()))

        fitting = sorted(fitting, key=distance)[:QUICK]
    return [first, *fitting]
