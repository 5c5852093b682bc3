"""`cuda_sm90`: the CUDA C++ kernel for Hopper GPUs, built by NVRTC for each spec.

The kernel is kernels/sm90/attention_fwd.cuh; this file says what it takes, binds it to shapes and
strides, and launches it. On a warm path a call costs one dictionary look-up, two allocations, a
few addresses written into its parameters, and the launch.
"""

from __future__ import annotations

import functools
import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor

from fa3_compile.lower import tune
from fa3_compile.lower.bound import BindingKernel
from fa3_compile.lower.build_nvrtc import Built, compiler, load_all, load_first, missing
from fa3_compile.lower.choose import Gradients, KernelBuildError, Problem, register
from fa3_compile.lower.config_sm90 import (
    Packing,
    Sm90Config,
    candidates,
    packing,
    panel_columns,
    split_count,
    variations,
)
from fa3_compile.lower.cuda_terms import (
    Field,
    arrange,
    aux_fields,
    fills_dead_rows,
    map_kind,
    mask_parts,
    named_mask,
    uniform_fill,
)
from fa3_compile.lower.launch_cuda import (
    MAP_BYTES,
    Launch,
    Module,
    describable,
    empty_cuda,
    load_module,
    tensor_map,
)
from fa3_compile.lower.printer import UnprintableError
from fa3_compile.lower.render import aux_parameters
from fa3_compile.lower.render_cuda import CudaKey, render
from fa3_compile.runtime.launch import Call
from fa3_compile.runtime.op import out_strides
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec

log = logging.getLogger(__name__)

DTYPES = {torch.bfloat16: "Bf16", torch.float16: "Fp16"}
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
LARGEST_GRID = 65535
# Keys and values that a section of the longest-first order may hold in L2, in bytes.
SECTION_BYTES = 32 * 2**20
INTERVAL_ROWS, UNIFORM_ROWS, DEAD_ROWS, COMBINE_THREADS = 16, 1024, 64, 128


class CudaSm90(BindingKernel):
    name = "cuda_sm90"
    priority = 20

    def supports(self, problem: Problem) -> str | None:
        if problem.device.type != "cuda":
            return f"it is for Hopper GPUs, this is {problem.device.type}"
        if problem.capability != (9, 0) or torch.version.hip is not None:
            return f"it is for compute capability 9.0, this is {problem.capability}"
        if problem.dtype not in DTYPES:
            return f"q, k, v are {problem.dtype}; it takes bfloat16 and float16"
        for what, dim in (("head dim", problem.dim), ("value head dim", problem.v_dim)):
            if dim % 8 or not 8 <= dim <= 256:
                return f"the {what} is {dim}; it takes multiples of 8 up to 256"
        for i, dtype in enumerate(problem.aux_dtypes):
            if dtype not in ELEMENTS:
                return f"captured tensor {i} is {dtype}"
        if problem.batch > LARGEST_GRID or problem.heads > LARGEST_GRID:
            return f"it takes up to {LARGEST_GRID} heads and batches"
        return missing() or _unprintable(problem.spec)

    def prepare(self, problem: Problem) -> None:
        """Builds the kernel as contiguous captured tensors want it."""
        load_first(_keys(problem, _likely_layout(problem)))

    def configuration(self, problem: Problem) -> str:
        key, _ = load_first(_keys(problem, _likely_layout(problem)))
        return f"{key.config.block_m} x {key.config.block_n}"

    def supports_backward(self, problem: Problem) -> str | None:
        # There: the two modules share how kernels are bound.
        from fa3_compile.lower.kernels import cuda_sm90_backward

        backward = cuda_sm90_backward
        return backward.supports_backward(problem) or backward.unconfirmed(problem)

    def run_backward(self, *arguments) -> Gradients:
        from fa3_compile.lower.kernels import cuda_sm90_backward

        return cuda_sm90_backward.run_backward(*arguments)

    def bind(self, problem: Problem, q, k, v, aux, sizes) -> Call | None:
        if not (q.numel() and k.numel() and v.numel()):
            return None
        if not all(map(describable, (q, k, v))) or any(x.device != q.device for x in aux):

            def adapted(q, k, v, aux):
                q, k, v = (x if describable(x) else _fresh(x) for x in (q, k, v))
                return self.run(problem, q, k, v, [x.to(q.device) for x in aux], sizes)

            return adapted
        try:
            with torch.cuda.device(q.device):
                return bind(problem, q, k, v, aux, sizes)
        except KernelBuildError as error:
            log.warning("cuda_sm90 could not be built for %s: %s", problem.spec, error)
            return None


