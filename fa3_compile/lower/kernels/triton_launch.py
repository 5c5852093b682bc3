"""Triton kernels built for the shapes and strides of a call, and launched by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from fa3_compile.lower.choose import KernelBuildError
from fa3_compile.lower.kernels import triton_forward as forward
from fa3_compile.lower.kernels.triton_direct import direct, on_tensors
from fa3_compile.lower.launch import launch_cuda
from fa3_compile.lower.tiles.config import TritonConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """One kernel for one set of shapes and strides.

    pointers  names of the tensors it takes
    run       launches it on tensors in that order
    direct    the same with addresses
    """

    pointers: tuple[str, ...]
    run: Callable[[Sequence[Tensor]], None]
    spills: int = 0
    direct: launch_cuda.Launch | None = None

    def __call__(self, tensors: Mapping[str, Tensor]) -> None:
        self.run([tensors[x] for x in self.pointers])


# What a backward's kernels take strides of, and the axis of its length.
LENGTHS = {
    "q": "q",
    "k": "kv",
    "v": "kv",
    "dout": "q",
    "out": "q",
    "dq": "q",
    "dk": "kv",
    "dv": "kv",
}


def stride_parameters(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The strides of those of `LENGTHS` that are there, by the names of a kernel's parameters."""
    found = {}
    for name, length in LENGTHS.items():
        if (x := tensors.get(f"{name}_ptr")) is not None:
            axes = ("b", "h", length, "d")
            found |= {f"{name}_stride_{axis}": n for axis, n in zip(axes, x.stride())}
    return found


def first_that_builds(bind_it: Callable[[TritonConfig], T], config: TritonConfig) -> T:
    """What a configuration gives, or the first smaller one that builds. Raises KernelBuildError."""
    errors = []
    while True:
        try:
            return bind_it(config)
        except KernelBuildError as error:
            errors.append(str(error))
            smaller = forward.smaller_config(config)
            if smaller is None:
                raise KernelBuildError("; ".join(errors)) from error
            config = smaller


def bind_kernel(kernel, config: TritonConfig, programs: int, tensors, integers, constants):
    """One kernel built with one configuration. Raises KernelBuildError."""
    values = {
        **integers,
        **constants,
        "BLOCK_Q": config.block_q,
        "BLOCK_KV": config.block_kv,
        "EVEN_Q": integers["Sq"] % config.block_q == 0,
        "EVEN_KV": integers["Skv"] % config.block_kv == 0,
    }
    names = kernel.arg_names
    pointers = tuple(x for x in names if x in tensors)
    arguments = tuple(values[x] for x in names if x not in tensors)
    grid = (programs, 1, 1)
    q = tensors["q_ptr"]
    if forward.interpreted():
        options = config.options(q.dtype)
        return Launch(pointers, lambda xs: kernel[grid](*xs, *arguments, **options))
    like = [tensors[x] for x in pointers]
    compiled, runner = forward.built(kernel, config, grid, q, [*like, *arguments])
    launch = direct(compiled, programs, values)
    run = on_tensors(launch, compiled, runner, programs, q.device, arguments)
    return Launch(pointers, run, compiled.n_spills, launch)
