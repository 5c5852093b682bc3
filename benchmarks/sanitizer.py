"""A Python program under compute-sanitizer, and what the sanitizer's log says of it."""

from __future__ import annotations

import collections
import functools
import re
import sys
from dataclasses import dataclass

from fa3_compile import resources

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
    r"(Read|Write) access at (?:void )?(\w+)[^+]*\+0x[0-9a-f]+(?: in (?:\S*/)?(\S+):(\d+))?"
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
    """What racecheck says of one side of a race."""

    kind: str
    kernel: str
    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{self.kind} in {self.file}:{self.line}" if self.file else self.kind

    def stands_in(self, header: str, function: str) -> bool:
        return self.file == f"{header}.cuh" and self.line in lines_of(header, function)


@functools.cache
def lines_of(header: str, function: str) -> range:
    """Of a function of kernels/include/fa3, the lines."""
    text = (resources.kernels() / "include/fa3" / f"{header}.cuh").read_text()
    start = re.search(rf"^FA3_DEVICE \w+ {function}\(.*?^}}", text, re.MULTILINE | re.DOTALL)
    assert start is not None, f"{header}.cuh has no {function}"
    first = text.count("\n", 0, start.start()) + 1
    return range(first, first + start[0].count("\n") + 1)


def is_ordered(one: Access, other: Access) -> bool:
    """Whether racecheck sees a race where an mbarrier orders the two.

    It takes a copy without a tensor map (cp.async.bulk) for a write of the thread that starts it,
    with nothing that ends it: the bytes that it brings to an mbarrier are not followed, nor is the
    barrier around a loop. load_shared reads what bulk_load has brought and nothing else: the row
    terms, between kFull and kEmpty of their stage, and pieces of dQ, between kPieceFull and the
    __syncwarp after them. A write of another kind to those places, or a read of another kind of
    them, is an error.
    """
    write, read = (one, other) if one.kind == "Write" else (other, one)
    return (
        (write.kind, read.kind) == ("Write", "Read")
        and write.kernel == read.kernel == "attention_bwd"
        and write.stands_in("tma", "bulk_load")
        and read.stands_in("fragment", "load_shared")
    )


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
            alone = ("error", f"race: {first} at {first.kernel}")
            reports.append(alone)
        elif first and (other := OTHER.match(line)):
            second = _access(other[1])
            kind = "ordered" if is_ordered(first, second) else "error"
            if reports[-1] is alone:
                reports.pop()
            reports.append((kind, f"race: {first} and {second} at {first.kernel}"))
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
    found = ACCESS.match(text)
    if found is None:  # in words that are not known here: nothing that is ordered
        return Access(text, "")
    return Access(found[1], found[2], found[3] or "", int(found[4] or 0))
