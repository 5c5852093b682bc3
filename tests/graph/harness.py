"""Runs a function through the pass alone: rewritten, then executed by eager PyTorch.

Everything up to launch without Inductor's compile time; the reference computes the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fa3_compile.options import Options
from fa3_compile.pipeline import rewrite_attention
from fa3_compile.report import Report
from fa3_compile.testing import assert_matches_eager


def rewrite_only(gm: torch.fx.GraphModule, example_inputs: list[Any], **_: Any):
    """A Dynamo backend: the rewritten graph, run as it is."""
    rewrite_attention(gm, Options(kernels=("reference",), strict=True), "graph")
    return gm


def check(function: Callable[..., Any], *args: Any, training: bool = True, **kwargs: Any) -> Report:
    """What became of the function's regions; its numbers, gradients included, are eager's."""
    return assert_matches_eager(function, *args, backend=rewrite_only, training=training, **kwargs)


def specs(report: Report) -> str:
    """The regions' specs, or reasons, a line each."""
    return "\n".join(
        region.spec if region.fused else f"{region.stage}: {region.code}"
        for region in report.regions
    )
