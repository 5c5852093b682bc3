"""A rendered Triton kernel as an importable module, from the cache on disk."""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from types import ModuleType
from typing import Protocol

from fa3_compile.lower.binaries import cache
from fa3_compile.lower.choose import KernelBuildError
from fa3_compile.spec.attention import AttentionSpec

log = logging.getLogger(__name__)

KIND = "triton"
SOURCE = "kernel.py"


class Key(Protocol):
    """What names a kernel and writes its source; hashable."""

    @property
    def digest(self) -> str: ...

    @property
    def spec(self) -> AttentionSpec: ...

    def source(self) -> str: ...


@functools.lru_cache(maxsize=1024)
def load(key: Key) -> ModuleType:
    """The module of the kernel; its source stays beside Triton's own cache for the reader.

    Raises KernelBuildError where the source does not import.
    """
    digest = key.digest
    if not cache.valid(KIND, digest):
        try:
            cache.write(KIND, digest, {SOURCE: key.source()})
        except OSError as error:
            raise KernelBuildError(f"the generated kernel cannot be stored: {error}") from error
    name = f"fa3_triton_{digest}"
    path = cache.folder(KIND, digest) / SOURCE
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise KernelBuildError(f"the generated kernel {path} does not import: {error}") from error
    log.debug("%s: %s", key.spec, path)
    return module


def source_of(key: Key) -> str:
    """The file with a loaded kernel's source; "" where it is gone."""
    path = cache.folder(KIND, key.digest) / SOURCE
    return str(path) if path.is_file() else ""
