"""How long the tiles of an attention keep a Hopper GPU's processors, to choose where they are few.

Fitted to 208 times of benchmarks/kernels/sm90_shapes.py on an H100, in microseconds; 10% off (rms),
which tells tiles apart that leave processors idle and says nothing of tiles that do not.
"""

from __future__ import annotations

import functools
import heapq
import math
from dataclasses import dataclass

import sympy

from fa3_compile.lower.render.cuda_terms import mask_parts, named_mask
from fa3_compile.lower.tiles.config_sm90 import Sm90Config, split_count
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec

# Of an element of the scores: its exponential, and a column of the head dim.
ELEMENT, COLUMN = 2.85e-5, 4.55e-7
# How fast tiles of as many queries are, where 192 is 1.
SPEED = {192: 1.0, 128: 0.83, 64: 0.63}
AHEAD = 1.03  # of 128, where weights go ahead of the values before
# Beside its key blocks: of a tile, and of its queries.
TILE, QUERY = 1.04, 0.0048
# Parts of tiles: bytes a microsecond, written and read, and the kernel that adds them up.
PARTS, COMBINE = 2.06e6, 2.35


@dataclass(frozen=True)
class Work:
    """An attention's tiles.

    heads        of all batches
    first, last  keys [begin, end) that the first and the last query may see
    """

    heads: int
    q_len: int
    kv_len: int
    dim: int
    first: tuple[int, int]
    last: tuple[int, int]


@functools.lru_cache(maxsize=1024)
def work_of(spec: AttentionSpec, heads: int, q_len: int, kv_len: int, dim: int) -> Work:
    """Masks that leave rows no interval of keys are taken to leave them all."""
    ends = [(0, kv_len)] * 2
    interval = mask_parts(named_mask(spec)).interval if spec.has_mask else None
    if interval is not None:
        sizes = {E.SQ: q_len, E.SKV: kv_len}
        ends = [tuple(x.subs({**sizes, E.Q: q}) for x in interval) for q in (0, q_len - 1)]
        if not all(isinstance(x, sympy.Integer) for pair in ends for x in pair):
            ends = [(0, kv_len)] * 2  # a captured integer decides
        ends = [(max(int(a), 0), min(int(b), kv_len)) for a, b in ends]
    return Work(heads, q_len, kv_len, dim, *ends)


@functools.lru_cache(maxsize=1024)
def microseconds(config: Sm90Config, work: Work, processors: int) -> float:
    """Of all tiles; the launch, which all have, is not among them."""
    m, n = config.block_m, config.block_n
    counts = key_blocks(work, m, n)
    speed = AHEAD if config.ahead else SPEED[m]
    block = m * n / speed * (ELEMENT + COLUMN * work.dim)
    tile = TILE + QUERY * m
    if not config.split:
        return _longest_first([x * block + tile for x in counts], work.heads, processors)
    parts = split_count(len(counts) * work.heads, -(-work.kv_len // n), processors)
    if parts == 1:
        return math.inf
    costs = [(x + i) // parts * block + tile for i in range(parts) for x in counts] * work.heads
    busy = max(sum(costs[i::processors]) for i in range(processors))
    rows = work.heads * work.q_len
    return busy + COMBINE + parts * rows * (work.dim + 2) * 8 / PARTS


def key_blocks(work: Work, m: int, n: int) -> list[int]:
    """Of each query block, as if the ends of its rows' intervals lay on straight lines."""

    def between(end: int, q: int) -> float:
        return work.first[end] + (work.last[end] - work.first[end]) * q / max(work.q_len - 1, 1)

    starts = range(0, work.q_len, m)
    lasts = [min(x + m, work.q_len) - 1 for x in starts]
    spans = [(int(between(0, q)) // n, int(between(1, last))) for q, last in zip(starts, lasts)]
    return [max(-(-end // n) - begin, 0) for begin, end in spans]


def _longest_first(costs: list[float], heads: int, processors: int) -> float:
    """When the last processor is done, where each takes the longest tile that is left."""
    busy = [0.0] * processors
    for cost in sorted(costs, reverse=True):
        for _ in range(heads):
            heapq.heapreplace(busy, busy[0] + cost)
    return max(busy)
