"""Where in the user's source a graph node comes from."""

from __future__ import annotations

import re
import sysconfig
import traceback
from pathlib import Path

import torch
from torch import fx

_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+), in .*\n(?:    (?P<code>.*)\n?)?')
_TORCH = str(Path(torch.__file__).parent)


def where(node: fx.Node) -> str:
    """`modeling.py:180: weights = q @ k.transpose(-2, -1)`, or "" when nothing is recorded.

    The innermost frame outside PyTorch itself, out of the `stack_trace` that Dynamo leaves in the
    node's meta.
    """
    trace = node.meta.get("stack_trace") or ""
    frames = [frame for frame in _FRAME.finditer(trace) if not frame["file"].startswith(_TORCH)]
    if not frames:
        return ""
    place = f"{short_path(frames[-1]['file'])}:{frames[-1]['line']}"
    code = (frames[-1]["code"] or "").strip()
    return f"{place}: {code}" if code else place


def of_frame(frame: traceback.FrameSummary) -> str:
    """The same of a frame of a stack."""
    return f"{short_path(frame.filename)}:{frame.lineno}: {frame.line}"


def short_path(file: str) -> str:
    """A path as one would say it: from the package or the working directory on."""
    for base in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), Path.cwd()):
        if Path(file).is_relative_to(base):
            return str(Path(file).relative_to(base))
    return file
