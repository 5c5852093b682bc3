"""A Python program under compute-sanitizer, and what the sanitizer's log says of it."""

from __future__ import annotations

import collections
import re
import sys
from dataclasses import dataclass

# What memcheck says of a driver or runtime call that did not succeed. The caller may well expect
# that, as cuda-bindings does, which looks up 34 functions that the driver of CUDA 13.0 lacks:
# anything else is about memory.
API_CALL = re.compile(r"Program hit (\S+) .*on CUDA API call to (\w+)")
# The first line of a report has one space behind the bar, the others more.
# That the program's exit status was not 0 is left to whoever started it.
REPORT = re.compile(
    r"========= (?! )(?!COMPUTE-SANITIZER|\w+ SUMMARY|Target application returned an error)(.+)"
)
# Which kernel it was, and the libraries that a failed call came through.
KERNEL = re.compile(r"=========  +at (?:void )?(\w+)")
FRAME = re.compile(r"=========  +Host Frame: .* in (\S+)$")
# A race has a line for each access: the first, then those that meet it.
RACE = re.compile(r"========= (?:Error|Warning): Race reported between (.+)")
OTHER = re.compile(r"=========  +and (.+)")
ACCESS = re.compile(
    r"(Read|Write) access at (?:void )?([\w:]+).*\+0x[0-9a-f]+ in (?:\S*/)?(\S+:\d+)"
)
LIBRARIES_OF_CUDA = ("libcuda.", "libcudart", "libsanitizer")


def command(tool: str, program: list[str]) -> list[str]:
    """`program`, arguments of Python, with the kernels under `tool` that are not torch's own."""
    return [
        "compute-sanitizer", "--tool", tool,
        "--kernel-name-exclude", "kernel_substring=at6native", sys.executable, *program,
    ]  # fmt: skip


@dataclass(frozen=True)
class Access:
    """What racecheck says of one side of a race: the function, of those inlined the innermost, and
    the line are there where a kernel knows its lines."""

    kind: str
    function: str = ""
    line: str = ""

    def __str__(self) -> str:
        return f"{self.kind} by {self.function} in {self.line}" if self.line else self.kind


# (who writes, who reads) in which racecheck sees a race -> the mbarriers that order the two
# (docs/kernel-notes.md, "The Hopper backward"). Of these functions each writes or reads nothing
# else, so that any other access to the same memory is an error.
#
# A copy without a tensor map (cp.async.bulk) passes for a write of the thread that starts it, and
# the bytes that it brings to an mbarrier for nothing: row terms, and pieces of dQ. In warps that
# hand P^T over, or have looked at a tile, one lane arrives behind a __syncwarp, for all.
ORDERED = {
    ("fa3::bulk_load", "fa3::load_shared"): "kFull and kEmpty, or kPieceFull",
    ("fa3::store_words", "fa3::load_words"): "kWeightsFull and kWeightsEmpty",
    ("fa3::TileRing::publish", "fa3::TileRing::look"): "kTileFull and kTileEmpty",
}


def ordered_by(one: Access, other: Access) -> str | None:
    """The mbarriers that order two accesses which racecheck takes for a race; None: it is one."""
    write, read = (one, other) if one.kind == "Write" else (other, one)
    if (write.kind, read.kind) != ("Write", "Read"):
        return None
    return ORDERED.get((write.function, read.function))


def findings(log: str) -> dict[str, collections.Counter[str]]:
    """The reports in a sanitizer's log by their first lines: "API call" for calls that failed,
    "ordered" for races that are none, "warning", and "error" for everything else; with the kernel,
    or the library that called."""
    found = {x: collections.Counter() for x in ("error", "ordered", "API call", "warning")}
    for kind, text in _reports(log):
        found[kind][text] += 1
    return found


def _reports(log: str) -> list[tuple[str, str]]:
    reports: list[tuple[str, str]] = []
    place = None  # what tells where the last report belongs, until it was found
    first = alone = None  # of a race, and its report before there is another access
    for line in log.splitlines():
        if race := RACE.match(line):
            first, place = _access(race[1]), None
            alone = ("error", f"race: {first}")
            reports.append(alone)
        elif first and (other := OTHER.match(line)):
            second = _access(other[1])
            barriers = ordered_by(first, second)
            kind, why = ("ordered", f", by {barriers}") if barriers else ("error", "")
            if reports[-1] is alone:
                reports.pop()
            reports.append((kind, f"race: {first} and {second}{why}"))
        elif report := REPORT.match(line):
            first, text = None, report[1].strip()
            if call := API_CALL.match(text):
                reports.append(("API call", f"{call[2]}: {call[1]}"))
                place = FRAME
            else:
                reports.append(("warning" if text.startswith("Warning") else "error", text))
                place = KERNEL
        elif place and (where := place.match(line)):
            if where[1].startswith(LIBRARIES_OF_CUDA):
                continue
            kind, text = reports[-1]
            reports[-1] = (kind, f"{text} {'from' if place is FRAME else 'at'} {where[1]}")
            place = None
    return reports


def _access(text: str) -> Access:
    """In words that are not known here, or without a line, it is nothing that is ordered."""
    found = ACCESS.match(text)
    return Access(*found.groups()) if found else Access(text)
