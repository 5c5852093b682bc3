"""Runs a function through the pass alone: rewritten, then executed by eager PyTorch.

Everything up to launch without Inductor's compile time; the reference computes the operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fa3_compile.options import Options
from fa3_compile.pipeline import rewrite_attention
from fa3_compile.report import Report, collect
from fa3_compile.testing import assert_matches_eager
from tests.graph.inputs import attend, qkv, scores_of


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


def modified(function: Callable[..., Any], *extra: Any) -> str:
    """The spec of attention over function(scores, *extra)."""

    def attention(q, k, v, *rest):
        return attend(function(scores_of(q, k), *rest), v)

    return specs(check(attention, *qkv(), *extra))


def weighed(weights: Callable[..., torch.Tensor], *more: torch.Tensor) -> str:
    """The spec of weights(scores, *more) @ v, without a softmax."""
    return specs(check(lambda q, k, v, *x: weights(scores_of(q, k), *x) @ v, *qkv(), *more))


def declined(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Stage and code of what was left; the numbers are eager's."""
    report = check(function, *(args or qkv()), **kwargs)
    assert not any(region.fused for region in report.regions), str(report)
    assert all(region.reason for region in report.regions), str(report)
    return specs(report)


def compiled(function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    return torch.compile(function, backend=rewrite_only, **kwargs)


def assert_same(function: Callable[..., Any], *args: Any, tolerance: float = 0.0) -> None:
    """Bit by bit, or within a tolerance, what eager gives; gradients are the caller's matter."""
    torch.testing.assert_close(
        compiled(function)(*args), function(*args), atol=tolerance, rtol=tolerance
    )


def runs(
    function: Callable[..., Any],
    inputs: Iterable[tuple[Any, ...]],
    *,
    dynamic: bool | None = True,
    training: bool = True,
) -> str:
    """The specs of a function compiled once and run on several inputs; numbers are eager's."""
    ours = compiled(function, dynamic=dynamic)
    with collect() as report:
        for args in inputs:
            expected = _outputs(function, args, training)
            found = _outputs(ours, args, training)
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5, equal_nan=True)
    return specs(report)


def _outputs(
    function: Callable[..., Any], args: tuple[Any, ...], training: bool
) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x for x in args]
    out = function(*leaves)
    leaves = [x for x in leaves if torch.is_tensor(x) and x.requires_grad]
    if not training or not leaves:
        return [out]
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out, *torch.autograd.grad((out * weight).sum(), leaves)]
