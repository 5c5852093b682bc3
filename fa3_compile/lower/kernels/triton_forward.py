"""`triton`: one Triton flash-attention program per spec, for every CUDA GPU since Ampere.

The kernel's text is templates/triton/attention_forward.py.jinja; this file says what it takes,
binds it to shapes and strides. What a call costs on a warm path is said in
lower/launch/launch_calls.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fa3_compile.lower.binaries.assembler import sound_assembler
from fa3_compile.lower.binaries.build import load, source_of
from fa3_compile.lower.binaries.remembered import remembered
from fa3_compile.lower.bound import BindingKernel, are_small, precision
from fa3_compile.lower.choose import Gradients, KernelBuildError, Problem, register
from fa3_compile.lower.kernels.triton_direct import direct, on_tensors
from fa3_compile.lower.kernels.triton_keys import (
    in_parts,
    interpreted,
    likely_key,
    part_count,
    render_key,
    tile_count,
)
from fa3_compile.lower.kernels.triton_order import in_order, launches_of
from fa3_compile.lower.launch.launch_calls import Launches
from fa3_compile.lower.launch.launch_cuda import beside_captures, empty_cuda
from fa3_compile.lower.printers import hoist
from fa3_compile.lower.printers.printer import UnprintableError
from fa3_compile.lower.render.render import Aux, aux_parameters
from fa3_compile.lower.render.render_blocks import uses_lists
from fa3_compile.lower.render.render_forward import ForwardKey, is_prefix, render_forward
from fa3_compile.lower.tiles import tune, tune_forward
from fa3_compile.lower.tiles.config import TritonConfig, is_wide
from fa3_compile.runtime.launch import Call
from fa3_compile.runtime.op import BackwardInputs, empty_out, out_strides
from fa3_compile.spec.attention import AttentionSpec

log = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Offsets within a tile are 32-bit: a row or column stride below this keeps 256 of them there.
LARGEST_STRIDE = 2**23
LARGEST_BOUND = 4096


@dataclass(frozen=True)
class Bound:
    """A kernel for one set of shapes and strides.

    aux       the captured tensors that `launch` takes after q, k, v, out and LSE
    spills    registers that the compiler had to spill to memory
    launches  a call of it that goes past Triton's launcher, where that can be
    """

    config: TritonConfig
    aux: tuple[int, ...]
    launch: Callable[[Sequence[Tensor]], None]
    spills: int = 0
    launches: Launches | None = None


class TritonForward(BindingKernel):
    """Triton for CUDA GPUs since Ampere, forward and backward."""

    name = "triton"
    priority = 10

    def supports(self, problem: Problem) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if problem.device.type != "cuda" and not interpreted():
            return f"Triton kernels run on CUDA devices, not on {problem.device.type}"
        if torch.version.hip is not None:
            return "the Triton kernel is tuned and tested for NVIDIA GPUs only"
        if problem.capability is not None and problem.capability < (8, 0):
            return f"compute capability 8.0 or later is needed, this is {problem.capability}"
        if problem.dtype not in DTYPES:
            return f"q, k, v are {problem.dtype}; it takes bfloat16, float16 and float32"
        widest = tune_forward.widest(problem)
        for what, dim in (("head dim", problem.dim), ("value head dim", problem.v_dim)):
            if not 8 <= dim <= widest:
                return f"the {what} is {dim}; it takes 8 to {widest}"
        for i, dtype in enumerate(problem.aux_dtypes):
            if dtype.is_complex or dtype.itemsize < 1:
                return f"captured tensor {i} is {dtype}"
        return _unprintable(problem.spec)

    def prepare(self, problem: Problem) -> None:
        """Renders and imports the kernel; the device code is built for the strides of a call."""
        load(likely_key(problem))

    def configuration(self, problem: Problem) -> str:
        if problem.autotune != "none":
            return "tuned on the first call"
        config = tune_forward.table_config(problem)
        return f"{config.block_q} x {config.block_kv}"

    def source(self, problem: Problem) -> str:
        # Whether V is read out of K is seen when it runs.
        if problem.autotune != "none" or is_wide(problem):
            return ""
        return source_of(likely_key(problem))

    def bind(self, problem: Problem, q, k, v, aux, sizes) -> Call | None:
        if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
            return None
        if any(x.device != q.device for x in (k, v, *aux)):  # scalars on the CPU, for one
            return None
        if not are_small([*sizes, *(n for x in aux for n in x.shape)]):
            return None
        if not walkable(q, k, v):

            def copied(q, k, v, aux):
                return self.run(problem, q.contiguous(), k.contiguous(), v.contiguous(), aux, sizes)

            return copied
        try:
            bound = _bind(problem, q, k, v, aux, sizes)
        except KernelBuildError as error:
            log.warning(
                "triton could not be built for %s, head dims %d and %d, another kernel "
                "runs instead: %s", problem.spec, problem.dim, problem.v_dim, error
            )  # fmt: skip
            return None

        if bound.launches is not None:
            return bound.launches
        device, dtype, chosen, launch = q.device.index, q.dtype, bound.aux, bound.launch
        shape = (*q.shape[:3], v.shape[3])
        strides = out_strides(shape, problem.spec.out_order)
        rows = (shape[1] * shape[2], shape[2], 1)
        empty = empty_cuda if q.is_cuda else _empty_cpu

        def call(q, k, v, aux):
            if device is not None and torch._C._cuda_getDevice() != device:
                with torch.cuda.device(device):
                    return call(q, k, v, aux)
            out = empty(shape, strides, dtype)
            lse = empty(shape[:3], rows, torch.float32)
            launch([q, k, v, out, lse, *[aux[i] for i in chosen]])
            return out, lse

        return call

    def supports_backward(self, problem: Problem) -> str | None:
        # There: the two modules share how kernels are bound.
        from fa3_compile.lower.kernels import triton_backward

        return triton_backward.supports_backward(problem)

    def run_backward(self, problem: Problem, given: BackwardInputs) -> Gradients:
        from fa3_compile.lower.kernels import triton_backward

        return triton_backward.run_backward(problem, given)

    def backward_source(self, problem: Problem) -> str:
        from fa3_compile.lower.kernels import triton_backward

        return triton_backward.source(problem)


def _empty_cpu(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What the interpreter writes to."""
    return torch.empty_strided(shape, strides, dtype=dtype)


