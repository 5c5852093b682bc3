"""The gradients of an attention by CUDA C++ kernels for Hopper GPUs, in O(S) memory.

Three launches: row terms, the main kernel (kernels/sm90/attention_bwd.cuh) and dQ from its fp32
sums. They recompute P from the LSE, so any forward that writes the LSE of `fa3::attention` may
have run before them. Rows without a key, and sinks, are O(S) and left to torch, as in the Triton
backward. dQ is summed in the order in which blocks come to it: where every bit has to be repeated,
the Triton backward runs, which has no atomics.
"""

from __future__ import annotations

import functools
import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fa3_compile.lower.build_nvrtc import load_first
from fa3_compile.lower.choose import Gradients, KernelBuildError, Problem, kernels, reference
from fa3_compile.lower.config_sm90 import panel_columns
from fa3_compile.lower.config_sm90_backward import Sm90BackwardConfig, candidates
from fa3_compile.lower.cuda_terms import aux_fields
from fa3_compile.lower.elements import Shape
from fa3_compile.lower.kernels.cuda_sm90 import (
    DTYPES,
    INTERVAL_ROWS,
    SECTION_BYTES,
    Layout,
    _layout,
    _likely_layout,
    _processors,
    _tile_candidate,
)
from fa3_compile.lower.kernels.cuda_sm90_rows import (
    add_uniform_rows,
    may_be_nan,
    sink_gradients,
)
from fa3_compile.lower.kernels.triton_dead_rows import set_nan_rows
from fa3_compile.lower.kernels.triton_forward import may_have_dead_rows
from fa3_compile.lower.launch_cuda import (
    MAP_BYTES,
    Launch,
    Module,
    describable,
    load_module,
    tensor_map,
)
from fa3_compile.lower.printer import UnprintableError
from fa3_compile.lower.render_backward import has_fill_rows
from fa3_compile.lower.render_cuda_backward import CudaBackwardKey, query_map_kind, slope
from fa3_compile.runtime.launch import layout_key, make_room
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.derivative import derivative

log = logging.getLogger(__name__)

NAME = "cuda_sm90"
LARGEST_BOUND = 2048
# Heads or batches that may add to one gradient in 16 bits.
LARGEST_SUM = 4
NAMES = (
    "q", "k", "v", "out", "lse", "dout", "dlse", "dq", "dk", "dv", "counter", "scratch", "delta",
    "dead", "dtile",
)  # fmt: skip


def supports_backward(problem: Problem) -> str | None:
    """None, or why these gradients are left to another family, as a sentence."""
    spec = problem.spec
    if problem.deterministic or torch.are_deterministic_algorithms_enabled():
        return "its dQ is summed in no fixed order"
    if problem.dim <= 64 and problem.v_dim > 128:
        return f"its backward takes no head dim {problem.dim} with {problem.v_dim} for values"
    if spec.weight is not None and max(problem.dim, problem.v_dim) > 128:
        return "with a factor after the softmax its backward takes head dims up to 128"
    if reason := _score_gradient(problem)[1]:
        return reason
    if finds_dead_rows(spec, problem.q_len, problem.kv_len):
        if has_fill_rows(spec) or spec.sinks:
            return "a row without a key has scores of its own"
    return _unprintable(spec)


def unconfirmed(problem: Problem) -> str | None:
    """Why gradients that the kernel can compute are left to Triton all the same.

    These forms are right in the emulation of tests/numerics, but have not been compared with
    float64 on a Hopper GPU; Triton's have. tests/numerics/test_cuda_sm90_backward.py compares them.
    """
    spec = problem.spec
    if spec.weight is not None:
        return "its gradients of a factor after the softmax are not confirmed on a GPU yet"
    if _tile_candidate(spec) is not None:
        return "its gradients beside a dense input are not confirmed on a GPU yet"
    return None


@functools.lru_cache(maxsize=1024)
def _score_gradient(problem: Problem) -> tuple[str, str | None]:
    """(tile_gradient of CudaBackwardKey, why not): the gradients of what the score reads."""
    spec = problem.spec
    wanted = [i for i, n in enumerate(problem.aux_needs_grad) if n]
    read = [spec.score] + ([] if spec.weight is None else [spec.weight])
    found = [x for x in E.loads_in(*read) if x.tensor in wanted]
    if not found:
        return "", None
    load, which = _tile_candidate(spec), found[0].tensor
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


