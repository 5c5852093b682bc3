"""The gradients of an attention by CUDA C++ kernels for Hopper GPUs, in O(S) memory.

Three launches: row terms, the main kernel (kernels/sm90/attention_bwd.cuh) and dQ from its fp32
sums, as far as the main kernel leaves these to them; one more where a row may be NaN. They
recompute P from the LSE, so any forward that writes the LSE of `fa3::attention` may have run before
them. Rows without a key under a fill are added by Triton's kernels (triton_uniform_rows.py), sinks,
which are O(S), by torch. dQ is summed in the order in which blocks come to it: where every bit has
to be repeated, the Triton backward runs, which has no atomics.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fa3_compile.lower.binaries.build_nvrtc import source_of
from fa3_compile.lower.binaries.remembered import remembered
from fa3_compile.lower.choose import (
    Gradients,
    KernelBuildError,
    Problem,
    choose_backward,
)
from fa3_compile.lower.kernels.cuda_sm90_backward_keys import (
    finds_dead_rows,
    keys_of,
    likely_keys,
    load_best,
    score_gradient,
)
from fa3_compile.lower.kernels.cuda_sm90_backward_parameters import (
    BackwardParameters,
    gradient_strides,
    is_stored_whole,
)
from fa3_compile.lower.kernels.cuda_sm90_keys import DTYPES, layout_of
from fa3_compile.lower.kernels.cuda_sm90_lists import kept_lists
from fa3_compile.lower.kernels.dead_rows import add_uniform_rows
from fa3_compile.lower.kernels.sinks import sink_gradients
from fa3_compile.lower.launch.launch_cuda import (
    Launch,
    Module,
    describable,
    empty_cuda,
    ensure_context,
    load_module,
)
from fa3_compile.lower.printers.elements import Shape
from fa3_compile.lower.printers.printer import UnprintableError
from fa3_compile.lower.render.render_backward import has_fill_rows
from fa3_compile.lower.render.render_cuda_backward import CudaBackwardKey
from fa3_compile.lower.tiles.config_sm90_backward import Sm90BackwardConfig
from fa3_compile.runtime.launch import layout_key, make_room
from fa3_compile.runtime.op import BackwardInputs
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec

log = logging.getLogger(__name__)

NAME = "cuda_sm90"
LARGEST_BOUND = 2048
# Where the first tile spills: most forms that spill there do so in all but the last.
BUILT_AT_ONCE = 4


def supports_backward(problem: Problem) -> str | None:
    """None, or why these gradients are left to another family, as a sentence."""
    spec = problem.spec
    if problem.deterministic or torch.are_deterministic_algorithms_enabled():
        return "its dQ is summed in no fixed order"
    if problem.dim <= 64 and problem.v_dim > 128:
        return f"its backward takes no head dim {problem.dim} with {problem.v_dim} for values"
    if spec.weight is not None and max(problem.dim, problem.v_dim) > 128:
        return "with a factor after the softmax its backward takes head dims up to 128"
    if reason := score_gradient(problem)[1]:
        return reason
    if finds_dead_rows(spec, problem.q_len, problem.kv_len):
        if has_fill_rows(spec) or spec.sinks:
            return "a row without a key has scores of its own"
    return _unprintable(spec)


@remembered
def _unprintable(spec: AttentionSpec) -> str | None:
    kinds = {"bool": "unsigned char", "int": "int64_t", "float": "float"}
    elements = tuple(kinds[x] for x in spec.aux)
    try:
        CudaBackwardKey(spec, "Bf16", 64, 64, Sm90BackwardConfig(128, 128), elements).source()
    except (UnprintableError, TypeError) as error:
        return f"a gradient has no CUDA text: {error}"
    return None


def prepare(problem: Problem) -> None:
    """Builds the kernels as contiguous captured tensors want them. Raises KernelBuildError."""
    load_best(likely_keys(problem), at_once=BUILT_AT_ONCE)


def source(problem: Problem) -> str:
    """`Kernel.backward_source`."""
    key, _ = load_best(likely_keys(problem), at_once=BUILT_AT_ONCE)
    return str(source_of(key) or "")


Strides = tuple[int, ...]
Run = Callable[[Problem, BackwardInputs], Gradients]


@dataclass
class BoundBackward:
    """The kernels of one backward for one set of shapes and strides.

    grad_strides   of dq, dk and dv
    scratch_words  of 4 bytes: the row terms, dQ's sums and the lists of query blocks
    lists          the address of lists that are kept between calls, or 0
    lists_at       where else they are in scratch memory, in bytes
    uniform_rows   adds rows without a key, where they are looked for; None leaves them to torch
    tile           the captured tensor whose gradient the kernel stores
    tile_strides   of that gradient
    tile_is_whole  the kernel stores all of it
    """

    device: int
    config: Sm90BackwardConfig
    module: Module
    grad_strides: tuple[Strides, Strides, Strides]
    scratch_words: int
    lists: int
    lists_at: int
    keeps_delta: bool
    finds_dead: bool
    uniform_rows: Callable[[Mapping[str, Tensor]], None] | None
    tile: int | None
    tile_strides: Strides
    tile_is_whole: bool
    takes_counter: bool
    launches: tuple[Launch, ...]

    def __call__(self, problem: Problem, given: BackwardInputs) -> Gradients:
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                return self(problem, given)
        dout, dlse, q, k, v, out, lse, aux, _, needs = given
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        of_q, of_k, of_v = self.grad_strides
        # An exact tuple: the function refuses a torch.Size.
        dq = empty_cuda(tuple(q.shape), of_q, q.dtype)
        dk = empty_cuda(tuple(k.shape), of_k, k.dtype)
        dv = empty_cuda(tuple(v.shape), of_v, v.dtype)
        scratch = empty_cuda((self.scratch_words,), (1,), torch.float32)
        counter, kept = self.module.counter(stream) if self.takes_counter else (0, None)
        delta = torch.empty_like(lse) if self.keeps_delta else None
        dead = torch.empty_like(lse, dtype=torch.int8) if self.finds_dead else None
        dtile = None if self.tile is None else self.tile_gradient(aux[self.tile])
        addresses = [
            0 if x is None else x.data_ptr()
            for x in (q, k, v, out, lse, dout, dlse, dq, dk, dv)
        ]  # fmt: skip
        addresses += [counter, scratch.data_ptr()]
        addresses += [0 if x is None else x.data_ptr() for x in (delta, dead, dtile)]
        addresses.append(self.lists or scratch.data_ptr() + self.lists_at)
        addresses += [x.data_ptr() for x in aux]
        for launch in self.launches:
            launch(stream, addresses)
        del kept, scratch
        if dead is not None:
            self.add_dead_rows(problem.spec, dead, delta, (dq, dk, dv), q, k, v, dout)
        captured = captured_gradients(problem.spec, self.tile, dtile, delta, given)
        wanted = [x if n else None for x, n in zip((dq, dk, dv), needs[:3])]
        return wanted[0], wanted[1], wanted[2], captured

    def add_dead_rows(self, spec, dead, delta, grads, q, k, v, dout) -> None:
        if self.uniform_rows is None:
            return add_uniform_rows(spec, dead, delta, grads, q, k, v, dout, torch.bfloat16)
        names = ("dq_ptr", "dk_ptr", "dv_ptr", "q_ptr", "k_ptr", "v_ptr", "dout_ptr")
        tensors = dict(zip(names, (*grads, q, k, v, dout)))
        self.uniform_rows({**tensors, "dead_ptr": dead, "delta_ptr": delta})

    def tile_gradient(self, tensor: Tensor) -> Tensor:
        """Where the kernel stores a dense input's gradient, or adds to it."""
        grad = tensor.new_empty_strided(tensor.shape, self.tile_strides)
        return grad if self.tile_is_whole else grad.zero_()


