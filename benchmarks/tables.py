"""The tables of docs/benchmarks.md and of the README, from the rows of `benchmarks/run.py`.

A page has a place for each, `<!-- table NAME -->` to `<!-- end -->`; `fill` writes what stands
between.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

Rows = Sequence[dict[str, str]]
CASE = re.compile(r"(?P<variant>.*)-B(?P<batch>\d+)-S(?P<length>\w+)-D(?P<dim>\d+)$")
PLACE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
DENSE = [(f"{v}-B{b}-S{s}-D{d}") for v in ("full", "causal") for d in (64, 128, 256)
         for b, s in ((8, "2k"), (1, "16k"))]  # fmt: skip
PEERS = {"cudnn": "cuDNN", "flash2": "FlashAttention-2", "flex": "FlexAttention",
         "inductor": "Inductor, eager", "inductor sdpa": "Inductor, SDPA"}  # fmt: skip
SPELLINGS = ("inductor", "inductor sdpa")
# The README's choice of models (tests/models/large.py), in its words.
HIGHLIGHTS = {
    ("llama", "forward"): "Llama-3-8B's layers, 2 x 8192",
    ("gemma2", "forward"): "Gemma-2-2B's layers (softcap, windows), 2 x 8192",
    ("bloom", "forward"): "Bloom-1b7's layers (ALiBi), 2 x 4096",
    ("gpt_oss", "forward"): "gpt-oss-20b's layers (sinks, windows, 8 experts), 2 x 4096",
    ("llama", "training"): "a training step of Llama-3-8B's layers, 2 x 8192",
    ("gpt_oss", "training"): "a training step of gpt-oss-20b's layers, 2 x 4096",
}


def attention(
    rows: Rows, direction: str, wanted: Callable[[str], bool], peers: Iterable[str]
) -> str:
    """TFLOP/s of ours and the others, a line a case, the share of the best other in brackets."""
    found = _by_case(rows, direction)
    peers = [p for p in peers if any(p in of for c, of in found.items() if wanted(c))]
    lines = [_line(["case", "fa3", *(PEERS[p] for p in peers)]), _line(["---"] * (2 + len(peers)))]
    for case in sorted((c for c in found if wanted(c)), key=_order):
        ours, of = _number(found[case], "fa3", "tflops"), found[case]
        cells = [_cell(ours, None)]
        cells += [_cell(_number(of, peer, "tflops"), ours, of.get(peer)) for peer in peers]
        lines.append(_line([case, *cells]))
    return "\n".join(lines)


def _cell(speed: float | None, ours: float | None, row: dict[str, str] | None = None) -> str:
    if speed is None:
        if row is None:
            return ""
        return row["note"] if row["note"] == "out of memory" else "failed"
    share = f" ({ours / speed:.2f}x)" if ours else ""
    return f"{speed:.0f}{share}"


def decode(rows: Rows) -> str:
    """GB/s of the least traffic, a line a case."""
    found = {c: of for c, of in _by_case(rows, "forward").items() if _number(of, "fa3", "gbytes_s")}
    peers = [p for p in PEERS if any(p in of for of in found.values())]
    lines = [_line(["case", "fa3", *(PEERS[p] for p in peers)]), _line(["---"] * (2 + len(peers)))]
    for case in sorted(found, key=_order):
        speeds = [_number(found[case], name, "gbytes_s") for name in ("fa3", *peers)]
        lines.append(_line([case, *("" if s is None else f"{s:.0f}" for s in speeds)]))
    return "\n".join(lines)


def models(rows: Rows) -> str:
    """Milliseconds and GiB of ours and of Inductor on both spellings, and what the faster of these
    takes as a multiple of ours."""
    titles = ["model", "", "fa3 ms", "Inductor: eager ms", "SDPA ms", "speed-up"]
    titles += ["fa3 GiB", "eager GiB", "SDPA GiB", "kernels"]
    lines = [_line(titles), _line(["---"] * len(titles))]
    for direction in ("forward", "training"):
        for name, of in _by_case(rows, direction).items():
            ours = _number(of, "fa3", "ms")
            theirs = [_number(of, n, "ms") for n in SPELLINGS]
            if CASE.match(name) or not ours or not any(theirs):
                continue
            times = [_measured(of.get(n), "ms", 1) for n in ("fa3", *SPELLINGS)]
            peaks = [_measured(of.get(n), "peak_gib", 2) for n in ("fa3", *SPELLINGS)]
            fastest = min(t for t in theirs if t)
            cells = [name, direction, *times, f"{fastest / ours:.2f}x", *peaks]
            lines.append(_line([*cells, of["fa3"]["kernel"]]))
    return "\n".join(lines)


def highlights(rows: Rows) -> str:
    """Milliseconds and GiB of some models, Inductor's on both spellings before ours."""
    titles = ["batch x tokens", "Inductor: eager", "SDPA", "fa3"]
    titles += ["peak memory: eager", "SDPA", "fa3"]
    lines = [_line(titles), _line(["---"] * len(titles))]
    by_direction = {direction: _by_case(rows, direction) for _, direction in HIGHLIGHTS}
    for (name, direction), said in HIGHLIGHTS.items():
        of = by_direction[direction].get(name, {})
        shown = [of.get(contender) for contender in (*SPELLINGS, "fa3")]
        times = [_measured(row, "ms", 1, " ms") for row in shown]
        lines.append(
            _line([said, *times, *(_measured(row, "peak_gib", 1, " GiB") for row in shown)])
        )
    return "\n".join(lines)


def _measured(row: dict[str, str] | None, column: str, digits: int, unit: str = "") -> str:
    if row is None or not (row[column] or row["note"] == "out of memory"):
        return ""
    return f"{float(row[column]):.{digits}f}{unit}" if row[column] else row["note"]


def tables(rows: Rows) -> dict[str, str]:
    """Every table by its name."""
    native = ("cudnn", "flash2")
    others = ("flex", "cudnn", "inductor")

    def variant(case: str) -> bool:
        return "-B2-S8k-D128" in case

    return {
        "machine": _machine(rows),
        "dense_forward": attention(rows, "forward", DENSE.__contains__, native),
        "dense_backward": attention(rows, "backward", DENSE.__contains__, native),
        "variants_forward": attention(rows, "forward", variant, others),
        "variants_backward": attention(rows, "backward", variant, others),
        "decode": decode(rows),
        "models": models(rows),
        "highlights": highlights(rows),
    }


def fill(page: str, rows: Rows) -> str:
    """The page with every place filled in. KeyError for a place of an unknown table."""
    made = tables(rows)
    return PLACE.sub(lambda place: f"{place[1]}{made[place[2]]}\n{place[3]}", page)


def _machine(rows: Rows) -> str:
    commits: dict[str, set[str]] = {}
    for r in rows:
        on = f"{r['device']}, driver {r['driver']}, torch {r['torch']}, triton {r['triton']}"
        commits.setdefault(f"{on}, {r['date']}", set()).add(r["commit"])
    return "; ".join(f"{on}, commits {', '.join(sorted(commits[on]))}" for on in sorted(commits))


def _by_case(rows: Rows, direction: str) -> dict[str, dict[str, dict[str, str]]]:
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        if row["direction"] == direction:
            found.setdefault(row["case"], {})[row["contender"]] = row
    return found


def _number(of: dict[str, dict[str, str]], contender: str, column: str) -> float | None:
    text = of.get(contender, {}).get(column, "")
    return float(text) if text else None


def _order(case: str) -> tuple[str, int, int]:
    found = CASE.match(case)
    assert found is not None
    return found["variant"], int(found["dim"]), -int(found["batch"])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