def _fresh(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


@functools.lru_cache(maxsize=1024)
def _unprintable(spec: AttentionSpec) -> str | None:
    kinds = {"bool": "unsigned char", "int": "int64_t", "float": "float"}
    key = CudaKey(spec, "Bf16", 64, 64, Sm90Config(64, 64), tuple(kinds[x] for x in spec.aux))
    try:
        render(key)
    except UnprintableError as error:
        return f"an expression has no CUDA text: {error}"
    return None


# ---- what is built ----


@dataclass(frozen=True)
class Layout:
    """What the source depends on beside the problem: see CudaKey."""

    elements: tuple[str, ...]
    unit: tuple[tuple[int, ...], ...]
    tile: int | None


def _likely_layout(problem: Problem) -> Layout:
    """As if every captured tensor were contiguous."""
    return _contiguous_layout(problem.spec, problem.aux_dtypes)


@functools.lru_cache(maxsize=1024)
def _contiguous_layout(spec: AttentionSpec, dtypes: tuple[torch.dtype, ...]) -> Layout:
    ranks = {x.tensor: len(x.index) for x in E.loads_in(*spec.expressions)}
    used = {x.tensor: x.strides for x in aux_parameters(spec)}
    unit = tuple(
        tuple(d for d in used.get(i, ()) if d == ranks[i] - 1) for i in range(len(spec.aux))
    )
    elements = tuple(ELEMENTS[x] for x in dtypes)
    tile = _tile_candidate(spec)
    if tile is not None and dtypes[tile.tensor] not in DTYPES:
        tile = None
    return Layout(elements, unit, None if tile is None else tile.tensor)


def _layout(spec: AttentionSpec, aux: Sequence[Tensor]) -> Layout:
    used = {x.tensor: x.strides for x in aux_parameters(spec)}
    unit = tuple(tuple(d for d in used.get(i, ()) if x.stride(d) == 1) for i, x in enumerate(aux))
    tile = _tile_candidate(spec)
    if tile is not None:
        x = aux[tile.tensor]
        if x.dtype not in DTYPES or tile.index[-1] != E.KV or not describable(x):
            tile = None
    elements = tuple(ELEMENTS[x.dtype] for x in aux)
    return Layout(elements, unit, None if tile is None else tile.tensor)


@functools.lru_cache(maxsize=1024)
def _tile_candidate(spec: AttentionSpec) -> E.load | None:
    """The score's one load of [b, h, q, kv], each of b and h there or not."""
    found = [x for x in E.loads_in(spec.score) if {E.Q, E.KV} <= set(x.index)]
    same = [x for x in E.loads_in(spec.score) if found and x.tensor == found[0].tensor]
    if len(found) != 1 or len(same) != 1:
        return None
    axes = [x for x in found[0].index if x != 0]
    ordered = [x for x in E.COORDINATES if x in axes]
    return found[0] if axes == ordered and len(set(axes)) == len(axes) else None


@functools.lru_cache(maxsize=1024)
def _is_plain(spec: AttentionSpec) -> bool:
    """Whether the score is linear in s, and no element is asked for its mask or its weight."""
    return arrange(spec.score).x == E.S and not _asks_mask(spec)


@functools.lru_cache(maxsize=1024)
def _asks_mask(spec: AttentionSpec) -> bool:
    """Whether elements or columns are asked for their mask, or elements for their weight."""
    element = mask_parts(named_mask(spec)).element != sympy.true
    return bool(map_kind(spec)) or element or spec.weight is not None


@functools.lru_cache(maxsize=1024)
def _mask_axes(spec: AttentionSpec) -> tuple[bool, bool]:
    """Whether the mask differs between batches, and between heads."""
    symbols = spec.mask.free_symbols
    return E.B in symbols, E.H in symbols


def _keys(problem: Problem, layout: Layout) -> list[CudaKey]:
    """What to build, the best first."""
    spec = problem.spec
    # A packed tile walks the key blocks of all of its heads.
    group = 1 if _mask_axes(spec)[1] else problem.group
    keys = []
    for tile in dict.fromkeys((layout.tile, None)):
        choose = functools.partial(
            candidates, problem.dim, problem.v_dim, problem.q_len, spec.has_mask, _is_plain(spec),
            tile is not None, group, asks_mask=_asks_mask(spec),
        )  # fmt: skip
        configs, dealt = choose(), choose(split=True)
        if dealt and _splits(problem, dealt[0]) > 1:
            configs = dealt
        keys += _keys_of(spec, problem.dtype, problem.dim, problem.v_dim, configs, layout, tile)
    return keys


@functools.lru_cache(maxsize=1024)
def _keys_of(
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


def _splits(problem: Problem, config: Sm90Config) -> int:
    """The parts that unpacked tiles of a config would be dealt in."""
    tiles = problem.batch * problem.heads * -(-problem.q_len // config.block_m)
    if not tiles or not problem.kv_len:
        return 1
    return split_count(tiles, -(-problem.kv_len // config.block_n), _processors(problem.device))


# ---- what is launched ----


@dataclass
class Bound:
    """The kernels of a call for one set of shapes and strides; calling it launches them.

    scratch_words  int32 that the lists of key blocks, and the parts of a split, take
    """

    device: int
    dtype: torch.dtype
    config: Sm90Config
    module: Module
    out_shape: tuple[int, ...]
    out_stride: tuple[int, ...]
    scratch_words: int
    launches: tuple[Launch, ...]

    def __post_init__(self) -> None:
        self._lse_shape = self.out_shape[:3]
        _, heads, rows = self._lse_shape
        self._lse_stride = (heads * rows, rows, 1)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, aux: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                return self(q, k, v, aux)
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        out = empty_cuda(self.out_shape, self.out_stride, self.dtype)
        lse = empty_cuda(self._lse_shape, self._lse_stride, torch.float32)
        counter = scratch = 0
        # Until the last launch their memory is not to be had by anybody else.
        zero = words = None
        if self.config.longest_first:
            counter, zero = self.module.counter(stream)
        if self.scratch_words:
            words = empty_cuda((self.scratch_words,), (1,), torch.int32)
            scratch = words.data_ptr()
        addresses = [
            q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(), counter,
            scratch,
        ]  # fmt: skip
        for x in aux:
            addresses.append(x.data_ptr())
        for launch in self.launches:
            launch(stream, addresses)
        del zero, words
        return out, lse


@functools.lru_cache(maxsize=1024)
def _module(key: CudaKey, cubin: bytes, device: int) -> Module:
    return load_module(cubin)


@functools.cache
def _processors(device: torch.device) -> int:
    if not torch.cuda.is_available():
        return 132  # where kernels are only built
    return torch.cuda.get_device_properties(device).multi_processor_count


def bind(problem: Problem, q, k, v, aux, sizes, key: CudaKey | None = None) -> Bound:
    """The kernel for these tensors, which TMA can describe; `key` instead of the table's choice.

    Raises KernelBuildError.
    """
    spec = problem.spec
    if key is None:
        keys = _keys(problem, _layout(spec, aux))
        if tune.effort(problem) != "none":
            keys = [_tuned(problem, keys, q, k, v, aux, sizes)]
    else:
        keys = [key]
    key, built = load_first(keys)
    module = _module(key, built.cubin, q.device.index)
    shape = (*q.shape[:3], v.shape[3])
    stride = out_strides(shape, spec.out_order)
    launches, words = _Binder(spec, key, module, q, k, v, aux, sizes).launches(stride)
    return Bound(q.device.index, q.dtype, key.config, module, shape, stride, words, launches)


def _tuned(problem: Problem, keys: Sequence[CudaKey], q, k, v, aux, sizes) -> CudaKey:
    """The key that is fastest on these tensors; `keys` are the table's. Raises KernelBuildError."""
    first, _ = load_first(keys)
    configs = [x.config for x in keys if x.tile == first.tile and x != first]
    if problem.autotune == "full":
        configs += variations(first.config, problem.dim, problem.v_dim, first.tile is not None)
    found = {x: replace(first, config=x) for x in (first.config, *configs)}
    built: dict[CudaKey, Built] = {}

    def measure(config: Sm90Config) -> float:
        built.update(load_all(list(found.values())) if not built else {})
        key = found[config]
        if key != first and (key not in built or not built[key].healthy):
            return tune.UNFIT
        bound = bind(problem, q, k, v, aux, sizes, key)
        return tune.seconds(lambda: bound(q, k, v, aux))

    return found[tune.tuned(problem, "cuda_sm90", compiler(), list(found), measure)]


class _Binder:
    """Packs parameters as kernels/sm90/attention_fwd.cuh and kernels/include/fa3 lay them out."""

    def __init__(self, spec, key: CudaKey, module: Module, q, k, v, aux, sizes) -> None:
        self.spec, self.key, self.module = spec, key, module
        self.q, self.k, self.v, self.aux, self.sizes = q, k, v, aux, sizes
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
        self.processors = _processors(q.device)
        self.splits = 1
        if key.config.split:
            self.splits = split_count(self.tiles, self.key_blocks, self.processors)
        self.scratch_bytes = 0

    def scratch(self, bytes_: int) -> int:
        """Where that many bytes of scratch memory begin."""
        start = self.scratch_bytes
        self.scratch_bytes += -(-bytes_ // 16) * 16
        return start

    def launches(self, out_stride) -> tuple[tuple[Launch, ...], int]:
        """(the kernels of a call in their order, int32 words of scratch memory)."""
        found = []
        kind = map_kind(self.spec)
        if kind:
            self.map_counts = self.scratch(8 * self.map_rows)
            self.map_indices = self.scratch(4 * self.map_rows * self.key_blocks)
            found.append(self.block_map(kind))
        if self.splits > 1:
            self.part_states = self.scratch(8 * self.splits * self.rows)
            self.parts = self.scratch(4 * self.splits * self.rows * self.v.shape[3])
        found.append(self.attention(out_stride))
        if self.splits > 1:
            found.append(self.combine(out_stride))
        dead = fills_dead_rows(self.spec)
        if dead == "maybe" or (dead == "long" and self.queries > self.keys):
            found.append(self.dead_rows(out_stride))
        return tuple(found), self.scratch_bytes // 4

    @property
    def rows(self) -> int:
        """Those of the output, of all heads and batches."""
        return self.batch * self.heads * self.queries

    def captured(self) -> tuple[bytes, list[tuple[int, Any, int]]]:
        """The struct Aux, and where its pointers are."""
        content, places = b"", []
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
        if x.kind == "size":
            return struct.pack("i", self.aux[x.index].shape[x.axis])
        return struct.pack("i", self.sizes[x.index])

    def with_captured(self, content: bytes, places: list) -> tuple[bytes, list]:
        assert len(content) % 8 == 0
        captured, inside = self.captured()
        return content + captured, places + [(len(content) + o, i, n) for o, i, n in inside]

    # The lists of key blocks.

    @functools.cached_property
    def map_shape(self) -> tuple[int, int]:
        """(batches, heads) that have lists of their own."""
        of_batches, of_heads = _mask_axes(self.spec)
        return self.batch if of_batches else 1, self.heads if of_heads else 1

    @property
    def map_rows(self) -> int:
        batches, heads = self.map_shape
        return batches * heads * self.query_blocks

    def block_map(self, kind: str) -> Launch:
        batches, heads = self.map_shape
        content = struct.pack(
            "QQiiiiiii4x", 0, 0, batches, heads, self.query_blocks, self.key_blocks,
            self.packing.rows, self.queries, self.keys,
        )  # fmt: skip
        places = [(0, "scratch", self.map_indices), (8, "scratch", self.map_counts)]
        rows = INTERVAL_ROWS if kind == "Interval" else 1
        threads = 32 * INTERVAL_ROWS if kind == "Interval" else 256
        grid = (-(-self.query_blocks // rows), heads, batches)
        return Launch(
            self.module.kernel("block_map"), grid, threads, 0, *self.with_captured(content, places)
        )

    # The attention.

    def attention(self, out_stride) -> Launch:
        config = self.key.config
        content = self._map(self.q, self.packing.rows, self.packing.heads)
        content += self._map(self.k, config.block_n) + self._map(self.v, config.block_n)
        places: list = [(0, "q", 0), (MAP_BYTES, "k", 0), (2 * MAP_BYTES, "v", 0)]
        tile, broadcast = self._tile()
        if self.key.tile is not None:
            places.append((3 * MAP_BYTES, self.key.tile, 0))
        content += tile
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
        if map_kind(self.spec):
            places += [(len(content), "scratch", self.map_indices)]
            places += [(len(content) + 8, "scratch", self.map_counts)]
        content += struct.pack(
            "QQiii4x", 0, 0, heads * self.query_blocks if batches > 1 else 0,
            self.query_blocks if heads > 1 else 0, self.key_blocks,
        )  # fmt: skip
        if self.splits > 1:
            places += [(len(content), "scratch", self.parts)]
            places += [(len(content) + 8, "scratch", self.part_states)]
        content += struct.pack("QQq", 0, 0, self.rows)
        content += struct.pack(
            "iiiiiiiii4x", self.heads, self.group, self.queries, self.keys, self.packing.heads,
            self.packing.rows, self.packing.chunks, *broadcast,
        )  # fmt: skip
        content, places = self.with_captured(content, places)
        content += bytes(-len(content) % 64)
        return Launch(
            self.module.kernel("attention_fwd"), (grid, 1, 1), config.threads,
            self.module.shared_bytes, content, places,
        )  # fmt: skip

    def _section(self) -> int:
        """Heads whose keys and values may be in L2 together."""
        bytes_ = 2 * self.keys * (self.k.shape[3] + self.v.shape[3])
        section = max(1, SECTION_BYTES // max(bytes_, 1)) * self.group
        return min(section, self.batch * self.heads)

    def _map(self, x: Tensor, rows: int, heads: int = 1) -> bytes:
        return tensor_map(x, x.shape, x.stride(), (heads, rows, panel_columns(x.shape[3])))

    def _tile(self) -> tuple[bytes, tuple[int, int]]:
        """The map of the dense tensor, and whether it has batches and heads of its own."""
        if self.key.tile is None:
            return bytes(MAP_BYTES), (0, 0)
        load = _tile_candidate(self.spec)
        assert load is not None
        x = self.aux[self.key.tile]
        place = {axis: d for d, axis in enumerate(load.index) if axis != 0}
        sizes = [x.shape[place[a]] if a in place else 1 for a in E.COORDINATES]
        strides = [x.stride(place[a]) if a in place else 1 for a in E.COORDINATES]
        content = tensor_map(x, sizes, strides, (1, self.key.config.block_m, 64))
        return content, (int(E.B in place), int(E.H in place))

    # The parts of a split.

    def combine(self, out_stride) -> Launch:
        content = struct.pack("QQQQqqq", 0, 0, 0, 0, *out_stride[:3])
        content += struct.pack("qiii4x", self.rows, self.splits, self.queries, self.keys)
        places: list = [
            (0, "scratch", self.parts), (8, "scratch", self.part_states), (16, "out", 0),
            (24, "lse", 0),
        ]  # fmt: skip
        return Launch(
            self.module.kernel("combine"), (self.queries, self.heads, self.batch),
            COMBINE_THREADS, 0,
            *self.with_captured(content, places),
        )  # fmt: skip

    # Rows without a key.

    def dead_rows(self, out_stride) -> Launch:
        content = struct.pack("QQQQQ", 0, 0, 0, 0, 0)
        places: list = [(8 * i, name, 0) for i, name in enumerate(("q", "k", "v", "out", "lse"))]
        for strides in (self.q.stride(), self.k.stride(), self.v.stride(), out_stride):
            content += struct.pack("qqq", *strides[:3])
        content += struct.pack("iiii", self.heads, self.group, self.queries, self.keys)
        assert self.spec.fill is not None
        rows = UNIFORM_ROWS if uniform_fill(self.spec.fill) else DEAD_ROWS
        grid = (-(-self.queries // rows), self.heads, self.batch)
        return Launch(
            self.module.kernel("dead_rows"), grid, 256, 0, *self.with_captured(content, places)
        )


register(CudaSm90())