@remembered
def _unprintable(spec: AttentionSpec) -> str | None:
    try:
        render_forward(ForwardKey(spec, 64, 64))
    except UnprintableError as error:
        return f"an expression has no Triton text: {error}"
    return None


def _bind(problem: Problem, q, k, v, aux, sizes) -> Bound:
    """Chooses a configuration, builds the kernel for these arguments and returns its launch."""
    if tune.effort(problem) == "none" or interpreted():
        return _bind_first_that_builds(problem, q, k, v, aux, sizes)
    candidates = tune_forward.candidates(problem)

    def measure(config: TritonConfig) -> float:
        try:
            if config == candidates[0]:  # or, where V is in K, the tile for that
                bound = _bind_first_that_builds(problem, q, k, v, aux, sizes)
            else:
                bound = bind_config(problem, config, q, k, v, aux, sizes)
        except KernelBuildError:
            return tune.UNFIT
        if bound.spills and config != candidates[0]:
            return tune.UNFIT
        tensors = [q, k, v, *outputs(problem, q, v), *(aux[i] for i in bound.aux)]
        return tune.seconds(lambda: bound.launch(tensors))

    with torch.cuda.device(q.device):
        config = tune.tuned(problem, "triton", _compiler(), candidates, measure)
    if config == candidates[0]:
        return _bind_first_that_builds(problem, q, k, v, aux, sizes)
    return bind_config(problem, config, q, k, v, aux, sizes)


def _compiler() -> str:
    import triton

    return triton.__version__


def _bind_first_that_builds(problem: Problem, q, k, v, *arguments) -> Bound:
    """The table's configuration; where that exceeds the device after all, smaller ones."""
    config, errors = tune_forward.table_config(problem), []
    if _is_shared(problem, k, v):
        with contextlib.suppress(KernelBuildError):  # what else the score reads may take its room
            shared = tune_forward.table_config(problem, shared=True)
            return bind_config(problem, shared, q, k, v, *arguments)
    while True:
        try:
            return bind_config(problem, config, q, k, v, *arguments)
        except KernelBuildError as error:
            errors.append(str(error))
            smaller = smaller_config(config)
            if smaller is None:
                raise KernelBuildError("; ".join(errors)) from error
            config = smaller


def _is_shared(problem: Problem, k: Tensor, v: Tensor) -> bool:
    """Whether V is the first columns of K, in the same memory, and taken from there."""
    if k.data_ptr() != v.data_ptr() or not is_wide(problem):
        return False
    alike = all(n == 1 or a == b for n, a, b in zip(k.shape, k.stride(), v.stride()))
    return alike and is_prefix(problem.dim, problem.v_dim, in_parts(problem))


def walkable(*tensors: Tensor) -> bool:
    """Whether offsets within their tiles fit 32 bits."""
    widest = max(256, *(x.shape[3] for x in tensors))
    return max(s for x in tensors for s in x.stride()[2:]) * widest < 256 * LARGEST_STRIDE


