"""The models of `benchmarks/run.py`: a forward pass, or a training step, of tests/models/large.py.

The contenders are the model as transformers writes it under attn_implementation="eager", compiled
by fa3 and by Inductor, and the model under "sdpa" compiled by Inductor, where it has one.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import error_of
from benchmarks.rows import Row
from fa3_compile.report import collect
from fa3_compile.timing import interleaved, peak_bytes

NAMES = ("fa3", "inductor", "inductor sdpa")
# Gradients of two right programs in bf16 differ by about 1% of their norm.
GRADIENT_TOLERANCE = 0.05
TINY = {"batch": 1, "length": 64}


def model_rows(
    name: str,
    training: bool,
    wanted: tuple[str, ...],
    device: torch.device,
    tiny: bool = False,
    compile_only: bool = False,
) -> Iterator[Row]:
    """A row for each contender: checked, then timed in turn with the others."""
    direction = "training" if training else "forward"
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], Any]] = {}
    first: dict[str, Tensor] = {}
    norm: dict[str, Tensor] = {}
    torch._dynamo.reset()
    for label in (x for x in NAMES if x in wanted):
        row = rows[label] = Row(name, direction, label)
        try:
            model, inputs = _made(name, label, device, tiny)
            call = _step(_compiled(model, label, row), model.train(training), inputs, training)
            start = time.perf_counter()
            with _recording(row, label):
                first[label] = call()[:1].detach()
            row.first_call_s = time.perf_counter() - start
            if compile_only:
                continue
            if training:
                norm[label] = _gradients(model)
            row.peak_gib = (peak_bytes(call, device) + _bytes(model)) / 2**30
            calls[label] = call
        except (torch.OutOfMemoryError, ValueError, RuntimeError) as error:
            row.note = "out of memory" if "out of memory" in str(error) else str(error)[:200]
        _free()
    if not compile_only:
        _check(name, rows, first, norm, device, tiny)
    times = interleaved({n: c for n, c in calls.items() if rows[n].ok}, device)
    for label, milliseconds in times.items():
        rows[label].ms = milliseconds
    yield from rows.values()
    calls.clear()
    torch._dynamo.reset()
    _free()


def _made(name: str, label: str, device: torch.device, tiny: bool) -> tuple[nn.Module, dict]:
    from tests.models.large import large

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    attention = "sdpa" if label.endswith("sdpa") else "eager"
    return large(name, device=device, dtype=dtype, attention=attention, **(TINY if tiny else {}))


def _compiled(model: nn.Module, label: str, row: Row) -> Callable[..., Any]:
    if label != "fa3":
        return torch.compile(model, dynamic=False)
    from fa3_compile.backend import fa3

    return torch.compile(model, backend=fa3, dynamic=False)


@contextmanager
def _recording(row: Row, label: str) -> Iterator[None]:
    with collect() as report:
        yield
    if label == "fa3":
        row.kernel = report.kernels()


def _step(compiled: Callable[..., Any], model: nn.Module, inputs, training: bool):
    """Runs once and gives the last hidden state; training leaves the gradients in `.grad`."""

    def forward() -> Tensor:
        with torch.no_grad():
            return compiled(**inputs)[0]

    def train() -> Tensor:
        model.zero_grad(set_to_none=True)
        out = compiled(**inputs)[0]
        # The square would do nothing: the last normalisation fixes it.
        target = torch.arange(out.shape[-1], device=out.device).sin()
        (out.float() - target).square().mean().backward()
        return out

    return train if training else forward


def _gradients(model: nn.Module) -> Tensor:
    """All gradients, of float32, on the CPU."""
    found = [
        p.grad.detach().float().flatten().cpu() for p in model.parameters() if p.grad is not None
    ]
    return torch.cat(found)


@torch.no_grad()
def _check(name: str, rows, first, norm, device: torch.device, tiny: bool) -> None:
    """The first sequence against eager in float32, gradients against Inductor's."""
    if not first:
        return
    model, inputs = _made(name, "eager", device, tiny)
    inputs = {key: value[:1] for key, value in inputs.items()}
    seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()

    def shown(x: Tensor) -> list[Tensor]:
        # What padding attends to is nobody's business.
        return [x[seen] if x.shape[1] == seen.shape[1] else x]

    plain = shown(model(**inputs)[0])
    exact = shown(model.float()(**inputs)[0])
    del model
    _free()
    for label, out in first.items():
        row = rows[label]
        found = error_of(shown(out), plain, exact)
        row.error, row.limit, row.ok = found.ours, found.limit, found.ok
        other = next((n for n in ("inductor", "inductor sdpa") if n in norm), label)
        if row.ok and label in norm and label != other:
            truth = norm[other]
            off = ((norm[label] - truth).norm() / truth.norm()).item()
            row.note = f"gradients {off:.2%} from those of {other}"
            row.ok = off <= GRADIENT_TOLERANCE
        if not row.ok:
            row.note = f"WRONG {row.note}".strip()


def _bytes(model: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
