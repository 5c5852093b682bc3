"""The entry of the cache that its tests write, damage and look for."""

from __future__ import annotations

from pathlib import Path

from fa3_compile.lower.binaries import cache

KIND, KEY = "cuda", "0123456789abcdef"
FILES = {"kernel.cu": "__global__ void f() {}\n" * 40, "kernel.cubin": bytes(range(256)) * 64}


def entry(home: Path) -> Path:
    return home / KIND / KEY


def holds(files: dict[str, str | bytes] = FILES) -> bool:
    """Whether the cache has the entry, as it was written."""
    found = cache.read(KIND, KEY)
    wanted = {n: x.encode() if isinstance(x, str) else x for n, x in files.items()}
    return found == wanted
