"""Many random attention programs (tests/graph/programs.py) against float64 eager, summarised.

    python benchmarks/random_programs.py --count 5000 --seed 1 --out benchmarks/results/FILE.csv

Runs on the CPU: outputs, gradients and what was fused are checked, not the GPU kernels. A wrong
program is printed as it is found, and the rest still run; the exit status is then 1. With
`--processes n` each of n processes draws its share with a seed of its own, counted up from
`--seed`. Rows of the CSV: a part of the grammar, its value, programs with it, fused, left as they
were, wrong.
"""

from __future__ import annotations

import argparse
import collections
import csv
import multiprocessing
import sys
import time
import warnings
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.graph.check_program import check_program
from tests.graph.programs import Program, programs

COLUMNS = ("part", "value", "programs", "fused", "left", "wrong")


def _zeros() -> list[int]:
    return [0] * 4


class Tally:
    """Programs, fused, left and wrong, for each part of the grammar and its value."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], list[int]] = collections.defaultdict(_zeros)
        self.wrong: list[str] = []

    def add(self, program: Program, fused: int, wrong: str) -> None:
        parts = {"all": "", **program.made_of, "expected": program.expected}
        parts |= {name: str(value) for name, value in program.run.items()}
        if wrong:
            self.wrong.append(wrong)
        for part in parts.items():
            count = self.counts[part]
            for i, yes in enumerate((True, fused > 0, fused == 0, bool(wrong))):
                count[i] += yes

    def merge(self, other: Tally) -> None:
        self.wrong += other.wrong
        for part, counts in other.counts.items():
            self.counts[part] = [a + b for a, b in zip(self.counts[part], counts)]

    def write(self, path: Path, about: str) -> None:
        rows = [(*part, *count) for part, count in sorted(self.counts.items())]
        with path.open("w", newline="") as file:
            file.write(f"# {about}; python {' '.join(sys.argv)}\n")
            csv.writer(file).writerows([COLUMNS, *rows])


def run(count: int, first_seed: int, report_every: int, out: Path | None = None) -> Tally:
    """Draws and checks `count` programs; a seed always gives the same ones. What is done is
    written to `out` at every report, so that a run that is stopped is not lost."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    tally, start = Tally(), time.perf_counter()

    @seed(first_seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(programs())
    def each(program: Program) -> None:
        fused, wrong = 0, ""
        try:
            fused = len(check_program(program).fused)
        except Exception as error:
            cause = error.__cause__ or error
            wrong = f"{type(cause).__name__}: {cause}"
            print(f"WRONG {program!r}\n  {wrong[:1500]}", flush=True)
        tally.add(program, fused, wrong)
        done = tally.counts["all", ""][0]
        if done % report_every == 0:
            spent = time.perf_counter() - start
            print(f"{done} programs, {len(tally.wrong)} wrong, {spent:.0f} s", flush=True)
            if out:
                tally.write(out, f"seed {first_seed}, {done} programs, torch {torch.__version__}")

    each()
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report-every", type=int, default=250)
    arguments = parser.parse_args()
    share = -(-arguments.count // arguments.processes)
    seeds = range(arguments.seed, arguments.seed + arguments.processes)
    calls = [(share, seed, arguments.report_every) for seed in seeds]
    tally = Tally()
    if len(calls) == 1:
        tally.merge(run(*calls[0], arguments.out))
    else:
        with multiprocessing.get_context("spawn").Pool(len(calls)) as pool:
            for part in pool.starmap(run, calls):
                tally.merge(part)
    about = f"seeds {seeds[0]} to {seeds[-1]}, {share} programs each, torch {torch.__version__}"
    print(f"{tally.counts['all', ''][0]} programs, {len(tally.wrong)} wrong ({about}, CPU)")
    if arguments.out:
        tally.write(arguments.out, about)
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
