"""The cache on disk: one private directory, one folder an entry, checked when read.

An entry is written to a temporary folder and renamed, so that readers see a whole one or none;
its manifest holds each file's SHA-256, and an entry that does not match is as good as absent.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: a lost race then costs a second build, no more
    fcntl = None

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# A writer's folder that is this old was left by one that died.
LEFTOVER_SECONDS = 3600


def root() -> Path:
    """FA3_CACHE_DIR, or `fa3` under torch's cache directory; made on first use, mode 0700.

    A directory of this process alone where that is not ours, or could not be written.
    """
    if _elsewhere is not None:
        return _elsewhere
    try:
        if configured := os.environ.get("FA3_CACHE_DIR"):
            path = Path(configured).expanduser()
        else:
            from torch._inductor.runtime.cache_dir_utils import cache_dir

            path = Path(cache_dir()) / "fa3"
    except (OSError, KeyError, RuntimeError) as error:  # a user without a home, or without a name
        return _own(str(error))
    return _private(path)


@functools.lru_cache(maxsize=16)
def _private(path: Path) -> Path:
    """The directory from now on, or one of this process alone where it is not ours to write.

    What lies there is executed, so a directory that another user owns, can write, or has put a
    link in the place of is refused.
    """
    try:
        if path.is_symlink():
            raise PermissionError(f"{path} is a symbolic link; name what it points to")
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
        if hasattr(os, "getuid") and status.st_uid != os.getuid():
            raise PermissionError(f"{path} belongs to user {status.st_uid}")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            path.chmod(0o700)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(f"{path} cannot be written")
        return path.absolute()
    except OSError as error:
        return _own(str(error))


@functools.cache
def _own(why: str) -> Path:
    """A directory of this process alone, mode 0700."""
    own = Path(tempfile.mkdtemp(prefix="fa3-"))
    atexit.register(_remove_own, own, os.getpid())
    log.warning("no kernel cache (%s); using %s. FA3_CACHE_DIR names another", why, own)
    return own


def _remove_own(own: Path, process: int) -> None:
    if os.getpid() == process:  # and not one that was forked from it
        shutil.rmtree(own, ignore_errors=True)


# Where entries go once the cache could not be written.
_elsewhere: Path | None = None


def folder(kind: str, key: str) -> Path:
    """Where the entry lies, whether it exists or not."""
    return root() / kind / key


def read(kind: str, key: str) -> dict[str, bytes] | None:
    """The entry's files by name, each as it was written; None where it is missing or damaged."""
    path = folder(kind, key)
    try:
        if path.is_symlink():
            return None
        manifest = json.loads((path / MANIFEST).read_bytes())
        if any(os.path.basename(name) != name for name in manifest):
            return None
        files = {name: (path / name).read_bytes() for name in manifest}
        whole = all(_digest(files[name]) == digest for name, digest in manifest.items())
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return None
    return files if files and whole else None


def valid(kind: str, key: str) -> bool:
    """Whether the entry exists and every file is as it was written."""
    return read(kind, key) is not None


def write(kind: str, key: str, files: Mapping[str, str | bytes]) -> Path:
    """Stores an entry, in place of a damaged one if need be; the folder of the valid entry.

    Where the disk is full or turned read-only it goes, as all later ones, to a directory of this
    process alone. OSError where that cannot be written either.
    """
    global _elsewhere
    try:
        with contextlib.suppress(FileNotFoundError):  # somebody is clearing the cache
            return _write(kind, key, files)
        return _write(kind, key, files)
    except OSError as error:
        if _elsewhere is not None:
            raise
        _elsewhere = _own(str(error))
        return _write(kind, key, files)


def _write(kind: str, key: str, files: Mapping[str, str | bytes]) -> Path:
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
                _remove(path)
                temporary.rename(path)
                _sweep(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _remove(path: Path) -> None:
    """Whatever lies in an entry's place; what a link points to stays."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Removes what writers of this entry that died have left beside it."""
    for leftover in path.parent.glob(f".{path.name}-*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


def update(kind: str, key: str, name: str, content: str) -> None:
    """As `write` for an entry of one file that may change."""
    with lock(kind, f"{key}.update"):
        _remove(folder(kind, key))
        write(kind, key, {name: content})


@contextlib.contextmanager
def lock(kind: str, key: str) -> Iterator[None]:
    """Held by one process at a time; the system frees it when a process dies."""
    path = root() / kind / f".{key}.lock"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(path, "w") as stream:
        if fcntl is None:
            yield
            return
        fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Closing is not enough where a process was forked meanwhile: it has the file open too.
            fcntl.flock(stream, fcntl.LOCK_UN)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
