"""Runs the operators of `runtime.op`: the chosen kernel family, or the reference.

The one place where tensors become a Problem at run time; `lower.inductor` asks the same
`choose` with the same Problem at compile time.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fa3_compile.lower.bound import BindingKernel
from fa3_compile.lower.choose import (
    Gradients,
    Kernel,
    KernelBuildError,
    Problem,
    choose,
    choose_backward,
    next_after,
    reference,
)
from fa3_compile.lower.verify import verify, verify_gradients
from fa3_compile.runtime.launch import Call
from fa3_compile.runtime.op import BackwardInputs, split_text

log = logging.getLogger(__name__)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


# What captured integers are read as: arithmetic does not overflow there, as 0 - 1 does in uint8,
# and PyTorch has it, as it has not for uint16 and wider.
WIDENED = dict.fromkeys((torch.uint8, torch.int8, torch.int16, torch.uint16), torch.int32)
WIDENED |= dict.fromkeys((torch.uint32, torch.uint64), torch.int64)


def read_as(dtype: torch.dtype) -> torch.dtype:
    """The type in which kernels read a captured tensor of this one."""
    return WIDENED.get(dtype, dtype)


def widened(aux: Sequence[Tensor]) -> list[Tensor]:
    """Captured tensors in the types that kernels read."""
    return [x.to(read_as(x.dtype)) for x in aux]


def make_problem(
    text: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    aux: Sequence[Tensor],
    needs: Sequence[bool] = (),
    lengths: Sequence[int] | None = None,
) -> Problem:
    """The Problem of one call; `needs` as the backward operator has it, empty for none.

    `lengths` are hints for (B, H, Hkv, Sq, Skv, D, Dv) where the shapes are symbolic.
    """
    spec, options = split_text(text)
    if lengths is None:
        lengths = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])
        lengths = (*lengths, v.shape[3])
    return Problem(
        spec,
        q.dtype,
        q.device,
        _capability(q.device),
        *lengths,
        aux_dtypes=tuple(read_as(x.dtype) for x in aux),
        needs_grad=any(needs),
        aux_needs_grad=tuple(needs[3:]) or (False,) * len(aux),
        autotune=options.get("autotune", "none"),
        deterministic=options.get("deterministic") == "True"
        or torch.are_deterministic_algorithms_enabled(),
    )


def allowed_kernels(options: Mapping[str, str]) -> tuple[str, ...] | None:
    """The families that the spec text's options allow; None for the default."""
    names = options.get("kernels")
    return tuple(names.split(",")) if names else None


def wants_verification(options: Mapping[str, str]) -> bool:
    """Whether the reference runs beside the kernel; the operator then stays a call."""
    return options.get("verify") == "True"


@functools.lru_cache(maxsize=4096)
def built(problem: Problem, allowed: tuple[str, ...] | None) -> Kernel:
    """The chosen kernel, ready to run; the reference where there is none."""
    kernel = choose(problem, allowed).kernel or reference()
    while kernel is not reference():
        try:
            kernel.prepare(problem)
            return kernel
        except KernelBuildError as error:
            following = next_after(kernel, problem, allowed)
            log.warning("%s could not be built, %s runs: %s", kernel.name, following.name, error)
            kernel = following
    return kernel


@functools.lru_cache(maxsize=4096)
def built_backward(problem: Problem, allowed: tuple[str, ...] | None) -> Kernel:
    """As `choose_backward`, once."""
    return choose_backward(problem, allowed)


def is_direct(kernel: Kernel, options: Mapping[str, str], aux: Sequence[Tensor]) -> bool:
    """Whether generated code may call the kernel's launch without the operator around it."""
    widens = any(x.dtype in WIDENED for x in aux)
    return isinstance(kernel, BindingKernel) and not widens and not wants_verification(options)


def bound(text: str, q, k, v, aux, sizes, lse: bool = True) -> Call | None:
    """What `forward` would call for these arguments and others of their layouts; None where it
    has more to do than that. `lse`: whether that is read."""
    problem = replace(make_problem(text, q, k, v, aux), wants_lse=lse)
    options = split_text(text)[1]
    kernel = built(problem, allowed_kernels(options))
    if not is_direct(kernel, options, aux):
        return None
    assert isinstance(kernel, BindingKernel)
    return kernel.bound(problem, q, k, v, aux, sizes)


def bound_backward(
    text: str, q, k, v, aux, needs: Sequence[bool]
) -> Callable[[BackwardInputs], Gradients]:
    """What `backward` would call for these arguments and others of their layouts."""
    asked = make_problem(text, q, k, v, aux, needs)
    widens = any(x.dtype in WIDENED for x in aux)
    always = split_text(text)[1].get("deterministic") == "True"
    allowed = allowed_kernels(split_text(text)[1])
    chosen: dict[bool, tuple[Problem, Kernel]] = {}

    def call(given: BackwardInputs) -> Gradients:
        # PyTorch's switch may be turned between two calls.
        deterministic = always or torch.are_deterministic_algorithms_enabled()
        if deterministic not in chosen:
            problem = replace(asked, deterministic=deterministic)
            chosen[deterministic] = problem, built_backward(problem, allowed)
        problem, kernel = chosen[deterministic]
        if widens:
            given = given._replace(aux=widened(given.aux))
        return kernel.run_backward(problem, given)

    return call


def forward(q, k, v, aux, sizes, text: str) -> tuple[Tensor, Tensor]:
    """`fa3::attention`. The choice does not depend on which gradients will be asked for."""
    aux = widened(aux)
    problem = make_problem(text, q, k, v, aux)
    options = split_text(text)[1]
    kernel = built(problem, allowed_kernels(options))
    out, lse = kernel.run(problem, q, k, v, aux, sizes)
    if wants_verification(options):
        verify(kernel, problem, q, k, v, aux, sizes, out)
    return out, lse


def backward(given: BackwardInputs, text: str) -> Gradients:
    """`fa3::attention_backward`."""
    given = given._replace(aux=widened(given.aux))
    problem = make_problem(text, given.q, given.k, given.v, given.aux, given.needs)
    options = split_text(text)[1]
    kernel = built_backward(problem, allowed_kernels(options))
    found = kernel.run_backward(problem, given)
    if wants_verification(options):
        verify_gradients(kernel, problem, given, found)
    return found
