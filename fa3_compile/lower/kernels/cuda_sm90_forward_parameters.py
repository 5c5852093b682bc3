"""The launches of one attention by the Hopper forward kernel, and their parameters."""

from __future__ import annotations

import functools
import math
import struct

from torch import Tensor

from fa3_compile.lower.kernels.cuda_sm90_keys import mask_axes, processors, table_heads
from fa3_compile.lower.kernels.cuda_sm90_parameters import (
    ListShape,
    Parameters,
    Places,
    section_of,
)
from fa3_compile.lower.launch.launch_cuda import MAP_BYTES, Launch, Module, tensor_map
from fa3_compile.lower.render.cuda_terms import fills_dead_rows, uniform_fill
from fa3_compile.lower.render.render_cuda import CudaKey
from fa3_compile.lower.tiles.config_sm90 import Packing, packing, panel_columns, split_count

UNIFORM_ROWS, DEAD_ROWS, COMBINE_THREADS, TABLE_THREADS = 1024, 64, 128, 256
# Blocks of the kernel for rows without a key, where it tells the host: they add to one counter.
LARGEST_TELLING = 1024


class ForwardParameters(Parameters):
    """Packs parameters as kernels/sm90/attention_fwd.cuh and kernels/include/fa3 lay them out."""

    def __init__(self, spec, key: CudaKey, module: Module, q, k, v, aux, sizes) -> None:
        super().__init__(spec, module, aux, sizes)
        self.key, self.q, self.k, self.v = key, q, k, v
        self.batch, self.heads, self.queries, _ = q.shape
        self.kv_heads, self.keys = k.shape[1:3]
        self.group = self.heads // self.kv_heads
        self.packing = Packing(1, key.config.block_m, self.group)
        if key.config.packed:
            self.packing = packing(self.group, self.queries)
        self.query_blocks = -(-self.queries // self.packing.rows)
        self.key_blocks = -(-self.keys // key.config.block_n)
        self.grid_heads = self.kv_heads * self.packing.chunks
        self.tiles = self.query_blocks * self.grid_heads * self.batch
        self.processors = processors(q.device)
        self.splits = 1
        if key.config.split:
            self.splits = split_count(self.tiles, self.key_blocks, self.processors)
        self.scratch_bytes = self.listed_bytes = 0
        self.tells = False
        self.map_kind = key.map_kind

    def scratch(self, bytes_: int) -> int:
        """Where that many bytes of scratch memory begin."""
        start = self.scratch_bytes
        self.scratch_bytes += -(-bytes_ // 16) * 16
        return start

    def launches(self, out_stride, kept: bool = False) -> tuple[tuple[Launch, ...], int]:
        """(the kernels of a call in their order, bytes of scratch memory).

        kept  the lists of key blocks are there; otherwise they are made where scratch memory begins
        """
        found = []
        if self.map_kind and not kept:
            self.listed_bytes = self.list_shape.bytes
            self.scratch(self.listed_bytes)
            found.append(self.block_map())
        if self.key.by_distance:
            found.append(self.distance_table())
        if self.splits > 1:
            self.part_states = self.scratch(8 * self.splits * self.rows)
            self.parts = self.scratch(4 * self.splits * self.rows * self.v.shape[3])
        found.append(self.attention(out_stride))
        if self.splits > 1:
            found.append(self.combine(out_stride))
        dead = fills_dead_rows(self.spec)
        if dead == "maybe" or (dead == "long" and self.queries > self.keys):
            found.append(self.dead_rows(out_stride))
        return tuple(found), self.scratch_bytes

    @property
    def rows(self) -> int:
        """Those of the output, of all heads and batches."""
        return self.batch * self.heads * self.queries

    # The lists of key blocks.

    @functools.cached_property
    def map_shape(self) -> tuple[int, int]:
        """(batches, heads) that have lists of their own."""
        of_batches, of_heads = mask_axes(self.spec)
        return self.batch if of_batches else 1, self.heads if of_heads else 1

    @functools.cached_property
    def list_shape(self) -> ListShape:
        rows = self.packing.rows, self.key.config.block_n
        return ListShape("kv", *self.map_shape, self.query_blocks, self.key_blocks, *rows)

    def block_map(self) -> Launch:
        return self.lists(self.map_kind, self.list_shape, (self.queries, self.keys))

    # The table that scores begin with.

    def distance_table(self) -> Launch:
        heads, batches = table_heads(self.spec, self.heads, self.batch)
        distances = self.queries + self.keys - 1
        self.table = self.scratch(4 * batches * heads * distances)
        content = struct.pack("Qiii4x", 0, self.heads, self.queries, self.keys)
        grid = (-(-distances // TABLE_THREADS), heads, batches)
        places: Places = [(0, "scratch", self.table)]
        return self.launch("distance_table", grid, TABLE_THREADS, content, places)

    # The attention.

    def attention(self, out_stride) -> Launch:
        config = self.key.config
        content = self._map(self.q, self.packing.rows, self.packing.heads)
        content += self._map(self.k, config.block_n) + self._map(self.v, config.block_n)
        places: Places = [(0, "q", 0), (MAP_BYTES, "k", 0), (2 * MAP_BYTES, "v", 0)]
        dense, broadcast = self._tile()
        if self.key.tile is not None:
            starts = range(len(content), len(content) + len(dense), MAP_BYTES)
            places += [(at, self.key.tile, 0) for at in starts]
        content += dense
        places += [(len(content), "out", 0), (len(content) + 8, "lse", 0)]
        content += struct.pack("QQqqq", 0, 0, *out_stride[:3])
        tiles = self.tiles * self.splits
        grid = min(tiles, self.processors)
        content += struct.pack(
            "iiiiii", tiles, self.query_blocks, self.grid_heads, self._section(), self.splits, grid
        )
        if config.longest_first:
            places.append((len(content), "counter", 0))
        content += bytes(8)
        batches, heads = self.map_shape
        if self.map_kind:
            places += [(len(content), "lists", self.list_shape.indices)]
            places += [(len(content) + 8, "lists", 0)]
        content += struct.pack(
            "QQiii4x", 0, 0, heads * self.query_blocks if batches > 1 else 0,
            self.query_blocks if heads > 1 else 0, self.key_blocks,
        )  # fmt: skip
        if self.splits > 1:
            places += [(len(content), "scratch", self.parts)]
            places += [(len(content) + 8, "scratch", self.part_states)]
        if self.key.by_distance:
            places += [(len(content) + 24, "scratch", self.table)]
        content += struct.pack("QQqQ", 0, 0, self.rows, 0)
        content += struct.pack(
            "iiiiiiiiii", self.heads, self.group, self.queries, self.keys, self.packing.heads,
            self.packing.rows, self.packing.chunks, *broadcast, self._turn(),
        )  # fmt: skip
        content, places = self.with_captured(content, places)
        content += bytes(-len(content) % 64)
        return Launch(
            self.module.kernel("attention_fwd"), (grid, 1, 1), config.threads,
            self.module.shared_bytes, content, places,
        )  # fmt: skip

    def _section(self) -> int:
        """Heads whose keys and values may be in L2 together."""
        turn = self._turn() or 1
        if not self.key.config.longest_first:
            return turn  # and then the next query block of the same head
        bytes_ = 2 * self.keys * (self.k.shape[3] + self.v.shape[3])
        together = self.group * turn  # heads that share K and V, and batches that go side by side
        runs = -(-self.batch * self.heads // together)
        return min(section_of(runs, bytes_ * turn) * together, self.batch * self.heads)

    def _turn(self) -> int:
        """How many batches read the same dense tensor and go side by side; 0 for none."""
        own = self.key.tile is None or self._tile()[1][0]
        return 0 if own or self.batch == 1 or self.splits > 1 else self.batch

    def _map(self, x: Tensor, rows: int, heads: int = 1) -> bytes:
        return tensor_map(x, x.shape, x.stride(), (heads, rows, panel_columns(x.shape[3])))

    def _tile(self) -> tuple[bytes, tuple[int, int]]:
        """The maps of the dense tensor, in boxes of 128 bytes and, where they do not make up a
        block, of 16 keys; and whether it has batches and heads of its own."""
        if self.key.tile is None:
            return bytes(MAP_BYTES), (0, 0)
        x, config = self.aux[self.key.tile], self.key.config
        panel = 128 // x.itemsize
        maps, own = self.tile_map(x, config.block_m, columns=panel)
        if config.block_n % panel:
            maps += self.tile_map(x, config.block_m, columns=16)[0]
        return maps, own

    # The parts of a split.

    def combine(self, out_stride) -> Launch:
        content = struct.pack("QQQQqqq", 0, 0, 0, 0, *out_stride[:3])
        content += struct.pack("qiii4x", self.rows, self.splits, self.queries, self.keys)
        places: Places = [
            (0, "scratch", self.parts), (8, "scratch", self.part_states), (16, "out", 0),
            (24, "lse", 0),
        ]  # fmt: skip
        grid = (self.queries, self.heads, self.batch)
        return self.launch("combine", grid, COMBINE_THREADS, content, places)

    # Rows without a key.

    def dead_rows(self, out_stride) -> Launch:
        content = struct.pack("QQQQQ", 0, 0, 0, 0, 0)
        places: Places = [(8 * i, name, 0) for i, name in enumerate(("q", "k", "v", "out", "lse"))]
        for strides in (self.q.stride(), self.k.stride(), self.v.stride(), out_stride):
            content += struct.pack("qqq", *strides[:3])
        content += struct.pack("iiii", self.heads, self.group, self.queries, self.keys)
        assert self.spec.fill is not None
        rows = UNIFORM_ROWS if uniform_fill(self.spec.fill) else DEAD_ROWS
        grid = (-(-self.queries // rows), self.heads, self.batch)
        self.tells = self.listed_bytes > 0 and math.prod(grid) <= LARGEST_TELLING
        if self.tells:
            names = ("counter", "report", "number")
            places += [(len(content) + 8 * i, name, 0) for i, name in enumerate(names)]
        content += bytes(24)
        return self.launch("dead_rows", grid, 256, content, places)
