"""A Python program under compute-sanitizer, and what the sanitizer's log says of it."""

from __future__ import annotations

import collections
import re
import sys

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
LIBRARIES_OF_CUDA = ("libcuda.", "libcudart", "libsanitizer")


def command(tool: str, program: list[str]) -> list[str]:
    """`program`, arguments of Python, with the kernels under `tool` that are not torch's own."""
    return [
        "compute-sanitizer", "--tool", tool,
        "--kernel-name-exclude", "kernel_substring=at6native", sys.executable, *program,
    ]  # fmt: skip


def findings(log: str) -> dict[str, collections.Counter[str]]:
    """The reports in a sanitizer's log by their first lines: "API call" for calls that failed,
    "warning", and "error" for everything else; with the kernel, or the library that called."""
    found = {x: collections.Counter() for x in ("error", "API call", "warning")}
    for kind, text in _reports(log):
        found[kind][text] += 1
    return found


def _reports(log: str) -> list[tuple[str, str]]:
    reports: list[tuple[str, str]] = []
    place = None  # what tells where the last report belongs, until it was found
    for line in log.splitlines():
        if report := REPORT.match(line):
            text = report[1].strip()
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
