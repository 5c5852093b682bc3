"""Are the models of tests/models/zoo.py right on this GPU, against eager in float64?

    python benchmarks/coverage/models.py check [--training] [--out FILE.csv] [NAME ...]

Several processes at once. How fast models are: benchmarks/run.py.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
PROCESSES = 8


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=("check", "check-some"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from tests.models.zoo import BY_NAME

    names = arguments.names or list(BY_NAME)
    act = {"check": check, "check-some": check_some}[arguments.what]
    rows = act(names, arguments.training)
    if arguments.out:
        with arguments.out.open("w", newline="") as file:
            csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main()
