"""`cuda_sm90`: the CUDA C++ kernel for Hopper GPUs, built by NVRTC for each spec.

The kernel is kernels/sm90/attention_fwd.cuh; this file says what it takes, binds it to shapes and
strides. What a call costs on a warm path is said in lower/launch/launch_calls.py.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fa3_compile.lower.binaries import build_ahead
from fa3_compile.lower.binaries.build_nvrtc import (
    Built,
    compiler,
    load_all,
    load_first,
    missing,
    source_of,
)
from fa3_compile.lower.binaries.remembered import remembered
from fa3_compile.lower.bound import BindingKernel
from fa3_compile.lower.choose import Gradients, KernelBuildError, Problem, register
from fa3_compile.lower.kernels import cuda_sm90_backward_captured as backward
from fa3_compile.lower.kernels.cuda_sm90_forward_parameters import ForwardParameters
from fa3_compile.lower.kernels.cuda_sm90_keys import (
    DTYPES,
    ELEMENTS,
    asks_rows,
    keys_of,
    layout_of,
    likely_layout,
)
from fa3_compile.lower.kernels.cuda_sm90_lists import kept_lists
from fa3_compile.lower.launch.launch_calls import Launches
from fa3_compile.lower.launch.launch_cuda import Module, describable, ensure_context, load_module
from fa3_compile.lower.printers.printer import UnprintableError
from fa3_compile.lower.render.render_cuda import CudaKey, render
from fa3_compile.lower.tiles import tune
from fa3_compile.lower.tiles.config_sm90 import Sm90Config, variations
from fa3_compile.runtime.launch import Call
from fa3_compile.runtime.op import BackwardInputs, out_strides
from fa3_compile.spec.attention import AttentionSpec

log = logging.getLogger(__name__)

LARGEST_GRID = 65535


class CudaSm90(BindingKernel):
    """CUDA C++ for Hopper GPUs, forward and backward."""

    name = "cuda_sm90"
    priority = 20

    def supports(self, problem: Problem) -> str | None:
        if problem.device.type != "cuda":
            return f"it is for Hopper GPUs, this is {problem.device.type}"
        if problem.capability != (9, 0) or torch.version.hip is not None:
            return f"it is for compute capability 9.0, this is {problem.capability}"
        if not problem.spec.normalized:
            return "its weights are always a softmax"
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
        _load(problem.spec, keys_of(problem, likely_layout(problem)))

    def begin(self, problem: Problem) -> None:
        build_ahead.begin(self.prepare, problem)

    def begin_backward(self, problem: Problem) -> None:
        build_ahead.begin(backward.prepare, problem)

    def configuration(self, problem: Problem) -> str:
        key, _ = _load(problem.spec, keys_of(problem, likely_layout(problem)))
        return f"{key.config.block_m} x {key.config.block_n}"

    def source(self, problem: Problem) -> str:
        if tune.effort(problem) != "none":
            return ""
        key, _ = _load(problem.spec, keys_of(problem, likely_layout(problem)))
        return str(source_of(key) or "")

    def supports_backward(self, problem: Problem) -> str | None:
        return backward.supports_backward(problem)

    def run_backward(self, problem: Problem, given: BackwardInputs) -> Gradients:
        return backward.run_backward(problem, given)

    def backward_source(self, problem: Problem) -> str:
        return backward.source(problem)

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


@remembered
def _unprintable(spec: AttentionSpec) -> str | None:
    kinds = {"bool": "unsigned char", "int": "int64_t", "float": "float"}
    key = CudaKey(spec, "Bf16", 64, 64, Sm90Config(64, 64), tuple(kinds[x] for x in spec.aux))
    try:
        render(key)
    except UnprintableError as error:
        return f"an expression has no CUDA text: {error}"
    return None


class Bound(Launches):
    """The kernels of a call for one set of shapes and strides; calling it launches them.

    kept  the address of lists of key blocks that are kept between calls, or 0
    """

    def __init__(self, config: Sm90Config, kept: int, *arguments, **options) -> None:
        super().__init__(*arguments, **options, known={"lists": kept} if kept else {})
        self.config, self.kept = config, kept


@functools.lru_cache(maxsize=1024)
def _module(key: CudaKey, cubin: bytes, device: int) -> Module:
    return load_module(cubin)


def _load(spec: AttentionSpec, keys: Sequence[CudaKey]) -> tuple[CudaKey, Built]:
    """What `load_first` says. Raises KernelBuildError."""
    may_spill = keys[:1] and keys[0].config.block_m == 192 and asks_rows(spec)
    return load_first(keys, at_first=2 if may_spill else 1)


def bind(problem: Problem, q, k, v, aux, sizes, key: CudaKey | None = None) -> Bound:
    """The kernel for these tensors, which TMA can describe; `key` instead of the table's choice.

    Raises KernelBuildError.
    """
    spec = problem.spec
    if key is None:
        keys = keys_of(problem, layout_of(spec, aux))
        if tune.effort(problem) != "none":
            keys = [_tuned(problem, keys, q, k, v, aux, sizes)]
    else:
        keys = [key]
    key, built = _load(spec, keys)
    ensure_context(q.device.index)
    module = _module(key, built.cubin, q.device.index)
    shape = (*q.shape[:3], v.shape[3])
    stride = out_strides(shape, spec.out_order)
    parameters = ForwardParameters(spec, key, module, q, k, v, aux, sizes)
    kept = kept_lists(parameters, q.device.index)
    launches, scratch = parameters.launches(stride, kept=bool(kept))
    return Bound(
        key.config, kept, q.device.index, q.dtype, shape, stride, launches,
        scratch=scratch, lists=parameters.listed_bytes, tells=parameters.tells,
        counters=module.counters,
    )  # fmt: skip


def _tuned(problem: Problem, keys: Sequence[CudaKey], q, k, v, aux, sizes) -> CudaKey:
    """The key that is fastest on these tensors; `keys` are the table's. Raises KernelBuildError."""
    first, _ = _load(problem.spec, keys)
    alike = [x for x in keys if (x.tile, x.by_distance) == (first.tile, first.by_distance)]
    configs = [x.config for x in alike if x != first]
    if problem.autotune == "full":
        configs += variations(first.config, problem.dim, problem.v_dim, first.dense)
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


register(CudaSm90())