@functools.lru_cache(maxsize=1024)
def _unprintable(spec: AttentionSpec) -> str | None:
    kinds = {"bool": "unsigned char", "int": "int64_t", "float": "float"}
    elements = tuple(kinds[x] for x in spec.aux)
    try:
        CudaBackwardKey(spec, "Bf16", 64, 64, Sm90BackwardConfig(128, 128), elements).source()
    except (UnprintableError, TypeError) as error:
        return f"a gradient has no CUDA text: {error}"
    return None


def keys_of(problem: Problem, layout: Layout) -> list[CudaBackwardKey]:
    """What to build, the best first."""
    spec, dim, v_dim = problem.spec, problem.dim, problem.v_dim
    gradient, _ = _score_gradient(problem)
    dead = finds_dead_rows(spec, problem.q_len, problem.kv_len)
    configs = candidates(dim, v_dim, spec.has_mask, problem.group > 1, bool(gradient))
    tiles = [layout.tile] if gradient else dict.fromkeys((layout.tile, None))
    return [
        CudaBackwardKey(
            spec, DTYPES[problem.dtype], dim, v_dim, config, layout.elements, layout.unit, dead,
            tile, gradient,
        )
        for tile in tiles
        for config in configs
        if config.fits(dim, v_dim, tile is not None) and not (gradient and tile is None)
    ]  # fmt: skip


def likely_keys(problem: Problem) -> list[CudaBackwardKey]:
    """As if every captured tensor were contiguous."""
    return keys_of(problem, _likely_layout(problem))


def finds_dead_rows(spec: AttentionSpec, q_len: int, kv_len: int) -> bool:
    return spec.dead == "score" and may_have_dead_rows(spec, q_len, kv_len)


@dataclass
class BoundBackward:
    """The kernels of one backward for one set of shapes and strides.

    scratch_floats  those of the row terms and of dQ's sums
    """

    device: int
    config: Sm90BackwardConfig
    module: Module
    scratch_floats: int
    keeps_delta: bool
    finds_dead: bool
    tile: int | None
    launches: tuple[Launch, ...]

    def __call__(self, problem, dout, dlse, q, k, v, out, lse, aux, sizes, needs) -> Gradients:
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                return self(problem, dout, dlse, q, k, v, out, lse, aux, sizes, needs)
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        scratch = torch.empty(self.scratch_floats, dtype=torch.float32, device=q.device)
        counter, kept = self.module.counter(stream) if self.config.longest_first else (0, None)
        delta = torch.empty_like(lse) if self.keeps_delta else None
        dead = torch.empty_like(lse, dtype=torch.int8) if self.finds_dead else None
        addresses = [
            0 if x is None else x.data_ptr()
            for x in (q, k, v, out, lse, dout, dlse, dq, dk, dv)
        ]  # fmt: skip
        addresses += [counter, scratch.data_ptr()]
        dtile = None if self.tile is None else tile_gradient(problem.spec, aux[self.tile])
        addresses += [0 if x is None else x.data_ptr() for x in (delta, dead, dtile, *aux)]
        for launch in self.launches:
            launch(stream, addresses)
        del kept
        self.finish(problem, (dq, dk, dv), delta, dead, q, k, v, dout, lse)
        captured = captured_gradients(
            problem, self.tile, dtile, lse, delta, q, k, aux, sizes, needs
        )
        wanted = [x if n else None for x, n in zip((dq, dk, dv), needs[:3])]
        return wanted[0], wanted[1], wanted[2], captured

    @staticmethod
    def finish(problem, grads, delta, dead, q, k, v, dout, lse) -> None:
        """Adds what the kernels leave out: rows without a key."""
        if dead is not None:
            add_uniform_rows(problem.spec, dead, delta, grads, q, k, v, dout)
        elif may_be_nan(problem.spec, q.shape[2], k.shape[2]):
            set_nan_rows(grads[2], lse)