def smaller_config(config: TritonConfig) -> TritonConfig | None:
    """A configuration that needs less shared memory and fewer registers, if there is one."""
    q, kv, stages = config.block_q, config.block_kv, config.num_stages
    plain = TritonConfig(q, kv, config.num_warps, 1, packed=config.packed)
    if stages > 1:
        return replace(plain, num_stages=stages - 1)
    if kv > 16:
        return replace(plain, block_kv=kv // 2)
    if q > 16:
        return replace(plain, block_q=q // 2, num_warps=min(config.num_warps, 4))
    return None


def outputs(problem: Problem, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised (out, LSE)."""
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return empty_out(q, v, problem.spec.out_order), lse


def _take_descriptors(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can describe them: last stride 1, the rest whole 16 bytes."""
    return all(
        x.stride(3) == 1
        and not any(stride * x.itemsize % 16 for stride in x.stride()[:3])
        and x.data_ptr() % 16 == 0
        for x in tensors
    )


def bind_config(problem: Problem, config: TritonConfig, q, k, v, aux, sizes) -> Bound:
    """The kernel with one configuration, for the shapes and strides of these tensors.

    Raises KernelBuildError where it does not compile or exceeds the device.
    """
    spec = problem.spec
    shared = _is_shared(problem, k, v)
    if config.tma and not _take_descriptors(k, v):
        config = replace(config, tma=False, warp_specialize=False)
    lists = None
    if uses_lists(spec, q.shape[2], k.shape[2]):
        # There: it needs what this module says of building.
        from fa3_compile.lower.kernels.triton_blocks import bind_lists

        config = replace(config, packed=False)
        lists = bind_lists(spec, "kv", config, q, k, aux, sizes)
    tiles = tile_count(config, q.shape[0], q.shape[1], k.shape[1], q.shape[2])
    # There: as above.
    from fa3_compile.lower.kernels.triton_split import bind_parts

    count = part_count(problem, tiles, k.shape[2])
    key = render_key(problem, config, lists is not None, count > 1, shared)
    kernel = load(key).attention_forward
    used = aux_parameters(spec)
    out, lse = outputs(problem, q, v)
    strides = [s for x in (q, k, v, out) for s in x.stride()]
    named = {"H": q.shape[1], "Sq": q.shape[2], "Skv": k.shape[2]}
    if count > 1:
        named |= {"PARTS": count, "ROWS": q.shape[0] * q.shape[1] * q.shape[2]}
    for x in used:
        named |= zip(x.integers, _aux_integers(x, aux[x.tensor]))
    named |= {f"n{i}": n for i, n in enumerate(sizes[: spec.size_count])}
    integers = [*strides, *named.values()]
    dead_rows = may_have_dead_rows(spec, q.shape[2], k.shape[2])
    constants: tuple[Any, ...] = (
        q.shape[1] // k.shape[1],
        k.shape[2] % config.block_kv == 0,
        dead_rows,
        config.block_q,
        config.block_kv,
        precision(q.dtype),
    )
    grid = (tiles * count, 1, 1)
    chosen = tuple(x.tensor for x in used)
    parts = None
    if count > 1:
        parts = bind_parts(key, count, dead_rows, q, out, lse, aux, named)

    if interpreted():

        def interpret(tensors: Sequence[Tensor]) -> None:
            kernel[grid](*tensors, *integers, *constants, **config.options(q.dtype))

        return Bound(config, chosen, in_order(lists, parts, chosen, interpret))

    tensors = [q, k, v, out, lse, *(aux[i] for i in chosen)]
    tensors += [torch.empty(1, dtype=torch.int32, device=q.device)] * (2 * (lists is not None))
    tensors += [lse.new_empty(1)] * (2 * (parts is not None))
    arguments = [*tensors, *integers, *constants]
    compiled, runner = built(kernel, config, grid, q, arguments)
    found = direct(compiled, grid[0], dict(zip(kernel.arg_names, arguments)))
    launch = on_tensors(found, compiled, runner, grid[0], q.device, (*integers, *constants))
    launch = in_order(lists, parts, chosen, launch)
    launches = launches_of(problem, compiled, found, grid[0], lists, parts, shared, out)
    return Bound(config, chosen, launch, compiled.n_spills, launches)


def built(kernel, config: TritonConfig, grid, q: Tensor, arguments) -> tuple[Any, Any]:
    """Triton's CompiledKernel for such arguments, and what launches it. Raises KernelBuildError."""
    options = config.options(q.dtype)
    try:
        major, minor = torch.cuda.get_device_capability(q.device)
        with torch.cuda.device(q.device), beside_captures(), sound_assembler(10 * major + minor):
            compiled = kernel.warmup(*arguments, grid=grid, **options)
            return compiled, compiled[grid]
    except Exception as error:
        raise KernelBuildError(f"{kernel.__name__} {config} does not build: {error}") from error


def _aux_integers(used: Aux, x: Tensor) -> list[int]:
    return [x.stride(d) for d in used.strides] + [x.shape[d] for d in used.sizes]


def may_have_dead_rows(spec: AttentionSpec, q_len: int, kv_len: int) -> bool:
    """Whether the kernel has to look for rows that the mask leaves nothing of."""
    kind = _dead_rows(spec)
    return kind == "maybe" or (kind == "long" and q_len > kv_len)


@functools.lru_cache(maxsize=4096)
def _dead_rows(spec: AttentionSpec) -> str:
    # A bias of -inf hides a row's keys as well as the mask does.
    return "maybe" if hoist.may_be_minus_inf(spec.score) else hoist.dead_rows(spec.mask)


register(TritonForward())
