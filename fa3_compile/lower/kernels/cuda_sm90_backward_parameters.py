"""The launches of one Hopper backward, and their parameters."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from fa3_compile.lower.kernels.cuda_sm90_keys import processors, tile_candidate
from fa3_compile.lower.kernels.cuda_sm90_parameters import (
    ListShape,
    Parameters,
    Places,
    section_of,
)
from fa3_compile.lower.launch.launch_cuda import MAP_BYTES, Launch, Module, describable, tensor_map
from fa3_compile.lower.render.render_cuda_backward import CudaBackwardKey, query_map_kind
from fa3_compile.lower.tiles.config_sm90 import panel_columns
from fa3_compile.spec import expr as E

# KV heads that have sums of dQ, as a multiple of those that are worked at once.
AHEAD = 3
COUNTER_INTS = 32  # kCounterInts of kernels/include/fa3/progress.cuh
NAMES = (
    "q", "k", "v", "out", "lse", "dout", "dlse", "dq", "dk", "dv", "counter", "scratch", "delta",
    "dead", "dtile", "lists",
)  # fmt: skip


class BackwardParameters(Parameters):
    """Packs parameters as the kernels' headers lay them out."""

    names = NAMES

    def __init__(self, key: CudaBackwardKey, module: Module, q, k, v, dout, out, aux, sizes):
        super().__init__(key.spec, module, aux, sizes)
        self.key = key
        self.q, self.k, self.v, self.dout, self.out = q, k, v, dout, out
        self.batch, self.heads, self.queries, self.dim = q.shape
        self.kv_heads, self.keys = k.shape[1:3]
        config = key.config
        self.kv_blocks = -(-self.keys // config.block_n)
        self.query_blocks = -(-self.queries // config.block_m)
        blocks = self.batch * self.heads * self.query_blocks
        # Row terms have three numbers where scores may be huge; see backward_rows.cuh.
        self.row_floats = blocks * 3 * config.block_m
        self.positions = self.batch * self.kv_heads
        self.slots = self._slots() if config.finishes else self.positions
        group = self.heads // self.kv_heads
        self.sum_floats = self.slots * group * self.query_blocks * config.sum_floats(self.dim)
        # Heads whose row terms are there before the main kernel, and whose dQ is left after it.
        self.section = self._section(self.positions)
        self.first = self.section if config.beside else self.slots
        counts = config.finishes or config.beside
        self.counters = COUNTER_INTS * (2 + 2 * self.positions) if counts else 0
        self.grid = (self.query_blocks, self.heads, self.batch)
        self.map_kind = query_map_kind(key.spec, config.grouped)
        symbols = key.spec.mask.free_symbols
        self.list_shape = ListShape(
            "q", self.batch if E.B in symbols else 1, self.heads if E.H in symbols else 1,
            self.kv_blocks, self.query_blocks, config.block_n, config.block_m,
        )  # fmt: skip

    @property
    def lists_at(self) -> int:
        """Where lists of query blocks that each call makes begin in scratch memory: behind the row
        terms and the sums, in bytes."""
        return self.progress_at + 4 * self.counters

    @property
    def progress_at(self) -> int:
        return -(-4 * (self.row_floats + self.sum_floats) // 128) * 128

    def scratch_words(self, kept: bool) -> int:
        """The row terms, the sums and, unless they are kept, the lists; 4 bytes each."""
        makes_lists = self.map_kind and not kept
        return (self.lists_at + (self.list_shape.bytes if makes_lists else 0)) // 4

    def launches(self, has_dlse: bool, keeps_delta: bool, kept: bool) -> tuple[Launch, ...]:
        """The kernels of a call in their order. `kept`: the lists of query blocks are there."""
        makes_lists = self.map_kind and not kept
        return (
            *([self.block_map()] if makes_lists else []),
            self.row_terms(has_dlse, keeps_delta),
            self.attention(has_dlse, keeps_delta),
            *([] if self.key.config.finishes else [self.query_gradient()]),
            *([self.nan_values()] if self.key.nan_rows else []),
        )

    def block_map(self) -> Launch:
        """The lists of query blocks: queries and keys change places."""
        return self.lists(self.map_kind, self.list_shape, (self.keys, self.queries))

    def row_terms(self, has_dlse: bool, keeps_delta: bool) -> Launch:
        content, places = self._row_terms(has_dlse, keeps_delta)
        grid = self.grid
        if self.key.config.beside:
            grid = (*grid[:2], -(-self.first // self.kv_heads))
        kernel = self.module.kernel("row_terms")
        return Launch(kernel, grid, 256, 0, content, places, names=NAMES)

    def _row_terms(self, has_dlse: bool, keeps_delta: bool) -> tuple[bytes, Places]:
        used = ["out", "dout", "lse"] + (["dlse"] if has_dlse else [])
        places: Places = [(8 * i, name, 0) for i, name in enumerate(used)]
        places += [(32, "scratch", 0), (40, "scratch", 4 * self.row_floats)]
        if keeps_delta:
            places.append((48, "delta", 0))
        if self.key.dead_rows:
            places.append((56, "dead", 0))
        content = bytes(64) + struct.pack("qqq", *self.out.stride()[:3])
        content += struct.pack("qqq", *self.dout.stride()[:3])
        places.append((len(content) + 16, "scratch", self.progress_at))
        group = self.heads // self.kv_heads
        content += struct.pack(
            "iiiiQii", self.heads, self.queries, self.keys, self.first * group * self.query_blocks,
            0, self.counters, group,
        )  # fmt: skip
        places += [(len(content), "q", 0), (len(content) + 8, "k", 0)]
        content += struct.pack("QQ6q", 0, 0, *self.q.stride()[:3], *self.k.stride()[:3])
        return self.with_captured(content, places)

    def attention(self, has_dlse: bool, keeps_delta: bool) -> Launch:
        config = self.key.config
        content, places = b"", Places()
        width = config.tile_dim(self.dim)
        for name, x, rows, dim in (
            ("q", self.q, config.block_m, width),
            ("k", self.k, config.block_n, width),
            ("v", self.v, config.block_n, self.v.shape[3]),
            ("dout", self.dout, config.block_m, self.v.shape[3]),
        ):
            places.append((len(content), name, 0))
            content += tensor_map(x, x.shape, x.stride(), (1, rows, panel_columns(dim)))
        content, broadcast = content + bytes(2 * MAP_BYTES), (0, 0)
        if (tile := self.key.tile) is not None:
            given, broadcast = self.tile_map(self.aux[tile], config.block_m)
            places.append((4 * MAP_BYTES, tile, 0))
            content = content[: 4 * MAP_BYTES] + given
            if self.key.tile_gradient:
                places.append((5 * MAP_BYTES, "dtile", 0))
                strides = gradient_strides(self.aux[tile])
                content += self.tile_map(self.aux[tile], config.block_m, strides)[0]
            content += bytes(6 * MAP_BYTES - len(content))
        at = len(content)
        places += [(at, "scratch", 4 * self.row_floats), (at + 8, "scratch", 0)]
        places += [(at + 16, "dk", 0), (at + 24, "dv", 0)]
        content += bytes(32)
        for x in (self.k, self.v):
            content += struct.pack("qqq", *torch.empty_like(x, device="meta").stride()[:3])
        places += [(len(content), "dq", 0), (len(content) + 8, "scratch", self.progress_at)]
        content += bytes(16)
        content += struct.pack("qqq", *torch.empty_like(self.q, device="meta").stride()[:3])
        content += struct.pack("ii", self.slots, self.batch)
        turns = self.batch if config.in_turn else 1
        heads = self.kv_heads * self.batch // turns
        tiles = self.kv_blocks * heads
        grid = min(tiles, processors(self.q.device))
        content += struct.pack(
            "iiiiii", tiles, self.kv_blocks, self.kv_heads, self._section(heads), turns, grid
        )
        if config.finishes or config.beside:
            places.append((len(content), "scratch", self.progress_at))
        elif config.longest_first:
            places.append((len(content), "counter", 0))
        content += bytes(8)
        if self.map_kind:
            places += [(len(content), "lists", self.list_shape.indices)]
            places += [(len(content) + 8, "lists", 0)]
        lists = self.list_shape
        content += struct.pack(
            "QQiii4x", 0, 0, lists.heads * self.kv_blocks if lists.batches > 1 else 0,
            self.kv_blocks if lists.heads > 1 else 0, self.query_blocks,
        )  # fmt: skip
        group = self.heads // self.kv_heads
        content += struct.pack("iiii", group, self.queries, self.keys, self.query_blocks)
        content += struct.pack("ii", *broadcast)
        content, places = self.with_captured(content, places)
        content += bytes(-len(content) % 64)
        if config.beside:
            before, there = self._row_terms(has_dlse, keeps_delta)
            places += [(len(content) + at, name, more) for at, name, more in there]
            content += before + bytes(-len(before) % 64)
        return Launch(
            self.module.kernel("attention_bwd"), (grid, 1, 1), config.threads,
            self.module.shared_bytes, content, places, names=NAMES,
        )  # fmt: skip

    def _section(self, heads: int) -> int:
        """KV heads, of `heads` in all, whose queries, dO and dQ may be in L2 together."""
        group = self.heads // self.kv_heads
        return section_of(heads, self.queries * group * (6 * self.dim + 2 * self.v.shape[3]))

    def _slots(self) -> int:
        """KV heads whose dQ has fp32 sums at a time: those that are worked at once, the next, and
        those that are being rounded. No fewer than a section, whose heads are worked in turns."""
        width = -(-processors(self.q.device) // self.kv_blocks) + 1
        section = self._section(self.positions) if self.key.config.longest_first else 1
        return min(max(AHEAD * max(width, section), section), self.positions)

    def query_gradient(self) -> Launch:
        content = bytes(16)
        content += struct.pack("qqq", *torch.empty_like(self.q, device="meta").stride()[:3])
        # Of the heads that the main kernel leaves: its last section.
        left = (self.positions - 1) // self.section * self.section if self.key.config.beside else 0
        batch, group = left // self.kv_heads, self.heads // self.kv_heads
        first = left * group * self.query_blocks
        content += struct.pack("iiii", self.heads, self.queries, batch, first)
        grid = (*self.grid[:2], self.batch - batch)
        places: Places = [(0, "scratch", 4 * self.row_floats), (8, "dq", 0)]
        threads = 128 * self.key.config.warpgroups
        kernel = self.module.kernel("query_gradient")
        return Launch(kernel, grid, threads, 0, content, places, names=NAMES)

    def nan_values(self) -> Launch:
        content = bytes(16)
        content += struct.pack("qqq", *torch.empty_like(self.v, device="meta").stride()[:3])
        rows = self.heads // self.kv_heads * self.queries
        content += struct.pack("qii", rows, self.keys, self.v.shape[3])
        places: Places = [(0, "lse", 0), (8, "dv", 0)]
        grid = (1, self.kv_heads, self.batch)
        return Launch(self.module.kernel("nan_values"), grid, 512, 0, content, places, names=NAMES)


def gradient_strides(tensor: Tensor) -> tuple[int, ...]:
    """Those of a dense input's gradient: as the tensor's, or with rows of whole 16 bytes."""
    grad = torch.empty_like(tensor, device="meta")
    if describable(grad):
        return grad.stride()
    *outer, last = tensor.shape
    return torch.empty((*outer, -(-last // 8) * 8), device="meta").stride()


def is_stored_whole(key: CudaBackwardKey, q: Tensor, k: Tensor, aux: Sequence[Tensor]) -> bool:
    """Whether the kernel stores every element of the dense input's gradient."""
    load = tile_candidate(key.spec)
    stores = key.tile_gradient == "store" or (key.tile_gradient and key.config.in_turn)
    if load is None or not stores or key.spec.has_mask:
        return False
    lengths = {E.B: q.shape[0], E.H: q.shape[1], E.Q: q.shape[2], E.KV: k.shape[2]}
    return aux[load.tensor].shape == tuple(lengths.get(x, 1) for x in load.index)