_bound: dict[tuple, BoundBackward | None] = {}


def run_backward(
    problem: Problem,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    aux: Sequence[Tensor],
    sizes: Sequence[int],
    needs: Sequence[bool],
) -> Gradients:
    """`Kernel.run_backward`; another family's where this one has no kernel after all."""
    if supports_backward(problem) is not None:  # the mode may have changed since it was asked
        return _next(problem).run_backward(
            problem, dout, dlse, q, k, v, out, lse, aux, sizes, needs
        )
    q, k, v, dout, out = (
        x if describable(x) else x.clone(memory_format=torch.contiguous_format)
        for x in (q, k, v, dout, out)
    )
    # A dLSE may be a broadcast scalar; the kernel reads rows of B * H * Sq.
    dlse = None if dlse is None else dlse.to(torch.float32).contiguous()
    aux = [x.to(q.device) for x in aux]
    tensors = (q, k, v, dout, out, *aux)
    key = (problem.spec, dlse is None, tuple(needs), layout_key(tensors, sizes))
    if key not in _bound:
        make_room(_bound, LARGEST_BOUND)
        _bound[key] = _bind_or_none(problem, dlse, q, k, v, dout, out, aux, sizes, needs)
    bound = _bound[key]
    arguments = (problem, dout, dlse, q, k, v, out, lse, aux, sizes, needs)
    return _next(problem).run_backward(*arguments) if bound is None else bound(*arguments)


def _next(problem: Problem):
    """The family after this one."""
    for kernel in kernels():
        if kernel.name in (NAME, reference().name):
            continue
        if not (kernel.supports(problem) or kernel.supports_backward(problem)):
            return kernel
    return reference()


def _bind_or_none(problem, dlse, q, k, v, dout, out, aux, sizes, needs) -> BoundBackward | None:
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        return None
    if not keys_of(problem, _layout(problem.spec, aux)):
        return None  # a dense input that TMA cannot describe
    try:
        with torch.cuda.device(q.device):
            return bind(problem, dlse, q, k, v, dout, out, aux, sizes, needs)
    except KernelBuildError as error:
        log.warning("the backward of cuda_sm90 could not be built for %s: %s", problem.spec, error)
        return None


@functools.lru_cache(maxsize=1024)
def _module(key: CudaBackwardKey, cubin: bytes, device: int) -> Module:
    return load_module(cubin, "attention_bwd")


def bind(
    problem: Problem, dlse, q, k, v, dout, out, aux, sizes, needs,
    key: CudaBackwardKey | None = None,
) -> BoundBackward:  # fmt: skip
    """The kernels for these tensors, which TMA can describe; `key` instead of the table's choice.

    Raises KernelBuildError.
    """
    spec = problem.spec
    layout = _layout(spec, aux)
    keys = keys_of(problem, layout) if key is None else [key]
    key, built = load_first(keys)
    module = _module(key, built.cubin, q.device.index)
    wanted = [i for i, n in enumerate(needs[3:]) if n]
    keeps_delta = key.dead_rows or any(x.tensor in wanted for x in E.loads_in(*spec.sinks))
    binder = _BackwardBinder(key, module, q, k, v, dout, out, aux, sizes)
    launches = (
        *binder.query_map(),
        binder.row_terms(dlse is not None, keeps_delta),
        binder.attention(),
        binder.query_gradient(),
    )
    floats = binder.row_floats + binder.sum_floats + binder.map_words
    return BoundBackward(
        q.device.index,
        key.config,
        module,
        floats,
        keeps_delta,
        key.dead_rows,
        key.tile if key.tile_gradient else None,
        launches,
    )


