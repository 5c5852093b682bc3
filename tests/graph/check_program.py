"""The rule for one random program, for the test and for benchmarks/random_programs.py."""

from __future__ import annotations

from typing import Any

import torch

from fa3_compile.options import Options
from fa3_compile.pipeline import rewrite_attention
from fa3_compile.report import Report
from fa3_compile.testing import assert_matches_eager
from tests.graph.harness import specs
from tests.graph.programs import Program


def check_program(program: Program) -> Report:
    """AssertionError where the numbers or gradients are not eager's, or what was fused is not what
    has to be."""
    torch._dynamo.reset()
    run = dict(program.run)
    options = Options(kernels=run.pop("kernels"), strict=True)

    def rewrite(gm: torch.fx.GraphModule, example_inputs: list[Any]):
        rewrite_attention(gm, options, "graph")
        return gm

    report = assert_matches_eager(program.function, *program.arguments, backend=rewrite, **run)
    fused = len(report.fused)
    wanted = {"fused": fused == 1, "left": fused == 0, "either": True}[program.expected]
    assert wanted, f"{program}: {specs(report)}"
    return report
