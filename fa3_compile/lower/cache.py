"""The cache on disk: one private directory, one folder an entry, checked when read.

An entry is written to a temporary folder and renamed, so that readers see a whole one or none;
its manifest holds each file's SHA-256, and an entry that does not match is as good as absent.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: a lost race then costs a second build, no more
    fcntl = None

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def root() -> Path:
    """FA3_CACHE_DIR, or `fa3` under torch's cache directory; made on first use, mode 0700."""
    if configured := os.environ.get("FA3_CACHE_DIR"):
        return _private(Path(configured).expanduser())
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return _private(Path(cache_dir()) / "fa3")


@functools.lru_cache(maxsize=16)
def _private(path: Path) -> Path:
    """The directory, or one of this process alone where it is not ours to write.

    What lies there is executed, so a directory that another user owns or can write is refused.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
        if hasattr(os, "getuid") and status.st_uid != os.getuid():
            raise PermissionError(f"{path} belongs to user {status.st_uid}")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            path.chmod(0o700)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(f"{path} cannot be written")
        return path
    except OSError as error:
        own = Path(tempfile.mkdtemp(prefix="fa3-"))
        log.warning("no kernel cache (%s); using %s. FA3_CACHE_DIR names another", error, own)
        return own


def folder(kind: str, key: str) -> Path:
    """Where the entry lies, whether it exists or not."""
    return root() / kind / key


def valid(kind: str, key: str) -> bool:
    """Whether the entry exists and every file is as it was written."""
    path = folder(kind, key)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        return bool(manifest) and all(
            _digest((path / name).read_bytes()) == digest for name, digest in manifest.items()
        )
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def write(kind: str, key: str, files: Mapping[str, str | bytes]) -> Path:
    """Stores an entry, in place of a damaged one if need be; the folder of the valid entry."""
    path = folder(kind, key)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=path.parent))
    try:
        manifest = {}
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            (temporary / name).write_bytes(data)
            manifest[name] = _digest(data)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        with lock(kind, key):
            if not valid(kind, key):
                shutil.rmtree(path, ignore_errors=True)
                temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def update(kind: str, key: str, name: str, content: str) -> None:
    """As `write` for an entry of one file that may change."""
    with lock(kind, f"{key}.update"):
        shutil.rmtree(folder(kind, key), ignore_errors=True)
        write(kind, key, {name: content})


@contextlib.contextmanager
def lock(kind: str, key: str) -> Iterator[None]:
    """Held by one process at a time; the system frees it when a process dies."""
    path = root() / kind / f".{key}.lock"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(path, "w") as stream:
        if fcntl is not None:
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
