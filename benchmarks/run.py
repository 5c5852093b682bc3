"""Attention and whole models, ours against what people use: right first, then fast.

    python benchmarks/run.py --list
    python benchmarks/run.py --group dense variants --direction forward backward --out dense.csv
    python benchmarks/run.py --cases 'causal-*-D128' --only fa3 cudnn
    python benchmarks/run.py --models llama gemma2 --direction forward training

Everything runs in one process. Each contender is first held against float64 (one head of it), and
is not timed where it is further off than twice eager's own error; then all are timed in turn, and
the medians are printed and written to the CSV, a row a contender, with device, driver, torch,
triton and commit. `--budget SECONDS` starts nothing more after that long and says what it left.
`--prepare N` first lets N processes compile everything at once, so that the run itself, still in
one process, finds it in the compilers' caches.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from benchmarks import contenders, model_speed
from benchmarks.cases import Case, all_cases, tiny
from benchmarks.measure import GRAPH_CALLS, copy_bandwidth, error_of, graphed
from benchmarks.rows import Row, Table, environment
from fa3_compile.timing import interleaved, peak_bytes

BACKWARD_FLOPS = 2.5  # five products where the forward has two
DIRECTIONS = ("forward", "backward", "training")


def case_rows(
    case: Case,
    direction: str,
    wanted: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    compile_only: bool = False,
) -> list[Row]:
    """A row for each contender that can compute the case.

    dO lies in memory as each contender's output does: what follows an attention in a model gives it
    so, and AOTAutograd copies any other."""
    backward = direction == "backward"
    inputs = case.inputs(device, dtype)
    learned = 3 + len(inputs[3:]) * case.variant.learned
    leaves = [x.detach().requires_grad_(backward and i < learned) for i, x in enumerate(inputs)]
    graded = leaves[:learned]
    cotangent = torch.randn_like(inputs[0]) if backward else None
    check = None if compile_only else _Check(case, inputs, cotangent, learned)
    rows, calls = [], {}
    torch._dynamo.reset()
    for name in wanted:
        row = Row(case.name, direction, name)
        try:
            function = contenders.contender(name, case, leaves)
            if function is None:
                continue
            start = time.perf_counter()
            row.kernel, out = _first_call(name, function, leaves, backward)
            if check is None:
                continue
            given = None if cotangent is None else torch.empty_like(out).copy_(cotangent)
            call = _call(function, leaves, out, graded, given)
            found = call()
            row.first_call_s = time.perf_counter() - start
            row.error, row.limit, row.ok = check(out, found if backward else ())
            row.peak_gib = peak_bytes(_whole(function, leaves, graded, given), device) / 2**30
            if row.ok:
                calls[name] = call
            else:
                row.note = "WRONG: not timed"
            del found, out
        except Exception as error:
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            row.note = (
                "out of memory" if out_of_memory else f"{type(error).__name__}: {error}"[:200]
            )
        rows.append(row)
    _time(case, rows, calls, device, inputs[0].element_size(), backward)
    torch._dynamo.reset()
    return rows


def _time(case: Case, rows, calls, device, itemsize: int, backward: bool) -> None:
    repeats = 1
    if case.group == "decode" and device.type == "cuda":
        calls, repeats = {name: graphed(call) for name, call in calls.items()}, GRAPH_CALLS
    times = interleaved(calls, device)
    flops = case.flops * (BACKWARD_FLOPS if backward else 1)
    for row in rows:
        if row.contender in times:
            row.ms = times[row.contender] / repeats
            row.tflops = flops / row.ms / 1e9
            if case.group == "decode":
                row.gbytes_s = case.bytes(itemsize) / row.ms / 1e6


def _first_call(name, function, leaves, backward) -> tuple[str, Tensor]:
    """(the kernel that the report names, the output)."""
    from fa3_compile.report import collect

    with collect() as report, torch.set_grad_enabled(backward):
        out = function(*leaves)
        if backward:  # compiled on first use, and reported then
            torch.autograd.grad(out, leaves[:1], torch.ones_like(out), retain_graph=True)
    return (report.kernels() if name == "fa3" else ""), out


def _call(function, leaves, out, graded, cotangent) -> Callable[[], Any]:
    if cotangent is None:
        return _whole(function, leaves, graded, cotangent)
    return lambda: torch.autograd.grad(out, graded, cotangent, retain_graph=True)


def _whole(function, leaves, graded, cotangent) -> Callable[[], Any]:
    """Forward, and backward where there is a cotangent."""

    def forward():
        with torch.no_grad():
            return function(*leaves)

    def both():
        return torch.autograd.grad(function(*leaves), graded, cotangent)

    return forward if cotangent is None else both


class _Check:
    """Holds results against eager in float64, for the last KV head."""

    def __init__(self, case: Case, inputs, cotangent: Tensor | None, graded: int) -> None:
        self.case, self.graded = case, graded
        self.inputs, self.cotangent = inputs, cotangent
        self.plain = self._eager(lambda x: x)
        self.exact = self._eager(lambda x: x.double() if x.is_floating_point() else x)

    def _eager(self, cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
        graded = 0 if self.cotangent is None else self.graded
        leaves = [cast(self._head(x)).requires_grad_(i < graded) for i, x in enumerate(self.inputs)]
        with torch.set_grad_enabled(graded > 0):
            out = self.case.eager()(*leaves)
        if self.cotangent is None:
            return [out]
        dout = cast(self._head(self.cotangent))
        return [out.detach(), *torch.autograd.grad(out, leaves[:graded], dout)]

    def _head(self, x: Tensor) -> Tensor:
        return self.case.one_head(x.detach(), self.case.kv_heads - 1)

    def __call__(self, out: Tensor, gradients: Sequence[Tensor]) -> tuple[float, float, bool]:
        found = error_of([self._head(x) for x in (out, *gradients)], self.plain, self.exact)
        return found.ours, found.limit, found.ok


class Progress:
    """One line that rewrites itself on a terminal, nothing elsewhere."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def show(self, what: str) -> None:
        if sys.stderr.isatty():
            filled = 20 * self.done // max(self.total, 1)
            bar = "#" * filled + "-" * (20 - filled)
            line = f"\r\x1b[K[{bar}] {self.done}/{self.total} {what}"
            print(line, end="", file=sys.stderr, flush=True)
        self.done += 1

    def clear(self) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def jobs(arguments: argparse.Namespace) -> list[tuple[str, str, Case | None]]:
    """(name, direction, the case or None for a model), in the order in which they run."""
    chosen = {
        case.name: case
        for case in all_cases()
        if any(fnmatch.fnmatch(case.name, x) for x in arguments.cases)
        or case.group in arguments.group
    }
    found: list[tuple[str, str, Case | None]] = [
        (case.name, direction, case)
        for direction in arguments.direction
        for case in chosen.values()
        if direction == "forward" or (direction == "backward" and case.group != "decode")
    ]
    found += [
        (name, direction, None)
        for direction in arguments.direction
        for name in arguments.models
        if direction != "backward"
    ]
    return found


