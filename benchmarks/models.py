"""Hugging Face models on a GPU: right (`check`), and how fast and how large (`speed`).

    python benchmarks/models.py check [--training] [--out FILE.csv] [NAME ...]
    python benchmarks/models.py speed [--training] [--out FILE.csv] [NAME ...]

`check` runs the thirty tiny models of tests/models/zoo.py against float64 eager, several
processes at once. `speed` times the large ones of tests/models/large.py in one process: eager,
Inductor on eager and on SDPA, and ours; medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PROCESSES = 8
RUNS = 15


def check_some(names: list[str], training: bool) -> list[list[str]]:
    """[model, dtype, "ok" or what is wrong, kernels] for each model in float32 and bfloat16."""
    import torch

    from fa3_compile.testing import assert_matches_eager
    from tests.models.zoo import BY_NAME

    # Eager's and Inductor's convolutions round differently otherwise (ViT's patches).
    torch.backends.cudnn.allow_tf32 = False
    rows = []
    for name in names:
        for dtype in (torch.float32, torch.bfloat16):
            architecture = BY_NAME[name]
            model = architecture.make().to("cuda")
            start = time.perf_counter()
            try:
                report = assert_matches_eager(
                    model,
                    dtype=dtype,
                    training=training,
                    **architecture.inputs(batch=2, length=24, device="cuda"),
                )
                kernels = sorted({r.kernel or r.code for r in report.regions})
                said = "ok" if all(r.fused for r in report.regions) else "declined"
            except Exception as error:
                said, kernels = f"{type(error).__name__}: {error}"[:1500], []
            rows.append([name, str(dtype), said, " ".join(kernels), f"{_since(start):.1f}"])
            print(*rows[-1], flush=True)
    return rows


def _since(start: float) -> float:
    return time.perf_counter() - start


def check(names: list[str], training: bool) -> list[list[str]]:
    """`check_some` over several processes."""
    flags = ["--training"] if training else []
    children = []
    for i in range(PROCESSES):
        share = names[i::PROCESSES]
        if share:
            command = [sys.executable, __file__, "check-some", *share, *flags]
            environment = {**os.environ, "OMP_NUM_THREADS": "2"}
            children.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
            )
    rows = []
    for child in children:
        out, _ = child.communicate()
        rows += [line.split(" ", 2) for line in out.splitlines() if " torch." in line]
    wrong = [row for row in rows if not row[2].startswith("ok")]
    for row in wrong:
        print(*row)
    print(f"{len(rows) - len(wrong)} of {len(rows)} right")
    return rows


def speed(names: list[str], training: bool) -> list[list[str]]:
    """[model, what, median ms, peak GiB, largest error of float32-accumulated eager]."""
    import torch

    from fa3_compile.backend import fa3
    from fa3_compile.report import collect
    from tests.models.large import large

    rows = []
    for name in names:
        model, inputs = large(name)
        model.train(training)
        plain = {"inductor": "inductor", "fa3": fa3}
        candidates = {}
        for label, backend in plain.items():
            torch._dynamo.reset()
            start = time.perf_counter()
            with collect() as report:
                run = _runner(torch.compile(model, backend=backend), inputs, training)
                run()
            torch.cuda.synchronize()
            print(f"{name} {label}: first call {_since(start):.1f} s", flush=True)
            if label == "fa3":
                print(*(f"  {r.line()}" for r in report.regions), sep="\n", flush=True)
            candidates[label] = run
            if label == "inductor":
                # Each label keeps its own compiled code: a reset would drop it.
                run()
            times, peak, out = _measure({label: run})
            rows.append([name, label, f"{times[label]:.2f}", f"{peak:.2f}"])
            print(*rows[-1], flush=True)
            candidates[label] = out
        a, b = candidates["inductor"], candidates["fa3"]
        off = (a.float() - b.float()).abs().max().item()
        print(f"{name}: largest difference {off:.3e} of {a.float().abs().max().item():.3e}")
        del model, inputs, candidates, a, b, out, run
        torch.cuda.empty_cache()
    return rows


def _runner(compiled, inputs, training: bool):
    import torch

    def run():
        if not training:
            with torch.no_grad():
                return compiled(**inputs)[0]
        out = compiled(**inputs)[0]
        out.float().square().mean().backward()
        return out.detach()

    return run


def _measure(runs) -> tuple[dict[str, float], float, object]:
    import torch

    times: dict[str, list[float]] = {label: [] for label in runs}
    out = None
    for run in runs.values():
        for _ in range(3):
            out = run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(RUNS):
        for label, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            out = run()
            end.record()
            end.synchronize()
            times[label].append(begin.elapsed_time(end))
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {label: statistics.median(t) for label, t in times.items()}, peak, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=("check", "check-some", "speed"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    names = arguments.names
    if not names:
        from tests.models.large import LARGE
        from tests.models.zoo import BY_NAME

        names = list(LARGE if arguments.what == "speed" else BY_NAME)
    act = {"check": check, "check-some": check_some, "speed": speed}[arguments.what]
    rows = act(names, arguments.training)
    if arguments.out:
        with arguments.out.open("w", newline="") as file:
            csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main()
