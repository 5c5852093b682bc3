"""The rule for one random program, for the test and for benchmarks/coverage/random_programs.py."""

from __future__ import annotations

from copy import copy
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.utils._pytree import tree_leaves

from fa3_compile import testing
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
    where eager was lucky, as it often is with the gradient of one number. So a program fails if the
    same output or gradient fails with three different inputs.

    Which sums overflow in float16 is a matter of their order, and of what is rounded before: where
    exact results, or eager's on the way to them, lie beyond its numbers, the program has to be right
    in bfloat16.
    """
    wrong: dict[str, str] = {}
    for attempt in range(ATTEMPTS):
        last = attempt == ATTEMPTS - 1
        if last and program.run["dtype"] == torch.float16 and exceeds_float16(program):
            program = copy(program)
            program.run = program.run | {"dtype": torch.bfloat16}
        report, found = _check(program, attempt)
        wrong = {name: text for name, text in found.items() if not attempt or name in wrong}
        if not wrong:
            return report
    raise AssertionError("\n".join((*wrong.values(), str(report))))


def exceeds_float16(program: Program) -> bool:
    """Whether a finite result or gradient, computed in float64, is beyond float16's numbers, or eager
    code is on the way to it: the scores' overflow, which are float32 here."""
    largest = torch.finfo(torch.float16).max
    exact, eager = (_results(program, dtype) for dtype in (torch.float64, torch.float16))
    return any(
        bool((x.isfinite() & ((x.abs() > largest) | ~y.isfinite())).any())
        for x, y in zip(exact, eager)
    )


def _results(program: Program, dtype: torch.dtype) -> list[Tensor]:
    training = program.run["training"]
    cast = [x.detach().to(dtype) if x.is_floating_point() else x for x in program.arguments]
    leaves = [x.requires_grad_() for x, y in zip(cast, program.arguments) if y.requires_grad]
    with torch.set_grad_enabled(training):
        outputs = [x for x in tree_leaves(program.function(*cast)) if x.is_floating_point()]
    sources = [x for x in outputs if x.requires_grad]
    if not sources:
        return outputs
    found = torch.autograd.grad(
        sources, leaves, [torch.ones_like(x) for x in sources], allow_unused=True
    )
    return [x.detach() for x in outputs] + [x for x in found if x is not None]


def _varied(x: Tensor, attempt: int) -> Tensor:
    if attempt == 0 or not x.requires_grad:
        return x
    return (x.detach() * (1 + 0.1 * attempt)).requires_grad_()


def _check(program: Program, attempt: int) -> tuple[Report, dict[str, str]]:
    """The report, and what is wrong by the name of the output or gradient; "" is what was fused. A
    second call finds what the first has compiled."""
    torch._dynamo.reset()
    run = dict(program.run)
    options = Options(kernels=run.pop("kernels"), strict=True)
    wrong: dict[str, str] = {}

    def rewrite(gm: torch.fx.GraphModule, example_inputs: list[Any]):
        rewrite_attention(gm, options, "graph")
        return gm

    def note(name: str, *args: Any) -> None:
        try:
            assert_close(name, *args)
        except AssertionError as error:
            wrong[name] = str(error)

    assert_close = testing._assert_close
    # PyTorch refuses flex_attention's gradients on the CPU only for want of a kernel.
    with (
        mock.patch.object(flex, "_validate_device", lambda *_: None),
        mock.patch.object(testing, "_assert_close", note),
        mock.patch.object(torch._dynamo, "reset", lambda: None),
    ):
        calls = [program.arguments] if program.again is None else [program.arguments, program.again]
        report, *_ = (
            assert_matches_eager(
                program.function, *(_varied(x, attempt) for x in tensors), backend=rewrite, **run
            )
            for tensors in calls
        )
    fused = len(report.fused)
    wanted = {"fused": fused == 1, "left": fused == 0, "either": True}[program.expected]
    if not wanted:
        wrong[""] = f"{program}: {specs(report)}"
    return report, wrong
