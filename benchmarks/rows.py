"""The rows of a benchmark run: what is measured, on what, and how it is written down."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import TextIO

import torch

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Row:
    """One contender at one case.

    case, direction  "causal-B8-S2k-D128", "forward" | "backward" | "training"
    contender        its name, see benchmarks/contenders.py
    kernel           for ours, the kernel family that ran; "declined: ..." where none did
    ms               median milliseconds of a call; None where it was not timed
    tflops           of what the mask leaves, 10^12 operations a second
    gbytes_s         least traffic over the time, 10^9 bytes a second
    peak_gib         most memory held beyond the inputs (models: parameters included)
    error, limit     largest distance from float64 (models: float32), and what is allowed
    ok               within the limit
    first_call_s     seconds of the first call, compilation included
    """

    case: str
    direction: str
    contender: str
    kernel: str = ""
    ms: float | None = None
    tflops: float | None = None
    gbytes_s: float | None = None
    peak_gib: float | None = None
    error: float | None = None
    limit: float | None = None
    ok: bool = False
    first_call_s: float | None = None
    note: str = ""

    def said(self) -> str:
        """The row in one line, for the terminal."""
        speed = "-" if self.ms is None else f"{self.ms:.3f} ms"
        if self.tflops is not None:
            speed += f" {self.tflops:.0f} TFLOP/s"
        if self.gbytes_s is not None:
            speed += f" {self.gbytes_s:.0f} GB/s"
        memory = "" if self.peak_gib is None else f" {self.peak_gib:.2f} GiB"
        name = f"{self.contender} {self.kernel}".strip()
        return (
            f"{self.case:<26} {self.direction:<9} {name:<24} {speed}{memory} {self.note}".rstrip()
        )


def environment(device: torch.device, commit: str = "") -> dict[str, str]:
    """What a number depends on: columns that all rows of a run share."""
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "driver": _driver() if device.type == "cuda" else "",
        "torch": torch.__version__,
        "triton": _triton(),
        "commit": commit or _commit(),
    }


class Table:
    """A CSV that grows row by row, so that an interrupted run keeps what it measured."""

    def __init__(self, stream: TextIO, shared: dict[str, str]) -> None:
        self.stream, self.shared = stream, shared
        names = [field.name for field in fields(Row)]
        self.writer = csv.DictWriter(stream, [*names, *shared], lineterminator="\n")
        self.writer.writeheader()

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            shown = {n: f"{x:.6g}" if isinstance(x, float) else x for n, x in asdict(row).items()}
            self.writer.writerow(shown | self.shared)
        self.stream.flush()


def read(paths: Iterable[Path]) -> list[dict[str, str]]:
    """The rows of several CSVs, of text."""
    rows = []
    for path in paths:
        with path.open(newline="") as file:
            rows += list(csv.DictReader(file))
    return rows


def _triton() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _first_line(command)


def _commit() -> str:
    return _first_line(["git", "-C", str(ROOT), "describe", "--always", "--dirty"])


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout.splitlines() or [""])[0].strip()