# What `_bind_or_leave` gave for such arguments.
_bound: dict[tuple, Run] = {}


def run_backward(problem: Problem, given: BackwardInputs) -> Gradients:
    """`Kernel.run_backward`; another family's where this one has no kernel after all."""
    if torch.are_deterministic_algorithms_enabled():  # and were not when this was chosen
        return leave(problem, given)
    dout, dlse, q, k, v, out, _, aux, sizes, needs = given
    if dlse is not None:  # it may be a broadcast scalar; the kernel reads rows of B * H * Sq
        given = given._replace(dlse=dlse.to(torch.float32).contiguous())
    layout = layout_key((q, k, v, dout, out, *aux), sizes)
    key = (problem.spec, dlse is None, tuple(needs), layout)
    bound = _bound.get(key)
    if bound is None:
        bound = _bind_or_leave(problem, given)
        make_room(_bound, LARGEST_BOUND)
        _bound[key] = bound
    return bound(problem, given)


def leave(problem: Problem, given: BackwardInputs) -> Gradients:
    """The gradients by the family that comes after this one."""
    return choose_backward(problem, after=NAME).run_backward(problem, given)


def _adapted(problem: Problem, given: BackwardInputs) -> Gradients:
    """Of tensors that TMA cannot describe, or on other devices."""
    dout, _, q, k, v, out, *_ = given
    dout, q, k, v, out = (
        x if describable(x) else x.clone(memory_format=torch.contiguous_format)
        for x in (dout, q, k, v, out)
    )
    aux = [x.to(q.device) for x in given.aux]
    return run_backward(problem, given._replace(dout=dout, q=q, k=k, v=v, out=out, aux=aux))


