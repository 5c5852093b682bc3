"""The code blocks of a Markdown page."""

from __future__ import annotations

import linecache
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """The page's blocks of a language, in order; those that include a file are left out."""
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [
        block["code"]
        for block in found
        if block["language"] == language and "--8<--" not in block["code"]
    ]


def run(code: str, namespace: dict[str, Any], name: str) -> None:
    """Executes a block; its lines are found by whoever asks where something was written."""
    linecache.cache[name] = (len(code), None, code.splitlines(True), name)
    exec(compile(code, name, "exec"), namespace)


def commands(page: Path) -> list[str]:
    """The lines of its console blocks that are typed."""
    lines = "".join(blocks(page, "console")).splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
