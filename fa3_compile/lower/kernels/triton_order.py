"""The kernels of a Triton forward in their order: lists of blocks, the attention, its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fa3_compile.lower.choose import Problem
from fa3_compile.lower.kernels.triton_direct import SCRATCH
from fa3_compile.lower.launch import launch_cuda
from fa3_compile.lower.launch.launch_calls import ALIGNMENT, Launches
from fa3_compile.runtime.op import out_strides

if TYPE_CHECKING:
    from fa3_compile.lower.kernels.triton_blocks import Lists
    from fa3_compile.lower.kernels.triton_split import Parts

OPERANDS = ("q", "k", "v", "out", "lse")
Run = Callable[[Sequence[Tensor]], None]


def in_order(lists: Lists | None, parts: Parts | None, chosen: Sequence[int], run: Run) -> Run:
    """What runs them all on (q, k, v, out, LSE) and the `chosen` captured tensors.

    run  the attention, which takes the tensors that the others make behind those
    """
    if lists is None and parts is None:
        return run
    names = [*(f"{x}_ptr" for x in OPERANDS), *(f"aux{i}" for i in chosen)]

    def run_all(tensors: Sequence[Tensor]) -> None:
        named = dict(zip(names, tensors, strict=True))
        if lists is not None:
            lists(named)
        if parts is not None:
            named |= parts.tensors(tensors[0].device)
        run([*named.values()])
        if parts is not None:
            parts.combine(named)

    return run_all


def launches_of(
    problem: Problem,
    compiled: Any,
    attention: launch_cuda.Launch | None,
    programs: int,
    lists: Lists | None,
    parts: Parts | None,
    joint: bool,
    out: Tensor,
) -> Launches | None:
    """All of them past Triton's launcher, where that can be.

    compiled   the attention's CompiledKernel, of so many `programs`
    attention  its launch
    joint      whether it reads V as a part of K
    out        like the output of a call
    """
    names: dict[str | int, tuple[str | int, int]] = {f"{x}_ptr": (x, 0) for x in OPERANDS}
    names |= {f"aux{i}": (i, 0) for i in range(len(problem.spec.aux))}
    kernels, scratch, listed = [attention], 0, 0
    if lists is not None:
        kernels.insert(0, lists.launch.direct)
        names |= {"lists_ptr": ("lists", 0), "counts_ptr": ("lists", lists.counts_at)}
        listed = lists.bytes
        scratch = _aligned(listed)
    names[SCRATCH] = "scratch", scratch
    scratch += programs * compiled.metadata.global_scratch_size
    if parts is not None:
        scratch = _aligned(scratch)
        kernels.append(parts.combine.direct)
        names["parts_ptr"] = "scratch", scratch
        names["states_ptr"] = "scratch", scratch + parts.states_at
        scratch += parts.bytes
    renamed = [x.renamed(names) for x in kernels if x is not None]
    if len(renamed) < len(kernels):
        return None
    shape, strides = tuple(out.shape), out_strides(out.shape, problem.spec.out_order)
    return Launches(
        out.device.index, out.dtype, shape, strides, renamed, scratch, listed, joint=joint
    )  # fmt: skip


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
