"""Which source a forward by Triton runs: what of it is known before there are tensors."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from fa3_compile.lower.bound import precision
from fa3_compile.lower.choose import Problem
from fa3_compile.lower.kernels.cuda_sm90_keys import processors
from fa3_compile.lower.render.render_blocks import uses_lists
from fa3_compile.lower.render.render_forward import ForwardKey
from fa3_compile.lower.tiles import tune_forward
from fa3_compile.lower.tiles.config import FEW_QUERIES, TritonConfig, is_wide
from fa3_compile.lower.tiles.config_sm90 import split_count

# Keys that are dealt out together, and beside which putting parts together is not dear.
KEYS = 128


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def render_key(
    problem: Problem,
    config: TritonConfig,
    lists: bool = False,
    split: bool = False,
    shared: bool = False,
) -> ForwardKey:
    """The source that a problem needs: with lists of KV blocks, in parts, with V in K."""
    return ForwardKey(
        problem.spec,
        problem.dim,
        problem.v_dim,
        fast_tanh=problem.dtype.itemsize == 2 and not interpreted(),
        tma=config.tma,
        warp_specialize=config.warp_specialize,
        upcast=problem.dtype == torch.bfloat16 and interpreted(),
        lists=lists,
        lazy_rescale=config.lazy_rescale,
        packed=config.packed,
        split=split,
        shared=shared,
        natural=problem.dtype == torch.float32,
        parts=in_parts(problem),
    )


def in_parts(problem: Problem) -> bool:
    """Whether products are of float32, without tensor cores."""
    return problem.dtype == torch.float32 and precision(problem.dtype) == "ieee"


def likely_key(problem: Problem) -> ForwardKey:
    """That of the shipped configuration, for K and V that descriptors can describe, V not in K."""
    config = tune_forward.table_config(problem)
    lists = uses_lists(problem.spec, problem.q_len, problem.kv_len)
    config = replace(config, packed=config.packed and not lists)
    tiles = tile_count(config, problem.batch, problem.heads, problem.kv_heads, problem.q_len)
    return render_key(problem, config, lists, part_count(problem, tiles, problem.kv_len) > 1)


def tile_count(config: TritonConfig, batch: int, heads: int, kv_heads: int, q_len: int) -> int:
    """How many blocks of rows there are."""
    if config.packed:
        heads, q_len = kv_heads, q_len * (heads // kv_heads)
    return -(-q_len // config.block_q) * batch * heads


def part_count(problem: Problem, tiles: int, kv_len: int) -> int:
    """Into how many parts the KV blocks of each tile are split, to be dealt to several programs."""
    if not is_wide(problem) and problem.q_len > FEW_QUERIES:
        return 1
    return split_count(tiles, -(-kv_len // KEYS), processors(problem.device))
