"""What the launches of Hopper kernels have in common: parameters packed as their headers say."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fa3_compile.lower.bound import are_small
from fa3_compile.lower.choose import KernelBuildError
from fa3_compile.lower.kernels.cuda_sm90_keys import tile_candidate
from fa3_compile.lower.launch.launch_cuda import NAMES, Launch, Module, tensor_map
from fa3_compile.lower.render.cuda_terms import Field, aux_fields
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec

# What the heads of a section of the longest-first order may hold in L2, in bytes.
SECTION_BYTES = 32 * 2**20
# Rows of lists that a block of IntervalBlockMap makes, a warp each.
INTERVAL_ROWS = 16
# Where addresses of a call belong in a parameter struct: see launch_cuda.Launch.
Places = list[tuple[int, Any, int]]


def section_of(heads: int, bytes_: int) -> int:
    """Heads, of `heads` in all, that may be in L2 together if each reads that many bytes; in each
    section about as many, as a small last one has too few tiles for all processors."""
    most = max(1, SECTION_BYTES // max(bytes_, 1))
    return -(-heads // -(-heads // most))


@dataclass(frozen=True)
class ListShape:
    """The lists of the blocks of one axis that each block of the other meets.

    walks           the axis whose blocks are listed, "q" or "kv"
    batches, heads  that have lists of their own
    lists, blocks   lists of each, entries of each
    rows, columns   positions of a block that has a list, and of a listed one

    In memory {partial, full} of each list comes first, then the entries; 32 bits each.
    """

    walks: str
    batches: int
    heads: int
    lists: int
    blocks: int
    rows: int
    columns: int

    @property
    def count(self) -> int:
        return self.batches * self.heads * self.lists

    @property
    def indices(self) -> int:
        """Bytes from the start of the counts to that of the entries."""
        return -(-8 * self.count // 16) * 16

    @property
    def bytes(self) -> int:
        return self.indices + 4 * self.count * self.blocks


class Parameters:
    """The captured tensors and sizes of one call, and a module's kernels.

    names  of the addresses that a call gives, as launch_cuda.Launch has them
    """

    names: tuple[str, ...] = NAMES

    def __init__(self, spec: AttentionSpec, module: Module, aux, sizes) -> None:
        self.spec, self.module, self.aux, self.sizes = spec, module, aux, sizes

    def launch(
        self, name: str, grid: tuple[int, int, int], threads: int, content: bytes, places: Places
    ) -> Launch:
        """A kernel whose struct ends with the captured tensors and needs no shared memory."""
        content, places = self.with_captured(content, places)
        kernel = self.module.kernel(name)
        return Launch(kernel, grid, threads, 0, content, places, names=self.names)

    def with_captured(self, content: bytes, places: Places) -> tuple[bytes, Places]:
        """The struct Aux behind what is there, and where its pointers are."""
        assert len(content) % 8 == 0
        places = list(places)
        for x in aux_fields(self.spec):
            if x.kind == "pointer":
                places.append((len(content), x.index, 0))
            content += self._field(x)
        return content + bytes(-len(content) % 8), places

    def _field(self, x: Field) -> bytes:
        if x.kind == "pointer":
            return bytes(8)
        if x.kind == "stride":
            return struct.pack("q", self.aux[x.index].stride(x.axis))
        value = self.aux[x.index].shape[x.axis] if x.kind == "size" else self.sizes[x.index]
        if not are_small([value]):
            raise KernelBuildError(f"it adds in 32 bits, and is given the length {value}")
        return struct.pack("i", value)

    def tile_map(
        self, x: Tensor, rows: int, strides: tuple[int, ...] = (), columns: int = 64
    ) -> tuple[bytes, tuple[int, int]]:
        """A map of the dense (q, kv) tensor in boxes of `columns` keys, or of one like it with
        other strides, and whether it has batches and heads of its own."""
        load = tile_candidate(self.spec)
        assert load is not None
        place = {axis: d for d, axis in enumerate(load.index) if axis != 0}
        sizes = [x.shape[place[a]] if a in place else 1 for a in E.COORDINATES]
        own = strides or x.stride()
        steps = [own[place[a]] if a in place else 1 for a in E.COORDINATES]
        own_axes = int(E.B in place), int(E.H in place)
        return tensor_map(x, sizes, steps, (1, rows, columns)), own_axes

    def lists(self, kind: str, shape: ListShape, lengths: tuple[int, int]) -> Launch:
        """The kernel that writes lists to the address "lists"; `lengths` of the axis that has
        them, then of the one whose blocks are listed."""
        heads, batches = shape.heads, shape.batches
        content = struct.pack(
            "QQiiiiiii4x", 0, 0, batches, heads, shape.lists, shape.blocks, shape.rows, *lengths
        )
        places: Places = [(0, "lists", shape.indices), (8, "lists", 0)]
        each = INTERVAL_ROWS if kind == "Interval" else 1
        threads = 32 * INTERVAL_ROWS if kind == "Interval" else 256
        grid = (-(-shape.lists // each), heads, batches)
        return self.launch("block_map", grid, threads, content, places)
