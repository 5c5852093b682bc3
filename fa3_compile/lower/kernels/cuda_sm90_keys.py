"""Which Hopper forward kernels are built for a problem, the best first."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from fa3_compile.lower.binaries.remembered import remembered
from fa3_compile.lower.choose import Problem
from fa3_compile.lower.launch.launch_cuda import describable
from fa3_compile.lower.render.cuda_distance import distance_term, scaling
from fa3_compile.lower.render.cuda_terms import (
    arrange,
    capped,
    factor_beside,
    map_kind,
    mask_parts,
    named_mask,
)
from fa3_compile.lower.render.render import aux_parameters
from fa3_compile.lower.render.render_cuda import CudaKey, tile_bytes
from fa3_compile.lower.tiles.config_sm90 import Sm90Config, candidates, smallest, table_first
from fa3_compile.lower.tiles.pace_sm90 import microseconds, work_of
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec

DTYPES = {torch.bfloat16: "Bf16", torch.float16: "Fp16"}
# Of a dense input that comes by TMA. The backward takes DTYPES alone.
TILE_DTYPES = (*DTYPES, torch.float32)
ELEMENTS = {
    torch.bool: "unsigned char",
    torch.uint8: "unsigned char",
    torch.int8: "signed char",
    torch.int16: "short",
    torch.int32: "int",
    torch.int64: "int64_t",
    torch.bfloat16: "Bf16",
    torch.float16: "Fp16",
    torch.float32: "float",
    torch.float64: "double",
}


@dataclass(frozen=True)
class Layout:
    """What the source depends on beside the problem: see CudaKey."""

    elements: tuple[str, ...]
    unit: tuple[tuple[int, ...], ...]
    tile: int | None


def likely_layout(problem: Problem, tiles: Iterable[torch.dtype] = TILE_DTYPES) -> Layout:
    """As if every captured tensor were contiguous; a tile may be of `tiles`."""
    return _contiguous_layout(problem.spec, problem.aux_dtypes, tuple(tiles))


@functools.lru_cache(maxsize=1024)
def _contiguous_layout(
    spec: AttentionSpec, dtypes: tuple[torch.dtype, ...], tiles: tuple[torch.dtype, ...]
) -> Layout:
    ranks = {x.tensor: len(x.index) for x in E.loads_in(*spec.expressions)}
    used = {x.tensor: x.strides for x in aux_parameters(spec)}
    unit = tuple(
        tuple(d for d in used.get(i, ()) if d == ranks[i] - 1) for i in range(len(spec.aux))
    )
    elements = tuple(ELEMENTS[x] for x in dtypes)
    tile = tile_candidate(spec)
    if tile is not None and dtypes[tile.tensor] not in tiles:
        tile = None
    return Layout(elements, unit, None if tile is None else tile.tensor)


def layout_of(
    spec: AttentionSpec, aux: Sequence[Tensor], tiles: Iterable[torch.dtype] = TILE_DTYPES
) -> Layout:
    """Of these captured tensors; a tile may be of `tiles`."""
    used = {x.tensor: x.strides for x in aux_parameters(spec)}
    unit = tuple(tuple(d for d in used.get(i, ()) if x.stride(d) == 1) for i, x in enumerate(aux))
    tile = tile_candidate(spec)
    if tile is not None:
        x = aux[tile.tensor]
        if x.dtype not in tiles or tile.index[-1] != E.KV or not describable(x):
            tile = None
    elements = tuple(ELEMENTS[x.dtype] for x in aux)
    return Layout(elements, unit, None if tile is None else tile.tensor)


@functools.lru_cache(maxsize=1024)
def tile_candidate(spec: AttentionSpec) -> E.load | None:
    """The score's one load of [b, h, q, kv], each of b and h there or not."""
    found = [x for x in E.loads_in(spec.score) if {E.Q, E.KV} <= set(x.index)]
    same = [x for x in E.loads_in(spec.score) if found and x.tensor == found[0].tensor]
    if len(found) != 1 or len(same) != 1:
        return None
    axes = [x for x in found[0].index if x != 0]
    ordered = [x for x in E.COORDINATES if x in axes]
    return found[0] if axes == ordered and len(set(axes)) == len(axes) else None


@functools.lru_cache(maxsize=1024)
def is_plain(spec: AttentionSpec) -> bool:
    """Whether the score is linear in s, and no element is asked for its mask or its weight."""
    return arrange(spec.score).x == E.S and not asks_mask(spec)


@remembered
def is_bare(spec: AttentionSpec) -> bool:
    """Whether no row has an affine term, and each sees all keys from the first on, to its end."""
    interval = mask_parts(named_mask(spec)).interval
    return arrange(spec.score).slope == 0 and (interval is None or interval[0] == 0)


@remembered
def asks_mask(spec: AttentionSpec) -> bool:
    """Whether elements or columns are asked for their mask, or elements for their weight."""
    element = mask_parts(named_mask(spec)).element != sympy.true
    return bool(map_kind(spec)) or element or spec.weight is not None


@remembered
def asks_rows(spec: AttentionSpec) -> bool:
    """Whether each element is asked for a mask that reads something of its row. The highest tiles
    spill for some of these: documents under a causal mask, dense masks."""
    loads = E.loads_in(mask_parts(named_mask(spec)).element)
    return any(E.Q in x.free_symbols for x in loads)


@functools.lru_cache(maxsize=1024)
def mask_axes(spec: AttentionSpec) -> tuple[bool, bool]:
    """Whether the mask differs between batches, and between heads."""
    symbols = spec.mask.free_symbols
    return E.B in symbols, E.H in symbols


