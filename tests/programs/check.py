"""The rule for one random program, for the test and for benchmarks/coverage/random_programs.py."""

from __future__ import annotations

from copy import copy
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.utils._pytree import tree_leaves

from fa3_compile.options import Options
from fa3_compile.pipeline import rewrite_attention
from fa3_compile.report import Report
from fa3_compile.testing import assert_matches_eager
from tests.graph.harness import specs
from tests.programs.program import Program

ATTEMPTS = 3


def check_program(program: Program) -> Report:
    """AssertionError where the numbers or gradients are not eager's, or what was fused is not what
    has to be.

    What is wrong is wrong with other numbers too; an error just beyond twice eager's own is not,
    where eager was lucky. So a program fails if it fails with three different inputs.

    Which sums overflow in float16 is a matter of their order, and of what is rounded before: where
    exact results lie beyond its numbers, the program has to be right in bfloat16.
    """
    for attempt in range(ATTEMPTS - 1):
        try:
            return _check(program, [_varied(x, attempt) for x in program.arguments])
        except AssertionError:
            continue
    if program.run["dtype"] == torch.float16 and exceeds_float16(program):
        program = copy(program)
        program.run = program.run | {"dtype": torch.bfloat16}
    return _check(program, [_varied(x, ATTEMPTS - 1) for x in program.arguments])


def exceeds_float16(program: Program) -> bool:
    """Whether a finite result is beyond float16's numbers, computed in float64."""
    wide = [x.detach().double() if x.is_floating_point() else x for x in program.arguments]
    with torch.no_grad():
        results = [x for x in tree_leaves(program.function(*wide)) if x.is_floating_point()]
    largest = torch.finfo(torch.float16).max
    return any(bool((x.isfinite() & (x.abs() > largest)).any()) for x in results)


def _varied(x: Tensor, attempt: int) -> Tensor:
    if attempt == 0 or not x.requires_grad:
        return x
    return (x.detach() * (1 + 0.1 * attempt)).requires_grad_()


def _check(program: Program, arguments: list[Tensor]) -> Report:
    torch._dynamo.reset()
    run = dict(program.run)
    options = Options(kernels=run.pop("kernels"), strict=True)

    def rewrite(gm: torch.fx.GraphModule, example_inputs: list[Any]):
        rewrite_attention(gm, options, "graph")
        return gm

    # PyTorch refuses flex_attention's gradients on the CPU only for want of a kernel.
    with mock.patch.object(flex, "_validate_device", lambda *_: None):
        report = assert_matches_eager(program.function, *arguments, backend=rewrite, **run)
    fused = len(report.fused)
    wanted = {"fused": fused == 1, "left": fused == 0, "either": True}[program.expected]
    assert wanted, f"{program}: {specs(report)}"
    return report
