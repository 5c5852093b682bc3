"""Draws the CSVs of `benchmarks/run.py` into docs/images, and writes the tables of
docs/benchmarks.md and of the README; needs the extra `docs` (matplotlib).

    python benchmarks/plot.py benchmarks/results/2026-11-21_h100_run_*.csv
    python benchmarks/plot.py --out /tmp/images --page "" mine.csv

lengths.svg   TFLOP/s of causal attention by sequence length, forward and backward
variants.svg  TFLOP/s by score modifier and mask, forward and backward
models.svg    how much faster a model runs than what Inductor makes of it
memory.svg    the peak memory of those models
A picture without rows is left out.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.rows import read
from benchmarks.tables import fill

PAGES = (ROOT / "docs" / "benchmarks.md", ROOT / "README.md")
# The same picture from the same numbers, byte for byte.
plt.rc("svg", hashsalt="fa3")
plt.rc("font", size=9)
plt.rc("axes.spines", top=False, right=False)
plt.rc("figure.constrained_layout", use=True)

Rows = Sequence[dict[str, str]]
# Told apart without colour vision too (Okabe and Ito); ours stands out.
COLOURS = {
    "fa3": "#d55e00",
    "cudnn": "#0072b2",
    "flash2": "#56b4e9",
    "flash3": "#009e73",
    "flash4": "#117733",
    "flex": "#cc79a7",
    "inductor": "#999999",
    "inductor sdpa": "#555555",
}
NAME = re.compile(r"(?P<variant>.*)-B(?P<batch>\d+)-S(?P<length>\d+)(?P<k>k?)-D(?P<dim>\d+)$")


def lengths(rows: Rows) -> Figure | None:
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        place = _place(row)
        if place and place[0] == "causal" and place[2] == 128 and row["tflops"]:
            line = lines.setdefault((row["direction"], row["contender"]), {})
            line[place[1]] = float(row["tflops"])
    if not any(len(line) > 2 for line in lines.values()):
        return None
    figure, axes = _panels([d for d in ("forward", "backward") if any(x == d for x, _ in lines)])
    for direction, axis in axes.items():
        for contender in COLOURS:
            line = sorted(lines.get((direction, contender), {}).items())
            if line:
                axis.plot(*zip(*line), "o-", color=COLOURS[contender], label=contender, ms=4)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("sequence length (16384 tokens in all)")
        axis.set_ylabel("TFLOP/s")
        axis.set_ylim(0)
        axis.set_title(f"causal, head dim 128, {direction}")
        axis.legend(frameon=False)
    return figure


def variants(rows: Rows) -> Figure | None:
    bars: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        place = _place(row)
        if place and place[1:] == (8192, 128) and row["tflops"]:
            of_variant = bars.setdefault(row["direction"], {}).setdefault(place[0], {})
            of_variant[row["contender"]] = float(row["tflops"])
    if not bars:
        return None
    figure, axes = _panels([d for d in ("forward", "backward") if d in bars])
    for direction, axis in axes.items():
        _bars(axis, bars[direction], "TFLOP/s of what the mask leaves")
        axis.set_title(f"16 heads of 128, 2 x 8192 tokens, {direction}")
    return figure


def models(rows: Rows) -> Figure | None:
    bars: dict[str, dict[str, dict[str, float]]] = {}
    for direction, name, measured in _models(rows):
        times = {contender: float(row["ms"]) for contender, row in measured.items() if row["ms"]}
        if "fa3" in times:
            ratios = {n: t / times["fa3"] for n, t in times.items() if n != "fa3"}
            bars.setdefault(direction, {})[name] = ratios
    bars = {d: {n: r for n, r in of.items() if r} for d, of in bars.items()}
    if not any(bars.values()):
        return None
    figure, axes = _panels(list(bars))
    for direction, axis in axes.items():
        _bars(axis, bars[direction], "times faster with fa3")
        axis.axhline(1, color="black", lw=0.8)
        axis.set_title(f"four layers, {direction}, against")
    return figure


def memory(rows: Rows) -> Figure | None:
    bars: dict[str, dict[str, dict[str, float]]] = {}
    for direction, name, measured in _models(rows):
        peaks = {n: float(row["peak_gib"]) for n, row in measured.items() if row["peak_gib"]}
        if len(peaks) > 1:
            bars.setdefault(direction, {})[name] = peaks
    if not bars:
        return None
    figure, axes = _panels(list(bars))
    for direction, axis in axes.items():
        _bars(axis, bars[direction], "peak memory, GiB")
        axis.set_title(f"four layers, {direction}")
    return figure


PICTURES = {"lengths": lengths, "variants": variants, "models": models, "memory": memory}


def _place(row: dict[str, str]) -> tuple[str, int, int] | None:
    """(variant, length, head dim) of an attention case."""
    found = NAME.match(row["case"])
    if not found:
        return None
    return found["variant"], int(found["length"]) * (1024 if found["k"] else 1), int(found["dim"])


def _models(rows: Rows) -> Iterable[tuple[str, str, dict[str, dict[str, str]]]]:
    found: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        if not NAME.match(row["case"]):
            found.setdefault((row["direction"], row["case"]), {})[row["contender"]] = row
    for (direction, name), measured in found.items():
        yield direction, name, measured


def _panels(directions: Sequence[str]) -> tuple[Figure, dict[str, Axes]]:
    figure, axes = plt.subplots(1, len(directions), figsize=(5.2 * len(directions), 3.2))
    return figure, dict(zip(directions, [axes] if len(directions) == 1 else list(axes)))


def _bars(axis: Axes, bars: dict[str, dict[str, float]], label: str) -> None:
    names = [c for c in COLOURS if any(c in of for of in bars.values())]
    width = 0.8 / max(len(names), 1)
    for i, contender in enumerate(names):
        places = [(x, of[contender]) for x, of in enumerate(bars.values()) if contender in of]
        at = [x - 0.4 + (i + 0.5) * width for x, _ in places]
        drawn = axis.bar(
            at, [y for _, y in places], width, color=COLOURS[contender], label=contender
        )
        shown = [f"{y:.0f}" if y >= 20 else f"{y:.1f}" for _, y in places]
        axis.bar_label(drawn, shown, fontsize=5.5)
    axis.set_xticks(range(len(bars)), list(bars), rotation=30, ha="right")
    axis.set_ylabel(label)
    axis.margins(y=0.2)
    axis.legend(frameon=False, fontsize=7, ncols=len(names), loc="upper right")


def draw(rows: Rows, folder: Path) -> list[Path]:
    """The pictures that the rows give, written into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, picture in PICTURES.items():
        figure = picture([row for row in rows if row["ok"] == "True"])
        if figure is not None:
            device = next((row["device"] for row in rows), "")
            figure.supxlabel(f"{device}, bf16, medians of one process", fontsize=6, color="gray")
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)
            written.append(folder / f"{name}.svg")
    return written


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--page", nargs="*", default=[str(page) for page in PAGES])
    arguments = parser.parse_args(words)
    rows = read(arguments.csv)
    written = draw(rows, arguments.out)
    for page in (Path(name) for name in arguments.page if name):
        page.write_text(fill(page.read_text(), rows))
        written.append(page)
    print(*written, sep="\n")
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
