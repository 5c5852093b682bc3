"""Which kernel family computes an attention, and why the others do not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fa3_compile.runtime.op import BackwardInputs
from fa3_compile.spec.attention import AttentionSpec

# Modules of fa3_compile.lower.kernels; importing one registers its families.
MODULES = ("reference", "cpu", "triton_forward", "cuda_sm90")
# What stands for a length that is read from a tensor, and known only when the kernel runs.
TYPICAL_LENGTH = 1024


class KernelBuildError(RuntimeError):
    """A kernel that said it supports a problem could not be built for it."""


@dataclass(frozen=True)
class Problem:
    """One attention on one device; the lengths are hints where they are dynamic.

    wants_lse  whether anything reads the LSE, as gradients do
    """

    spec: AttentionSpec
    dtype: torch.dtype
    device: torch.device
    capability: tuple[int, int] | None
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int
    v_dim: int
    aux_dtypes: tuple[torch.dtype, ...] = ()
    needs_grad: bool = False
    aux_needs_grad: tuple[bool, ...] = ()
    wants_lse: bool = True
    # What the user asked of the kernels: see fa3_compile.options.
    autotune: str = "none"
    deterministic: bool = False

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // max(self.kv_heads, 1)


Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None", "list[Tensor | None]"]


class Kernel:
    """A kernel family. Subclass, fill in, and `register` an instance.

    name      what users write in `kernels=`
    priority  the highest that supports a problem is chosen
    inline    `run` is a program of torch operators that Inductor should compile into its own
              code; otherwise the operator stays one call
    """

    name: str
    priority: int
    inline: bool = False

    def supports(self, problem: Problem) -> str | None:
        """None, or the reason why not, as a sentence."""
        raise NotImplementedError

    def prepare(self, problem: Problem) -> None:
        """Builds the kernel; raises KernelBuildError."""

    def begin(self, problem: Problem) -> None:
        """Begins to build what `prepare` builds, and returns at once."""

    def begin_backward(self, problem: Problem) -> None:
        """As `begin`, of what the first `run_backward` builds."""

    def configuration(self, problem: Problem) -> str:
        """What a prepared kernel runs with, for the report: its tile; "" where there is nothing
        to say."""
        return ""

    def source(self, problem: Problem) -> str:
        """The file with a prepared kernel's generated source, for the report; "" where there is
        none, or where the first call decides which one it is."""
        return ""

    def run(
        self,
        problem: Problem,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        aux: Sequence[Tensor],
        sizes: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """(out [B,H,Sq,Dv], lse [B,H,Sq]); the shapes of AttentionSpec."""
        raise NotImplementedError

    def supports_backward(self, problem: Problem) -> str | None:
        """As `supports`, for `run_backward`; without one the reference computes gradients."""
        return f"{self.name} has no backward of its own"

    def run_backward(self, problem: Problem, given: BackwardInputs) -> Gradients:
        """(dq, dk, dv, daux); None for those that `given.needs` leaves out."""
        raise NotImplementedError

    def backward_source(self, problem: Problem) -> str:
        """As `source`, of `run_backward`, whose kernels are built if they are not yet."""
        return ""


@dataclass(frozen=True)
class Choice:
    """The chosen kernel, and for each of the others the sentence why not."""

    kernel: Kernel | None
    reasons: dict[str, str] = field(default_factory=dict)


_kernels: dict[str, Kernel] = {}


def register(kernel: Kernel) -> None:
    """Adds a family; one of the same name is replaced."""
    _kernels[kernel.name] = kernel


@functools.cache
def _import_families() -> None:
    for name in MODULES:
        module = f"fa3_compile.lower.kernels.{name}"
        if importlib.util.find_spec(module):
            importlib.import_module(module)


def kernels() -> list[Kernel]:
    """Every registered family, the one to try first first."""
    _import_families()
    return sorted(_kernels.values(), key=lambda x: -x.priority)


def choose(problem: Problem, allowed: Sequence[str] | None = None) -> Choice:
    """The first family that supports the problem, of the `allowed` names (default: all but
    "reference", which has to be asked for by name)."""
    reasons: dict[str, str] = {}
    chosen = None
    for kernel in kernels():
        if allowed is None and kernel.name == REFERENCE:
            reasons[kernel.name] = f"{REFERENCE} is taken only when asked for by name"
        elif allowed is not None and kernel.name not in allowed:
            reasons[kernel.name] = f"{kernel.name} is not among the allowed {', '.join(allowed)}"
        elif chosen is not None:
            reasons[kernel.name] = f"{chosen.name} comes first"
        elif reason := kernel.supports(problem):
            reasons[kernel.name] = reason
        else:
            chosen = kernel
    return Choice(chosen, reasons)


def choose_backward(
    problem: Problem, allowed: Sequence[str] | None = None, after: str | None = None
) -> Kernel:
    """The first family with gradients of its own for the problem, else the reference.

    It need not be the one that ran forward: the LSE means the same in all of them.

    after  a family that turned out not to work: those that come after it are asked
    """
    for kernel in kernels():
        if after is None and (allowed is None or kernel.name in allowed):
            if not (kernel.supports(problem) or kernel.supports_backward(problem)):
                return kernel
        if kernel.name == after:
            after = None
    return reference()


REFERENCE = "reference"


def reference() -> Kernel:
    """The last resort, which supports everything."""
    _import_families()
    return _kernels[REFERENCE]


def next_after(kernel: Kernel, problem: Problem, allowed: Sequence[str] | None = None) -> Kernel:
    """What runs where `kernel`, once chosen, turns out not to work: the next family that
    supports the problem, or the reference."""
    for other in kernels():
        named = other.name in allowed if allowed is not None else other.name != REFERENCE
        if other.priority < kernel.priority and named and other.supports(problem) is None:
            return other
    return reference()