def _bind_or_leave(problem: Problem, given: BackwardInputs) -> Run:
    dout, _, q, k, v, out, _, aux, _, _ = given
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0 or supports_backward(problem):
        return leave
    if not all(map(describable, (q, k, v, dout, out))) or any(x.device != q.device for x in aux):
        return _adapted
    if not keys_of(problem, layout_of(problem.spec, aux, DTYPES)):
        return leave  # a dense input that TMA cannot describe
    try:
        with torch.cuda.device(q.device):
            return bind(problem, given)
    except KernelBuildError as error:
        log.warning("the backward of cuda_sm90 could not be built for %s: %s", problem.spec, error)
        return leave


@functools.lru_cache(maxsize=1024)
def _module(key: CudaBackwardKey, cubin: bytes, device: int) -> Module:
    return load_module(cubin, "attention_bwd")


def bind(
    problem: Problem, given: BackwardInputs, key: CudaBackwardKey | None = None
) -> BoundBackward:
    """The kernels for these tensors, which TMA can describe; `key` instead of the table's choice.

    Raises KernelBuildError.
    """
    dout, dlse, q, k, v, out, _, aux, sizes, needs = given
    spec = problem.spec
    layout = layout_of(spec, aux, DTYPES)
    keys = keys_of(problem, layout) if key is None else [key]
    key, built = load_best(keys, at_once=BUILT_AT_ONCE)
    ensure_context(q.device.index)
    module = _module(key, built.cubin, q.device.index)
    wanted = [i for i, n in enumerate(needs[3:]) if n]
    keeps_delta = key.dead_rows or any(x.tensor in wanted for x in E.loads_in(*spec.sinks))
    parameters = BackwardParameters(key, module, q, k, v, dout, out, aux, sizes)
    lists = kept_lists(parameters, q.device.index)
    tile = key.tile if key.tile_gradient else None
    q_strides, k_strides, v_strides = (
        torch.empty_like(x, device="meta").stride() for x in (q, k, v)
    )
    return BoundBackward(
        q.device.index,
        key.config,
        module,
        (q_strides, k_strides, v_strides),
        parameters.scratch_words(kept=bool(lists)),
        lists,
        parameters.lists_at,
        keeps_delta,
        key.dead_rows,
        bind_dead_rows(spec, q, k, v, dout) if key.dead_rows else None,
        tile,
        () if tile is None else gradient_strides(aux[tile]),
        is_stored_whole(key, q, k, aux),
        key.config.longest_first and not (key.config.finishes or key.config.beside),
        parameters.launches(dlse is not None, keeps_delta, kept=bool(lists)),
    )


def bind_dead_rows(spec: AttentionSpec, q, k, v, dout):
    """Triton kernels that add rows without a key; None where there is no Triton."""
    try:
        from fa3_compile.lower.kernels.triton_uniform_rows import bind_uniform_rows

        tensors = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "dout_ptr": dout}
        tensors |= {f"d{name}_ptr": torch.empty_like(x) for name, x in zip("qkv", (q, k, v))}
        return bind_uniform_rows(spec, tensors)
    except (ImportError, KernelBuildError) as error:
        log.warning("rows without a key are left to torch: %s", error)
        return None


def captured_gradients(
    spec: AttentionSpec, tile: int | None, dtile, delta, given: BackwardInputs
) -> list[Tensor | None]:
    """The gradients of the captured tensors, None for those that are not wanted.

    tile, dtile  a dense input, and its gradient, which the kernel has stored
    delta        [B, H, Sq], where sinks have a gradient: rowsum(dO * O) - dLSE
    """
    _, _, q, k, _, _, lse, aux, sizes, needs = given
    wanted = [i for i, n in enumerate(needs[3:]) if n]
    if not wanted:
        return [None] * len(aux)
    grads: list[Tensor | None] = [
        torch.zeros_like(x) if i in wanted and i != tile else None for i, x in enumerate(aux)
    ]
    shape = Shape(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    for i, x in sink_gradients(spec, wanted, lse, delta, shape, aux, sizes).items():
        grads[i] = x
    if tile is not None:
        grads[tile] = dtile
    return grads
