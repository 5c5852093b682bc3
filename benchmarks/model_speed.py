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
# Of their norm: how far gradients in bf16 may be from float32's where nothing else is known.
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
    gradients: dict[str, Tensor] = {}
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
                gradients[label] = _gradients(model)
            row.peak_gib = (peak_bytes(call, device) + _bytes(model)) / 2**30
            calls[label] = call
        except (torch.OutOfMemoryError, ValueError, RuntimeError) as error:
            row.note = "out of memory" if "out of memory" in str(error) else str(error)[:200]
        _free()
    if not compile_only:
        _check(name, rows, first, gradients, device, tiny)
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
        _loss(out).backward()
        return out

    return train if training else forward


def _loss(out: Tensor) -> Tensor:
    # The square alone would do nothing: the last normalisation fixes it.
    target = torch.arange(out.shape[-1], device=out.device).sin()
    return (out.float() - target).square().mean()


def _gradients(model: nn.Module) -> Tensor:
    """All gradients, of float32, on the CPU. What the loss does not use, such as BERT's pooler, has
    none in eager and zeros in a compiled model."""
    found = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([x.detach().float().flatten().cpu() for x in found])


def _check(name: str, rows, first, gradients, device: torch.device, tiny: bool) -> None:
    """The first sequence, and all gradients, against eager in float32.

    Gradients may be twice as far from float32's as those of eager compiled by Inductor: where a
    router picks experts, rounding moves some tokens to others, and both are far off.
    """
    if not first:
        return
    model, inputs = _made(name, "eager", device, tiny)
    one = {key: value[:1] for key, value in inputs.items()}
    seen = one.get("attention_mask", torch.ones_like(one["input_ids"])).bool()

    def shown(x: Tensor) -> list[Tensor]:
        # What padding attends to is nobody's business.
        return [x[seen] if x.shape[1] == seen.shape[1] else x]

    with torch.no_grad():
        plain = shown(model(**one)[0])
        exact = shown(model.float()(**one)[0])
    truth = _exact_gradients(model, inputs) if gradients else None
    del model
    _free()
    for label, out in first.items():
        row = rows[label]
        found = error_of(shown(out), plain, exact)
        row.error, row.limit, row.ok = found.ours, found.limit, found.ok
    if truth is not None:
        off = {n: ((x - truth).norm() / truth.norm()).item() for n, x in gradients.items()}
        limit = max(GRADIENT_TOLERANCE, 2 * off.get("inductor", 0.0))
        for label in off.keys() & first.keys():
            rows[label].note = f"gradients {off[label]:.2%} from float32"
            rows[label].ok = rows[label].ok and off[label] <= limit
    for label in first:
        if not rows[label].ok:
            rows[label].note = f"WRONG {rows[label].note}".strip()


def _exact_gradients(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Those of a model in float32, a sequence at a time and each layer's forward done twice, or its
    scores would not fit."""
    model.train()
    model.gradient_checkpointing_enable()
    model.zero_grad(set_to_none=True)
    sequences = len(inputs["input_ids"])
    for i in range(sequences):
        out = model(**{key: value[i : i + 1] for key, value in inputs.items()})[0]
        (_loss(out) / sequences).backward()
    return _gradients(model)


def _bytes(model: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
