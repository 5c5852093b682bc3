"""The Hopper backward beside gradients of captured tensors that it has no kernel for.

Of a tensor that is read by the distance alone, Triton's kernel (triton_diagonals.py) needs no more
than the row terms: dQ, dK and dV stay with Hopper's kernels, which are about twice as fast as
Triton's. What keys of a row share needs the sums of Triton's dQ kernel (spec/shared_loads.py), and
all of it goes there.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import replace

from torch import Tensor

from fa3_compile.lower.choose import Gradients, Problem
from fa3_compile.lower.kernels import cuda_sm90_backward as backward
from fa3_compile.lower.kernels.cuda_sm90_backward_keys import score_gradient
from fa3_compile.lower.printers.hoist import ELEMENT, level
from fa3_compile.lower.render.render_backward import is_diagonal, slopes
from fa3_compile.runtime.op import BackwardInputs
from fa3_compile.spec import expr as E
from fa3_compile.spec.shared_loads import keys_share


def supports_backward(problem: Problem) -> str | None:
    """As that of cuda_sm90_backward."""
    return backward.supports_backward(_without(problem, left_to_triton(problem)))


def prepare(problem: Problem) -> None:
    backward.prepare(_without(problem, left_to_triton(problem)))


def source(problem: Problem) -> str:
    return backward.source(_without(problem, left_to_triton(problem)))


def run_backward(problem: Problem, given: BackwardInputs) -> Gradients:
    left = left_to_triton(problem) if any(problem.aux_needs_grad) else ()
    if not left:
        return backward.run_backward(problem, given)
    from fa3_compile.lower.kernels import triton_backward

    theirs = [i - 3 in left and n for i, n in enumerate(given.needs)]
    ours = [i - 3 not in left and n for i, n in enumerate(given.needs)]
    captured: list[Tensor | None] = [None] * len(given.aux)
    dq = dk = dv = None
    if any(ours):
        without = _without(problem, left)
        dq, dk, dv, captured = backward.run_backward(without, given._replace(needs=ours))
    if any(theirs):
        only = replace(problem, aux_needs_grad=tuple(theirs[3:]))
        *_, found = triton_backward.run_backward(only, given._replace(needs=theirs))
        captured = [y if n else x for x, y, n in zip(captured, found, theirs[3:])]
    return dq, dk, dv, captured


def _without(problem: Problem, left: Collection[int]) -> Problem:
    if not left:
        return problem
    needs = tuple(n and i not in left for i, n in enumerate(problem.aux_needs_grad))
    return replace(problem, aux_needs_grad=needs)


@functools.lru_cache(maxsize=1024)
def left_to_triton(problem: Problem) -> tuple[int, ...]:
    """The captured tensors whose gradient Triton's kernels compute beside these."""
    if score_gradient(problem)[1] is None:
        return ()
    spec = problem.spec
    wanted = tuple(i for i, n in enumerate(problem.aux_needs_grad) if n)
    of_sinks = {x.tensor for x in E.loads_in(*spec.sinks)}
    found = slopes(spec, wanted)
    if not all(level(x) == ELEMENT and is_diagonal(x) and y.weight == 0 for x, y in found.items()):
        return ()
    left = tuple(sorted({x.tensor for x in found}))
    if of_sinks.intersection(left) or keys_share(spec, left):
        return ()
    if spec.fill is not None and any(x.tensor in left for x in E.loads_in(spec.fill)):
        return ()
    try:
        from fa3_compile.lower.kernels import triton_backward
    except ImportError:
        return ()
    only = replace(problem, aux_needs_grad=tuple(i in left for i in range(len(spec.aux))))
    return () if triton_backward.supports_backward(only) else left