def run(arguments: argparse.Namespace, table: Table, device: torch.device) -> Iterator[Row]:
    start, todo = time.perf_counter(), jobs(arguments)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    progress = Progress(len(todo))
    if arguments.prepare:
        _prepare(arguments.prepare)
    part, parts = arguments.share
    for number, (name, direction, case) in enumerate(todo):
        if number % parts != part:
            continue
        if time.perf_counter() - start > arguments.budget:
            left = ", ".join(f"{n} {d}" for n, d, _ in todo[number:])
            print(f"the budget of {arguments.budget:g} s is spent; left: {left}", flush=True)
            return
        progress.show(f"{name} {direction}")
        if case is None:
            wanted = tuple(arguments.only or model_speed.NAMES)
            training = direction == "training"
            options = {"tiny": arguments.tiny, "compile_only": arguments.compile_only}
            rows = list(model_speed.model_rows(name, training, wanted, device, **options))
        else:
            wanted = tuple(arguments.only or contenders.NAMES)
            shaped = tiny(case) if arguments.tiny else case
            # Gradients are taken several times from one forward.
            with functorch_config.patch(donated_buffer=direction != "backward"):
                only = arguments.compile_only
                rows = case_rows(shaped, direction, wanted, device, dtype, only)
        progress.clear()
        table.add(rows)
        yield from rows
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _prepare(processes: int) -> None:
    """Compiles every job in other processes, each a share of them."""
    words = [*sys.argv[1:], "--prepare", "0", "--compile-only", "--out", os.devnull]
    children = [
        subprocess.Popen(
            [sys.executable, __file__, *words, "--share", f"{i}/{processes}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for i in range(processes)
    ]
    start = time.perf_counter()
    for child in children:
        child.wait()
    print(f"prepared by {processes} processes in {time.perf_counter() - start:.0f} s", flush=True)


def _share(text: str) -> tuple[int, int]:
    part, parts = text.split("/")
    return int(part), int(parts)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--list", action="store_true", help="print the cases and models, and stop")
    made.add_argument("--cases", nargs="*", default=[], metavar="PATTERN")
    made.add_argument("--group", nargs="*", default=[], metavar="GROUP", help="dense, variants, "
                      "lengths, decode")  # fmt: skip
    made.add_argument("--models", nargs="*", default=[], metavar="NAME")
    made.add_argument("--only", nargs="*", default=[], metavar="CONTENDER")
    made.add_argument("--direction", nargs="*", default=["forward"], choices=DIRECTIONS)
    made.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    made.add_argument("--out", type=Path, default=Path("benchmarks.csv"))
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--commit", default=os.environ.get("FA3_COMMIT", ""), help="written into "
                      "the CSV where there is no git")  # fmt: skip
    made.add_argument("--prepare", type=int, default=0, metavar="N")
    made.add_argument("--compile-only", action="store_true", help="no checks, no times")
    made.add_argument("--share", type=_share, default=(0, 1), metavar="I/N", help="every N-th job")
    made.add_argument("--tiny", action="store_true", help="tiny shapes: a test of this program")
    return made


def main(words: Sequence[str] | None = None) -> int:
    """0 if every contender that ran was right."""
    arguments = parser().parse_args(words)
    if arguments.list:
        from tests.models.large import LARGE

        for case in all_cases():
            print(f"{case.group:<9} {case.name}")
        print("models   ", *LARGE)
        return 0
    torch._dynamo.config.recompile_limit = 64
    device = torch.device(arguments.device)
    wrong = 0
    with arguments.out.open("w", newline="") as file:
        shared = environment(device, arguments.commit)
        table = Table(file, shared)
        print(*(f"{name} {text}" for name, text in shared.items()), sep=", ", flush=True)
        if any(case is not None and case.group == "decode" for *_, case in jobs(arguments)):
            print(f"copy bandwidth {copy_bandwidth(device) / 1e9:.0f} GB/s", flush=True)
        for row in run(arguments, table, device):
            print(row.said(), flush=True)
            wrong += row.note.startswith("WRONG")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