def captured_gradients(
    problem: Problem, tile, dtile, lse, delta, q, k, aux, sizes, needs
) -> list[Tensor | None]:
    """The gradients of the captured tensors, None for those that `needs` leaves out."""
    wanted = [i for i, n in enumerate(needs[3:]) if n]
    grads: list[Tensor | None] = [torch.zeros_like(x) if i in wanted else None
                                  for i, x in enumerate(aux)]  # fmt: skip
    shape = Shape(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    for i, x in sink_gradients(problem.spec, wanted, lse, delta, shape, aux, sizes).items():
        grads[i] = x
    if tile is not None:
        grads[tile] = dtile
    return grads


def tile_gradient(spec: AttentionSpec, tensor: Tensor) -> Tensor:
    """Zeros like the tensor, in a layout that TMA can describe."""
    grad = torch.zeros_like(tensor)
    if describable(grad):
        return grad
    *outer, last = tensor.shape
    return tensor.new_zeros((*outer, -(-last // 8) * 8))[..., :last]


class _BackwardBinder:
    """Packs parameters as the kernels' headers lay them out."""

    def __init__(self, key: CudaBackwardKey, module: Module, q, k, v, dout, out, aux, sizes):
        self.key, self.module = key, module
        self.q, self.k, self.v, self.dout, self.out = q, k, v, dout, out
        self.aux, self.sizes = aux, sizes
        self.batch, self.heads, self.queries, self.dim = q.shape
        self.kv_heads, self.keys = k.shape[1:3]
        config = key.config
        self.query_blocks = -(-self.queries // config.block_m)
        blocks = self.batch * self.heads * self.query_blocks
        # Row terms have three numbers where scores may be huge; see backward_rows.cuh.
        self.row_floats = blocks * 3 * config.block_m
        self.sum_floats = blocks * config.sum_floats(self.dim)
        self.grid = (self.query_blocks, self.heads, self.batch)
        self.kv_blocks = -(-self.keys // config.block_n)
        self.map_kind = query_map_kind(key.spec, config.grouped)
        symbols = key.spec.mask.free_symbols
        self.map_batches = self.batch if E.B in symbols else 1
        self.map_heads = self.heads if E.H in symbols else 1
        self.map_rows = self.map_batches * self.map_heads * self.kv_blocks
        self.map_words = self.map_rows * (2 + self.query_blocks) if self.map_kind else 0
        # In scratch memory, behind the row terms and the sums.
        self.map_counts = 4 * (self.row_floats + self.sum_floats)
        self.map_indices = self.map_counts + 8 * self.map_rows

    def with_captured(self, content: bytes, places: list) -> tuple[bytes, list]:
        assert len(content) % 8 == 0
        more, inside = self.captured()
        return content + more, places + [(len(content) + o, i, n) for o, i, n in inside]

    def captured(self) -> tuple[bytes, list]:
        """The struct Aux, and where its pointers are."""
        content, places = b"", []
        for x in aux_fields(self.key.spec):
            if x.kind == "pointer":
                places.append((len(content), x.index, 0))
                content += bytes(8)
            elif x.kind == "stride":
                content += struct.pack("q", self.aux[x.index].stride(x.axis))
            else:
                sizes = self.aux[x.index].shape if x.kind == "size" else self.sizes
                content += struct.pack("i", sizes[x.axis if x.kind == "size" else x.index])
        return content + bytes(-len(content) % 8), places

    def query_map(self) -> list[Launch]:
        """The lists of query blocks, where the mask wants some: queries and keys change places."""
        if not self.map_kind:
            return []
        content = struct.pack(
            "QQiiiiiii4x", 0, 0, self.map_batches, self.map_heads, self.kv_blocks,
            self.query_blocks, self.key.config.block_n, self.keys, self.queries,
        )  # fmt: skip
        places: list = [(0, "scratch", self.map_indices), (8, "scratch", self.map_counts)]
        rows = INTERVAL_ROWS if self.map_kind == "Interval" else 1
        threads = 32 * INTERVAL_ROWS if self.map_kind == "Interval" else 256
        grid = (-(-self.kv_blocks // rows), self.map_heads, self.map_batches)
        kernel = self.module.kernel("block_map")
        content, places = self.with_captured(content, places)
        return [Launch(kernel, grid, threads, 0, content, places, names=NAMES)]

    def row_terms(self, has_dlse: bool, keeps_delta: bool) -> Launch:
        used = ["out", "dout", "lse"] + (["dlse"] if has_dlse else [])
        places: list = [(8 * i, name, 0) for i, name in enumerate(used)]
        places += [(32, "scratch", 0), (40, "scratch", 4 * self.row_floats)]
        if keeps_delta:
            places.append((48, "delta", 0))
        if self.key.dead_rows:
            places.append((56, "dead", 0))
        content = bytes(64) + struct.pack("qqq", *self.out.stride()[:3])
        content += struct.pack("qqq", *self.dout.stride()[:3])
        content += struct.pack("iiii", self.heads, self.queries, self.keys, 0)
        kernel = self.module.kernel("row_terms")
        return Launch(kernel, self.grid, 256, 0, *self.with_captured(content, places), names=NAMES)

    def attention(self) -> Launch:
        config = self.key.config
        content, places = b"", []
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
            given, broadcast = self._tile(self.aux[tile])
            places.append((4 * MAP_BYTES, tile, 0))
            content = content[: 4 * MAP_BYTES] + given
            if self.key.tile_gradient:
                places.append((5 * MAP_BYTES, "dtile", 0))
                content += self._tile(tile_gradient(self.key.spec, self.aux[tile]))[0]
            content += bytes(6 * MAP_BYTES - len(content))
        at = len(content)
        places += [(at, "scratch", 4 * self.row_floats), (at + 8, "scratch", 0)]
        places += [(at + 16, "dk", 0), (at + 24, "dv", 0)]
        content += bytes(32)
        for x in (self.k, self.v):
            content += struct.pack("qqq", *torch.empty_like(x, device="meta").stride()[:3])
        tiles = self.kv_blocks * self.kv_heads * self.batch
        grid = min(tiles, _processors(self.q.device))
        content += struct.pack(
            "iiiiii", tiles, self.kv_blocks, self.kv_heads, self._section(), 1, grid
        )
        if config.longest_first:
            places.append((len(content), "counter", 0))
        content += bytes(8)
        if self.map_kind:
            places += [(len(content), "scratch", self.map_indices)]
            places += [(len(content) + 8, "scratch", self.map_counts)]
        content += struct.pack(
            "QQiii4x", 0, 0, self.map_heads * self.kv_blocks if self.map_batches > 1 else 0,
            self.kv_blocks if self.map_heads > 1 else 0, self.query_blocks,
        )  # fmt: skip
        group = self.heads // self.kv_heads
        content += struct.pack("iiii", group, self.queries, self.keys, self.query_blocks)
        content += struct.pack("ii", *broadcast)
        content, places = self.with_captured(content, places)
        content += bytes(-len(content) % 64)
        return Launch(
            self.module.kernel("attention_bwd"), (grid, 1, 1), config.threads,
            self.module.shared_bytes, content, places, names=NAMES,
        )  # fmt: skip

    def _tile(self, x: Tensor) -> tuple[bytes, tuple[int, int]]:
        """A map of the dense tensor or its gradient, and whether it has batches and heads."""
        load = _tile_candidate(self.key.spec)
        assert load is not None
        place = {axis: d for d, axis in enumerate(load.index) if axis != 0}
        sizes = [x.shape[place[a]] if a in place else 1 for a in E.COORDINATES]
        strides = [x.stride(place[a]) if a in place else 1 for a in E.COORDINATES]
        content = tensor_map(x, sizes, strides, (1, self.key.config.block_m, 64))
        return content, (int(E.B in place), int(E.H in place))

    def _section(self) -> int:
        """KV heads whose queries, dO and dQ may be in L2 together."""
        group = self.heads // self.kv_heads
        bytes_ = self.queries * group * (6 * self.dim + 2 * self.v.shape[3])
        section = max(1, SECTION_BYTES // max(bytes_, 1))
        return min(section, self.batch * self.kv_heads)

    def query_gradient(self) -> Launch:
        content = bytes(16)
        content += struct.pack("qqq", *torch.empty_like(self.q, device="meta").stride()[:3])
        content += struct.pack("ii", self.heads, self.queries)
        places: list = [(0, "scratch", 4 * self.row_floats), (8, "dq", 0)]
        threads = 128 * self.key.config.warpgroups
        kernel = self.module.kernel("query_gradient")
        return Launch(kernel, self.grid, threads, 0, content, places, names=NAMES)