def keys_of(problem: Problem, layout: Layout) -> list[CudaKey]:
    """What to build, the best first."""
    spec = problem.spec
    # A packed tile walks the key blocks of all of its heads.
    group = 1 if mask_axes(spec)[1] else problem.group
    keys = _with_table(problem, layout)
    for tile in dict.fromkeys((layout.tile, None)):
        dense = 0 if tile is None else tile_bytes(layout.elements[tile])
        choose = functools.partial(
            candidates, problem.dim, problem.v_dim, problem.q_len, spec.has_mask, is_plain(spec),
            dense, group, asks_mask=asks_mask(spec),
            capped=capped(arrange(spec.score)) > 0, begins=_may_begin_with(problem, layout, tile),
            bare=is_bare(spec),
        )  # fmt: skip
        configs = _paced(problem, choose(), choose(split=True), tile is not None)
        keys += _with_configs(
            spec, problem.dtype, problem.dim, problem.v_dim, configs, layout, tile
        )
    return keys


# Bytes of a table by kv - q, which is made in each call.
LARGEST_TABLE = 2**26
# Of scores that read or compute such a term for each element, beside those that begin with a table.
ELEMENTWISE = 2.2


def table_heads(spec: AttentionSpec, heads: int, batch: int) -> tuple[int, int]:
    """(heads, batches) that have a table by kv - q of their own."""
    term = distance_term(spec.score)
    symbols = set() if term is None else term.free_symbols
    return heads if E.H in symbols else 1, batch if E.B in symbols else 1


def _with_table(problem: Problem, layout: Layout) -> list[CudaKey]:
    """A kernel whose scores begin with a table by kv - q, where they may. Sinks know nothing of how
    its scores are scaled."""
    spec, dtype = problem.spec, DTYPES[problem.dtype]
    if distance_term(spec.score) is None or asks_mask(spec) or spec.sinks:
        return []
    config = table_first(problem.dim, problem.v_dim, problem.q_len, spec.has_mask)
    if config is None or not scaling(spec.score, dtype)[0]:
        return []
    own = math.prod(table_heads(spec, problem.heads, problem.batch))
    if 4 * own * (problem.q_len + problem.kv_len) > LARGEST_TABLE:
        return []
    shape = (problem.batch * problem.heads, problem.q_len, problem.kv_len)
    tiles = shape[0] * -(-problem.q_len // config.block_m)
    if 0 < tiles <= MANY_TILES * processors(problem.device) and problem.kv_len:
        dealt = candidates(
            problem.dim, problem.v_dim, problem.q_len, spec.has_mask, False, 0, split=True
        )
        work = work_of(spec, *shape, max(problem.dim, problem.v_dim))
        pace = functools.partial(microseconds, work=work, processors=processors(problem.device))
        if dealt and pace(dealt[0]) * ELEMENTWISE < pace(config):
            return []
    rest = (config, layout.elements, layout.unit)
    return [CudaKey(spec, dtype, problem.dim, problem.v_dim, *rest, by_distance=True)]


def _may_begin_with(problem: Problem, layout: Layout, tile: int | None) -> bool:
    """Whether the score may begin with the dense tensor. Where Q is rounded for it, the LSE is not
    the one that gradients need: it is off by what that makes of the mean of the keys. Float32
    gains little by it."""
    load = tile_candidate(problem.spec)
    if tile is None or load is None:
        return False
    factor = factor_beside(problem.spec.score, load, DTYPES[problem.dtype])
    rounds = math.frexp(factor)[0] != 0.5
    may_round = not problem.wants_lse and tile_bytes(layout.elements[tile]) == 2
    return factor > 0 and (may_round or not rounds)


@functools.lru_cache(maxsize=1024)
def _with_configs(
    spec: AttentionSpec,
    dtype: torch.dtype,
    dim: int,
    v_dim: int,
    configs: tuple[Sm90Config, ...],
    layout: Layout,
    tile: int | None,
) -> tuple[CudaKey, ...]:
    rest = (layout.elements, layout.unit, tile)
    return tuple(CudaKey(spec, DTYPES[dtype], dim, v_dim, x, *rest) for x in configs)


# Beyond as many tiles for each processor, how they are dealt hardly matters.
MANY_TILES = 4
# What another tile, or dealing out keys, has to promise to be taken.
GAIN = 1.05


def _paced(
    problem: Problem, configs: tuple[Sm90Config, ...], dealt: tuple[Sm90Config, ...], dense: bool
) -> tuple[Sm90Config, ...]:
    """The configs of the table, or another first where the table's tiles are few for the card."""
    shape = (problem.batch * problem.heads, problem.q_len, problem.kv_len)
    limit = MANY_TILES * processors(problem.device)
    if not configs or not all(shape) or problem.q_len <= 64:
        return configs
    if shape[0] * -(-problem.q_len // configs[0].block_m) > limit:
        return configs
    work = work_of(problem.spec, *shape, max(problem.dim, problem.v_dim))
    pace = functools.partial(microseconds, work=work, processors=processors(problem.device))
    first = configs[0]
    if not asks_mask(problem.spec):
        low = [x for x in configs if x.block_m == 128][:1]
        if not dense:
            low += [x for x in (smallest(first, problem.dim, problem.v_dim),) if x is not None]
        best = min(low, key=pace, default=first)
        if pace(best) * GAIN < pace(first):
            first = best
    if dealt and pace(dealt[0]) * GAIN < pace(first):
        return dealt
    return (first, *(x for x in configs if x != first))


@functools.cache
def processors(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132  # where kernels are only built, or interpreted
    return torch.cuda.get_device_properties(device).multi_processor_count
