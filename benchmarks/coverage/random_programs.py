"""Many random attention programs (tests/programs/grammar.py) against float64 eager, summarised.

    python benchmarks/coverage/random_programs.py --count 5000 --seed 1 --out FILE.csv
    python benchmarks/coverage/random_programs.py --device cuda --family 16 --processes 15
    TRITON_INTERPRET=1 python benchmarks/coverage/random_programs.py --kernels triton

On the CPU outputs, gradients and what was fused are checked; with `--device cuda`, or `--kernels`,
also the kernels that are chosen. Each process draws its share with a seed of its own, counted up
from `--seed`, and has one GPU, the next one by turns; those of `--beside n` stay on the CPU and
have the last n seeds. A wrong program is printed as it is found, with what repeats it:

    python benchmarks/coverage/random_programs.py --device cuda --seed 3 --only 117

The rest still run, and the exit status is then 1. The file is written as programs are done, so
that a run that is stopped is not lost. Its rows: a part of the grammar or the kernel family that
ran, its value, programs with it, fused, left as they were, wrong. Processes may draw what another
one has drawn: how many are distinct is said in its first line. On a GPU most of the time
is the compiler's: with `--family` programs share their kernels, and several times as many are done.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import itertools
import logging
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fa3_compile.lower import choose
from tests.programs.check import check_program
from tests.programs.choices import Random
from tests.programs.grammar import family
from tests.programs.program import Program

COLUMNS = ("part", "value", "programs", "fused", "left", "wrong")


@dataclass
class Outcome:
    """What became of one program.

    parts     of the grammar, and the kernel families that ran, by name
    fused     attentions
    wrong     what was, "" for nothing
    is_lost   its process cannot go on
    """

    number: int
    parts: dict[str, str]
    fused: int
    wrong: str
    is_lost: bool = False


class Tally:
    """Programs, fused, left and wrong, for each part of the grammar and its value."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0] * 4)
        self.seen: set[frozenset[tuple[str, str]]] = set()

    def add(self, outcome: Outcome) -> None:
        found = (True, outcome.fused > 0, outcome.fused == 0, bool(outcome.wrong))
        for part in ({"all": ""} | outcome.parts).items():
            self.counts[part] = [a + b for a, b in zip(self.counts[part], found)]
        self.seen.add(frozenset(outcome.parts.items()))

    def __str__(self) -> str:
        return f"{self.programs} programs ({len(self.seen)} distinct), {self.wrong} wrong"

    @property
    def programs(self) -> int:
        return self.counts["all", ""][0]

    @property
    def wrong(self) -> int:
        return self.counts["all", ""][3]

    def write(self, path: Path, about: str) -> None:
        # Expressions are as many as programs that have one.
        counted = sorted((x, n) for x, n in self.counts.items() if x[0] != "expression")
        rows = [(*part, *count) for part, count in counted]
        with path.open("w", newline="") as file:
            file.write(f"# {about}; python {' '.join(sys.argv)}\n")
            csv.writer(file).writerows([COLUMNS, *rows])


@dataclass
class Recorder:
    """The kernel families whose kernels ran, forward and backward, since the last `take`."""

    ran: dict[str, list[str]] = field(default_factory=lambda: {"run": [], "run_backward": []})

    def install(self) -> None:
        for kernel in choose.kernels():
            for method, names in self.ran.items():
                setattr(kernel, method, self._recorded(getattr(kernel, method), kernel.name, names))

    @staticmethod
    def _recorded(function, name: str, names: list[str]):
        def call(*arguments):
            before = len(names)
            result = function(*arguments)
            if len(names) == before:  # and it did not leave the work to another family
                names.append(name)
            return result

        return call

    def take(self) -> dict[str, str]:
        """Without those of the attempts that follow a first one: the names, not how often."""
        found = {x: " ".join(sorted(set(names))) for x, names in self.ran.items()}
        for names in self.ran.values():
            names.clear()
        return {"forward kernel": found["run"], "backward kernel": found["run_backward"]}


@dataclass(frozen=True)
class Drawn:
    """`count` programs of a seed, always the same ones; `kernels` instead of their own.

    family  so many in turn have the same scores and softmax
    """

    seed: int
    count: int
    device: str
    kernels: tuple[str, ...] | None
    family: int = 1

    def each(self, todo: Callable[[int, Program], None]) -> None:
        """Calls `todo(number, program)`, until the last or until that raises Stop. What differs
        from an earlier one in its numbers alone is left out."""
        source, number, seen = Random(self.seed), 0, set()
        with contextlib.suppress(Stop):
            while True:
                for program in family(source, self.device, self.family):
                    if repr(program) in seen:
                        continue
                    seen.add(repr(program))
                    number += 1
                    if number > self.count:
                        return
                    if self.kernels:
                        program.run["kernels"] = self.kernels
                    todo(number, program)


class Stop(Exception):
    """No more programs."""


def _parts(program: Program) -> dict[str, str]:
    run = {name: str(value) for name, value in program.run.items()}
    device = program.arguments[0].device.type
    return program.made_of | {"expected": program.expected, "device": device} | run


