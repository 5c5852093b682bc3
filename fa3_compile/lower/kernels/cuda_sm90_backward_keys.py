"""Which Hopper backward kernels are built for a problem, the best first."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from fa3_compile.lower.binaries.build_nvrtc import Built, load_first
from fa3_compile.lower.choose import KernelBuildError, Problem
from fa3_compile.lower.kernels.cuda_sm90_keys import (
    DTYPES,
    Layout,
    likely_layout,
    tile_candidate,
)
from fa3_compile.lower.kernels.dead_rows import may_be_nan
from fa3_compile.lower.kernels.triton_forward import may_have_dead_rows
from fa3_compile.lower.render.cuda_terms import arrange, mask_parts, named_mask
from fa3_compile.lower.render.render_cuda_backward import (
    CudaBackwardKey,
    asks_elements,
    query_map_kind,
    slope,
)
from fa3_compile.lower.tiles.config_sm90_backward import candidates
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.derivative import derivative

# Heads whose progress is counted: positions of counters are 32-bit numbers.
MOST_COUNTED = 2**20
# Heads or batches that may add to one gradient in 16 bits.
LARGEST_SUM = 4
# Bytes that a tile of 128 queries may spill: at head dim 64, with 72 to 216 of them, softcap,
# ALiBi, documents, dense masks and dropout are 1.09 to 1.30 times as fast as in one of 64 that
# spills none.
TALL_SPILLS = 256


def keys_of(problem: Problem, layout: Layout) -> list[CudaBackwardKey]:
    """What to build, the best first."""
    spec, dim, v_dim = problem.spec, problem.dim, problem.v_dim
    gradient, _ = score_gradient(problem)
    lengths = problem.q_len, problem.kv_len
    dead, nan = finds_dead_rows(spec, *lengths), may_be_nan(spec, *lengths)
    configs = candidates(
        dim, v_dim, spec.has_mask, problem.group > 1, gradient, asks_elements(spec)
    )
    if not (gradient == "add" and _is_sum_of_batches(spec)):
        configs = [x for x in configs if not x.in_turn]
    few_heads = problem.batch * problem.heads < MOST_COUNTED
    if layout.tile is None and few_heads and finishes(spec, problem.group > 1):
        configs = [replace(x, finishes=x.may_finish(dim)) for x in configs]
    elif layout.tile is None and few_heads and not dead and not arrange(spec.score).wide:
        configs = [replace(x, beside=x.wide and x.longest_first) for x in configs]
    tiles = [layout.tile] if gradient else dict.fromkeys((layout.tile, None))
    return [
        CudaBackwardKey(
            spec, DTYPES[problem.dtype], dim, v_dim, config, layout.elements, layout.unit, dead,
            tile, gradient, nan,
        )
        for tile in tiles
        for config in configs
        if config.fits(dim, v_dim, tile is not None) and not (gradient and tile is None)
    ]  # fmt: skip


def finishes(spec: AttentionSpec, grouped: bool) -> bool:
    """Whether the main kernel rounds dQ itself: where a mask leaves each KV block about as many
    queries, or listed ones. Where it leaves a triangle, a kernel of its own was up to 6% faster."""
    if not spec.has_mask or query_map_kind(spec, grouped):
        return True
    interval = mask_parts(named_mask(spec)).interval
    return interval is not None and all(x.has(E.Q) for x in interval)


def load_best(keys: Sequence[CudaBackwardKey], at_once: int = 1) -> tuple[CudaBackwardKey, Built]:
    """What runs of these keys: the tile of 128 queries that spills least, if that is little; else
    what `load_first` says. Raises KernelBuildError where none builds.

    Where each element is asked for its mask, the first of them spill: all are built side by side.
    """
    at_first = len(keys) if keys and asks_elements(keys[0].spec) else 1
    if tall := [x for x in keys if x.config.block_m == 128]:
        try:
            key, built = load_first(tall, at_once, at_first)
            if built.spill_bytes <= TALL_SPILLS and not built.serialised:
                return key, built
        except KernelBuildError:
            pass
    return load_first(keys, at_once, at_first)


def _is_sum_of_batches(spec: AttentionSpec) -> bool:
    """Whether the dense input's gradient is a sum over batches alone."""
    load = tile_candidate(spec)
    return load is not None and E.H in load.index and E.B not in load.index


def likely_keys(problem: Problem) -> list[CudaBackwardKey]:
    """As if every captured tensor were contiguous."""
    return keys_of(problem, likely_layout(problem, DTYPES))


def finds_dead_rows(spec: AttentionSpec, q_len: int, kv_len: int) -> bool:
    return spec.dead == "score" and may_have_dead_rows(spec, q_len, kv_len)


@functools.lru_cache(maxsize=1024)
def score_gradient(problem: Problem) -> tuple[str, str | None]:
    """(tile_gradient of CudaBackwardKey, why not): the gradients of what the score reads."""
    spec = problem.spec
    wanted = [i for i, n in enumerate(problem.aux_needs_grad) if n]
    read = [spec.score] + ([] if spec.weight is None else [spec.weight])
    found = [x for x in E.loads_in(*read) if x.tensor in wanted]
    if not found:
        return "", None
    load, which = tile_candidate(spec), found[0].tensor
    if load is None or len(found) > 1 or load != found[0] or load.index[-1] != E.KV:
        return "", f"it computes no gradient of captured tensor {which}"
    if derivative(spec.score, load) != 1 or slope(spec.score)[1] != 1:
        return "", f"captured tensor {which} is not just added to a multiple of s"
    if problem.aux_dtypes[which] != problem.dtype:
        return "", f"captured tensor {which} is {problem.aux_dtypes[which]}, not {problem.dtype}"
    copies = 1 if E.B in load.index else problem.batch
    copies *= 1 if E.H in load.index else problem.heads
    if copies > LARGEST_SUM:
        return "", f"the gradient of captured tensor {which} is a sum of {copies} in 16 bits"
    return ("store" if copies == 1 else "add"), None
