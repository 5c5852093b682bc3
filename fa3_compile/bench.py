"""`python -m fa3_compile bench`: a user's model as it is, through Inductor, and through fa3."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fa3_compile.explaining import mode
from fa3_compile.report import Report, collect
from fa3_compile.timing import interleaved, peak_bytes, synchronize

WAYS = ("eager", "inductor", "fa3")


@dataclass
class Result:
    """One way to run the model.

    milliseconds  median of a call: forward, and backward in training
    peak_mib      memory held beyond what was held before the call; 0 on a CPU
    first_call    seconds of the first call, compilation included
    difference    largest distance of an output from eager's, as a share of eager's largest element
    """

    milliseconds: float = 0.0
    peak_mib: float = 0.0
    first_call: float = 0.0
    difference: float = 0.0


def bench(
    model_or_fn: nn.Module | Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    training: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Report, dict[str, Result]]:
    """Runs the model in each of WAYS, then times them in turn.

    training   as for `fa3_compile.explain`; a training call leaves no `.grad` behind

    Returns the report of fa3's compilation, with its `milliseconds` filled in, and the results.
    """
    from fa3_compile.backend import fa3

    kwargs = dict(kwargs or {})
    device = _device_of(model_or_fn, args, kwargs)
    torch._dynamo.reset()
    try:
        ways: dict[str, Callable[..., Any]] = {
            "eager": model_or_fn,
            "inductor": torch.compile(model_or_fn),
            "fa3": torch.compile(model_or_fn, backend=fa3, options=dict(options or {})),
        }
        results: dict[str, Result] = {}
        calls: dict[str, Callable[[], Any]] = {}
        expected: list[Tensor] = []
        with mode(model_or_fn, training), collect() as report:
            for name, function in ways.items():
                call = calls[name] = _call(model_or_fn, function, args, kwargs, bool(training))
                torch.manual_seed(0)
                start = time.perf_counter()
                outputs = call()
                synchronize(device)
                results[name] = Result(first_call=time.perf_counter() - start)
                expected = expected or outputs
                results[name].difference = _difference(outputs, expected)
                results[name].peak_mib = peak_bytes(call, device) / 2**20
            for name, milliseconds in interleaved(calls, device).items():
                results[name].milliseconds = milliseconds
        report.compile_seconds = results["fa3"].first_call
        report.milliseconds = {name: result.milliseconds for name, result in results.items()}
        return report, results
    finally:
        torch._dynamo.reset()


def table(results: Mapping[str, Result]) -> str:
    """The results for a terminal."""
    lines = [f"{'':<10}{'ms':>10}{'peak MiB':>10}{'first call s':>14}{'difference':>12}"]
    lines += [
        f"{name:<10}{x.milliseconds:>10.3f}{x.peak_mib:>10.1f}{x.first_call:>14.1f}"
        f"{x.difference:>12.1e}"
        for name, x in results.items()
    ]
    return "\n".join(lines)


def _call(model, function, args, kwargs, training: bool) -> Callable[[], list[Tensor]]:
    def forward() -> list[Tensor]:
        return [x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, Tensor)]

    if not training:
        return forward
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    wanted = [
        x
        for x in (*parameters, *tree_leaves((args, kwargs)))
        if isinstance(x, Tensor) and x.requires_grad
    ]

    def step() -> list[Tensor]:
        outputs = forward()
        losses = [x.float().square().mean() for x in outputs if x.requires_grad]
        torch.autograd.grad(losses, wanted, allow_unused=True)
        return [x.detach() for x in outputs]

    return step


def _difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    worst = 0.0
    for ours, theirs in zip(outputs, expected, strict=True):
        if theirs.is_floating_point() and theirs.numel():
            finite = torch.isfinite(theirs)
            scale = theirs[finite].abs().max().item() if bool(finite.any()) else 0.0
            off = (ours.double() - theirs.double())[finite].abs()
            worst = max(worst, off.max().item() / max(scale, 1e-30) if off.numel() else 0.0)
    return worst


def _device_of(model, args, kwargs) -> torch.device:
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    tensors = (x for x in (*parameters, *tree_leaves((args, kwargs))) if isinstance(x, Tensor))
    return next((x.device for x in tensors), torch.device("cpu"))
