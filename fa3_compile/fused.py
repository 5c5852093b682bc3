"""`assert_fused` and `snapshot`: tests that fail when a change loses a model's fused attention.

Both are names of `fa3_compile.testing`. They run Dynamo and the pass and call the rewritten graph
as it is, without Inductor: seconds for a model that takes a minute to compile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from fa3_compile.backend import rewritten
from fa3_compile.explaining import explain_with, keyword_arguments
from fa3_compile.options import KERNELS
from fa3_compile.report import RegionReport, Report

Options = Mapping[str, Any] | None


def assert_fused(
    model_or_fn: nn.Module | Callable[..., Any],
    /,
    *args: Any,
    regions: int | None = None,
    forms: str | Sequence[str] | None = None,
    kernels: str | Sequence[str] | None = None,
    options: Options = None,
    training: bool | None = None,
    kwargs: Mapping[str, Any] | None = None,
    **named: Any,
) -> Report:
    """Every attention of the model becomes a fused kernel, and they are the ones named.

    args, named    what the model is called with
    kwargs         more of its keyword arguments: those whose names are taken here
    regions        how many there are; None for at least one
    forms          the form of each region in order, or one name for all: "causal + window(4096)"
    kernels        the kernel family of each region in order, or one name for all; families
                   depend on the device
    options        those of torch.compile(..., backend="fa3")
    training       as for `fa3_compile.explain`

    Without a GPU the reference stands in for the kernels that need one, so that the test says
    there what it says where there is one.

    Returns the report. Raises AssertionError with what differs and the report's text.
    """
    options = dict(options or {})
    if not torch.cuda.is_available():
        options.setdefault("kernels", KERNELS)
    keywords = keyword_arguments(kwargs, named)
    report = explain_with(rewritten, model_or_fn, args, keywords, options, training)
    found = report.regions
    wrong = [region.line() for region in found if not region.fused]
    if not found:
        wrong.append("no attention was found")
    if regions is not None and len(found) != regions:
        wrong.append(f"expected {regions} attention regions, found {len(found)}")
    wrong += _differences("form", forms, [region.form for region in found])
    wrong += _differences("kernel", kernels, [region.kernel for region in found])
    if wrong:
        raise AssertionError("\n".join([*wrong, "", str(report)]))
    return report


def snapshot(
    model_or_fn: nn.Module | Callable[..., Any],
    /,
    *args: Any,
    options: Options = None,
    training: bool | None = None,
    kwargs: Mapping[str, Any] | None = None,
    **named: Any,
) -> str:
    """What the pass makes of the model's attention, as a few lines for a snapshot test.

    The same on every device and in every process: no paths, no kernels, no times. Regions that
    follow each other and are alike are one line. See `assert_fused` for the arguments.

        2 of 2 regions fused
        0, 1: causal | score 0.25*s | mask kv <= q
    """
    options = {"kernels": KERNELS, **(options or {})}
    keywords = keyword_arguments(kwargs, named)
    report = explain_with(rewritten, model_or_fn, args, keywords, options, training)
    numbered = list(enumerate(_said(region) for region in report.regions))
    lines = [f"{len(report.fused)} of {len(report.regions)} regions fused"]
    for said, group in groupby(numbered, key=lambda pair: pair[1]):
        numbers = [number for number, _ in group]
        if len(numbers) > 2:
            place = f"{numbers[0]}-{numbers[-1]}"
        else:
            place = ", ".join(map(str, numbers))
        lines.append(f"{place}: {said}")
    return "\n".join(lines)


def _said(region: RegionReport) -> str:
    if not region.fused:
        return f"left as it was by {region.stage} [{region.code}]"
    parts = [region.form, f"score {region.score}"]
    if region.mask:
        parts.append(f"mask {region.mask}")
    if region.weight:
        parts.append(f"weight {region.weight}")
    return " | ".join(parts)


def _differences(what: str, wanted: str | Sequence[str] | None, found: list[str]) -> list[str]:
    if wanted is None:
        return []
    named = [wanted] * len(found) if isinstance(wanted, str) else list(wanted)
    if len(named) != len(found):
        return [f"{len(named)} {what}s were named for {len(found)} regions"]
    return [
        f"region {i}: expected {what} {expected!r}, found {actual!r}"
        for i, (expected, actual) in enumerate(zip(named, found))
        if expected != actual
    ]