def _checked(number: int, program: Program, recorder: Recorder) -> Outcome:
    outcome = Outcome(number, _parts(program), 0, "")
    try:
        outcome.fused = len(check_program(program).fused)
        if program.arguments[0].is_cuda:
            torch.cuda.synchronize()
    except Exception as error:
        cause = error.__cause__ or error
        outcome.wrong = f"{program!r}\n  {type(cause).__name__}: {str(cause)[:1500]}"
        outcome.is_lost = not _works(program.arguments[0].device)
    outcome.parts |= recorder.take()
    return outcome


def _works(device: torch.device) -> bool:
    """Whether the process can still use the GPU: a fault in a kernel is for good."""
    try:
        return bool((torch.ones(1, device=device) + 1).cpu()[0] == 2)
    except RuntimeError:
        return False


def work(drawn: Drawn, until: float, sent: Connection) -> None:
    """Checks programs in a process of its own; sends what is begun, and Outcomes."""
    warnings.filterwarnings("ignore")
    logging.basicConfig(format=f"seed {drawn.seed}: %(message).600s")
    torch.set_num_threads(1)
    if drawn.device == "cuda":
        torch.cuda.set_device(drawn.seed % torch.cuda.device_count())
    recorder = Recorder()
    recorder.install()

    def check(number: int, program: Program) -> None:
        if time.time() > until:
            raise Stop
        sent.send((number, repr(program)))
        outcome = _checked(number, program, recorder)
        sent.send(outcome)
        if outcome.is_lost:
            raise Stop

    drawn.each(check)
    sent.close()


@dataclass
class Worker:
    """A process and what it is at.

    drawn  what is still to be checked
    begun  number and text of the program that is being checked; 0 for none
    """

    drawn: Drawn
    process: SpawnProcess
    received: Connection
    begun: tuple[int, str] = (0, "")

    @classmethod
    def start(cls, drawn: Drawn, until: float) -> Worker:
        context = multiprocessing.get_context("spawn")
        received, sent = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(drawn, until, sent))
        process.start()
        sent.close()
        return cls(drawn, process, received)

    def outcome(self) -> Outcome | None:
        """The next; None where a program is begun. EOFError after the last."""
        try:
            message = self.received.recv()
        except EOFError:
            self.process.join()
            number, text = self.begun
            if not number:
                raise
            wrong = f"{text}\n  its process ended with status {self.process.exitcode}"
            message = Outcome(number, {}, 0, wrong, is_lost=True)
        if not isinstance(message, Outcome):
            self.begun = message
            return None
        self.begun = (0, "")
        self.drawn = replace(self.drawn, count=self.drawn.count - 1)
        return message


def outcomes(
    drawn: Drawn, processes: int, beside: int, seconds: float
) -> Iterator[tuple[Drawn, Outcome]]:
    """(what it is of, Outcome) as programs are done, `drawn.count` in all. Where a program ends its
    process, another one goes on with a seed of its own."""
    until, left = time.time() + seconds, drawn.count
    seeds = itertools.count(drawn.seed)
    devices = [drawn.device] * processes + ["cpu"] * beside
    workers = [Worker.start(replace(drawn, seed=next(seeds), device=x), until) for x in devices]
    while workers and left > 0:
        ready = wait([worker.received for worker in workers])
        for worker in [x for x in workers if x.received in ready]:
            try:
                outcome = worker.outcome()
            except EOFError:
                workers.remove(worker)
                continue
            if outcome:
                yield worker.drawn, outcome
                left -= 1
            if outcome and outcome.is_lost and worker.drawn.count:
                workers.append(Worker.start(replace(worker.drawn, seed=next(seeds)), until))
    for worker in workers:
        worker.process.terminate()


def repeat(drawn: Drawn) -> int:
    """Checks the last program of a seed, and prints what was fused. The exit status."""
    found: list[Program] = []
    drawn.each(lambda _, program: found.append(program))
    print(found[-1])
    print(check_program(found[-1]))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Random attention programs against float64 eager.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kernels", help="the families that may run; default: each program's own")
    parser.add_argument(
        "--family", type=int, default=1, help="programs in turn that share a kernel"
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--beside", type=int, default=0, help="further processes, on the CPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--only", type=int, metavar="N", help="check the N-th of the seed alone")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report-every", type=int, default=250)
    arguments = parser.parse_args()
    kernels = tuple(arguments.kernels.split(",")) if arguments.kernels else None
    count = arguments.only or arguments.count
    drawn = Drawn(arguments.seed, count, arguments.device, kernels, arguments.family)
    if arguments.only:
        return repeat(drawn)
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    tally, start = Tally(), time.time()

    def report() -> None:
        spent = f"{time.time() - start:.0f} s"
        print(f"{tally}, {spent}", flush=True)
        if arguments.out:
            about = f"{tally}, {spent}, torch {torch.__version__}, {where}"
            tally.write(arguments.out, about)

    share = (arguments.processes, arguments.beside, arguments.seconds)
    for of, outcome in outcomes(drawn, *share):
        tally.add(outcome)
        if outcome.wrong:
            repeated = f"--device {of.device} --family {of.family}"
            repeated += f" --seed {of.seed} --only {outcome.number}"
            print(f"WRONG {outcome.wrong}\n  {repeated}", flush=True)
        if outcome.wrong or tally.programs % arguments.report_every == 0:
            report()
    report()
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
