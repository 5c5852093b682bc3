"""A process in which Triton's interpreter runs the cases of a test module, one when it is asked.

TRITON_INTERPRET has to be set before Triton is imported, so a module whose tests want it is also
the program of that process: it calls `serve` where it is run. Each worker of pytest has a process
of its own, and runs what it tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
# A case's name -> what `run` said of it. AssertionError with its traceback where it raised.
Interpreter = Callable[[str], dict[str, Any]]


@contextmanager
def interpreter(module: str, folder: Path) -> Iterator[Interpreter]:
    """Cases of the module, run in its process; kernels and what it writes to stderr in `folder`."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FA3_CACHE_DIR": str(folder / "cache")}
    written = folder / "stderr"
    with written.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", module], env=environment, cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
        )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    asked, answers = process.stdin, process.stdout

    def run(name: str) -> dict[str, Any]:
        print(name, file=asked, flush=True)
        answer = answers.readline()
        assert answer, written.read_text()[-3000:]
        record = json.loads(answer)
        assert "raised" not in record, record["raised"]
        return record

    try:
        yield run
    finally:
        process.kill()
        process.communicate()


def serve(cases: Iterable[Any], run: Callable[[Any], dict[str, Any]]) -> None:
    """Answers names of cases, a line each, with what `run` says of them."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    by_name = {case.name: case for case in cases}
    for line in sys.stdin:
        try:
            record = run(by_name[line.rstrip("\n")])
        except Exception:
            record = {"raised": traceback.format_exc()}
        print(json.dumps(record), file=answers, flush=True)
