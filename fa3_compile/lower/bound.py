"""Kernel families that the host launches: bound to a layout once, then found again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fa3_compile.lower.choose import Kernel, Problem, next_after
from fa3_compile.runtime.launch import Call, layout_key, make_room
from fa3_compile.runtime.op import outputs_as_declared
from fa3_compile.spec.expr import LONGEST

# A bound kernel takes a few kilobytes of host memory.
LARGEST = 2048


class BindingKernel(Kernel):
    """A family whose `bind` makes a function for one layout of the arguments."""

    def __init__(self) -> None:
        self._bound: dict[tuple, Call | None] = {}

    def bind(
        self,
        problem: Problem,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        aux: Sequence[Tensor],
        sizes: Sequence[int],
    ) -> Call | None:
        """The function for tensors of exactly these shapes, strides, dtypes, device, and
        addresses modulo 16, whose outputs are as the operator declares them; None where this
        family has no kernel for them after all."""
        raise NotImplementedError

    def bound(
        self,
        problem: Problem,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        aux: Sequence[Tensor],
        sizes: Sequence[int],
    ) -> Call | None:
        """What `bind` gave for such arguments, once."""
        key = (
            problem.spec,
            problem.autotune,
            problem.wants_lse,
            precision(q.dtype),
            layout_key((q, k, v, *aux), sizes),
        )
        try:
            return self._bound[key]
        except KeyError:
            call = self.bind(problem, q, k, v, aux, sizes)
        make_room(self._bound, LARGEST)
        self._bound[key] = call
        return call

    def run(
        self,
        problem: Problem,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        aux: Sequence[Tensor],
        sizes: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        call = self.bound(problem, q, k, v, aux, sizes)
        if call is not None:
            return call(q, k, v, aux)
        out, lse = next_after(self, problem).run(problem, q, k, v, aux, sizes)
        return outputs_as_declared(q, v, out, lse, problem.spec.out_order)


def are_small(sizes: Sequence[int]) -> bool:
    """Whether kernels may add each of them to a position in 32 bits."""
    return all(abs(n) < LONGEST for n in sizes)


def precision(dtype: torch.dtype) -> str:
    """How products are taken: in float32 as torch's own matmul is told to."""
    if dtype != torch.float32:
        return "tf32"  # of no effect on 16-bit operands
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
