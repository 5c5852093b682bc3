"""MkDocs hook: the pages that are generated from the code join the ones that are written."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from mkdocs.structure.files import File, Files

import generate


def on_files(files: Files, config) -> Files:
    for name, text in generate.pages().items():
        files.append(File.generated(config, name, content=text))
    return files
