"""CUDA source -> cubin with NVRTC, what the compiler said about it, and the cache on disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fa3_compile import resources
from fa3_compile.lower.binaries import cache
from fa3_compile.lower.choose import KernelBuildError
from fa3_compile.spec.attention import AttentionSpec

log = logging.getLogger(__name__)

KIND = "cuda"
SOURCE = "kernel.cu"
THREADS = 16

OPTIONS = (
    "--std=c++20",
    "--device-as-default-execution-space",
    "--ptxas-options=-v",
    "--no-source-include",
)
# ptxas: wgmma serialised (C7508 is "setmaxnreg ignored", C7510 and its neighbours the products).
SERIALISED = re.compile(r"C75\d\d|setmaxnreg ignored|wgmma.*serialized", re.IGNORECASE)


class BuildError(RuntimeError):
    """NVRTC refused a source. `log` is its output, `source` the text that was given."""

    def __init__(self, log: str, source: str):
        super().__init__(f"NVRTC could not compile a generated kernel:\n{log}")
        self.log = log
        self.source = source


class Key(Protocol):
    """What says all of a kernel: CudaKey, or that of the backward."""

    @property
    def spec(self) -> AttentionSpec: ...

    @property
    def config(self) -> Any: ...

    @property
    def digest(self) -> str: ...

    def source(self) -> str: ...


KeyT = TypeVar("KeyT", bound=Key)


@dataclass(frozen=True)
class Built:
    """A compiled kernel and the resources it takes."""

    cubin: bytes
    log: str
    registers: int
    spill_bytes: int
    serialised: bool

    @property
    def healthy(self) -> bool:
        """No spill and no serialised matrix product."""
        return self.spill_bytes == 0 and not self.serialised


@functools.cache
def _nvrtc() -> Any:
    return importlib.import_module("cuda.bindings.nvrtc")


def read_headers(root: Path) -> dict[str, str]:
    """Include name -> text of every header under `root` (kernels/)."""
    names = {path: path.relative_to(root) for path in sorted(root.rglob("*.cuh"))}
    return {str(name).removeprefix("include/"): path.read_text() for path, name in names.items()}


def build(source: str, headers: dict[str, str], arch: str = "sm_90a") -> Built:
    """Compile for `arch`; needs no GPU.

    Raises BuildError with the compiler's log.
    """
    nvrtc = _nvrtc()

    def check(result) -> Any:
        status, *values = result
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"NVRTC call failed: {status.name}")
        return values[0] if values else None

    program = check(
        nvrtc.nvrtcCreateProgram(
            source.encode(),
            b"attention.cu",
            len(headers),
            [text.encode() for text in headers.values()],
            [name.encode() for name in headers],
        )
    )
    try:
        options = [option.encode() for option in (f"--gpu-architecture={arch}", *OPTIONS)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        size = check(nvrtc.nvrtcGetProgramLogSize(program))
        raw = b" " * size
        check(nvrtc.nvrtcGetProgramLog(program, raw))
        log = raw.decode(errors="replace").strip("\0 \n")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise BuildError(log, source)
        cubin = b" " * check(nvrtc.nvrtcGetCUBINSize(program))
        check(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    registers = max((int(n) for n in re.findall(r"Used (\d+) registers", log)), default=0)
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    return Built(cubin, log, registers, spills, bool(SERIALISED.search(log)))


def missing() -> str | None:
    """Why nothing can be built here, as a sentence; it imports nothing of CUDA's."""
    if (
        importlib.util.find_spec("cuda") is None
        or importlib.util.find_spec("cuda.bindings") is None
    ):
        return "cuda-bindings is not installed (PyTorch's CUDA wheels bring it)"
    return None


@functools.cache
def headers() -> dict[str, str]:
    """The headers that the template includes."""
    return read_headers(resources.kernels())


@functools.cache
def compiler() -> str:
    """The version of NVRTC."""
    return repr(_nvrtc().nvrtcVersion()[1:])


# Kernels that a thread is building -> what others who want them wait for, to find them on disk.
_being_built: dict[Key, threading.Lock] = {}


@functools.lru_cache(maxsize=1024)
def load(key: Key) -> Built:
    """The kernel, from the cache on disk or built now; source, log and resources lie beside it.

    Raises BuildError.
    """
    name = _name(key)
    with _being_built.setdefault(key, threading.Lock()):
        try:
            built = _loaded(key, name)
            log.debug("%s: %s", key.spec, cache.folder(KIND, name) / SOURCE)
            return built
        finally:
            _being_built.pop(key, None)


def source_of(key: Key) -> Path | None:
    """The file with a built kernel's source; None where it could not be written."""
    path = cache.folder(KIND, _name(key)) / SOURCE
    return path if path.is_file() else None


def _name(key: Key) -> str:
    """Of its entry in the cache."""
    return hashlib.sha256(f"{key.digest} {compiler()}".encode()).hexdigest()[:24]


def _loaded(key: Key, name: str) -> Built:
    """The kernel whose entry in the cache has this name, built where there is none."""
    if (files := cache.read(KIND, name)) is not None:
        facts = json.loads(files["config.json"])["built"]
        return Built(files["kernel.cubin"], files["log"].decode(), **facts)
    source = key.source()
    built = build(source, headers())
    facts = {x: getattr(built, x) for x in ("registers", "spill_bytes", "serialised")}
    config = {"spec": str(key.spec), "config": asdict(key.config), "built": facts}
    try:
        cache.write(
            KIND,
            name,
            {
                SOURCE: source,
                "kernel.cubin": built.cubin,
                "log": built.log,
                "config.json": json.dumps(config, indent=1),
            },
        )
    except OSError as error:
        log.warning("a kernel could not be cached and is built again next time: %s", error)
    return built


def _attempts(keys: Sequence[KeyT]) -> list[Built | str]:
    """Each one built, or why not, side by side: NVRTC does not hold the interpreter's lock."""

    def attempt(key: KeyT) -> Built | str:
        try:
            return load(key)
        except (BuildError, RuntimeError) as error:
            return str(error)[:2000]

    if len(keys) > 1:
        # RuntimeError where no thread can be started: too many, or Python is shutting down.
        with contextlib.suppress(RuntimeError):
            with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
                return list(pool.map(attempt, keys))
    return [attempt(x) for x in keys]


def load_all(keys: Sequence[KeyT]) -> dict[KeyT, Built]:
    """Those that build."""
    return {key: x for key, x in zip(keys, _attempts(keys)) if isinstance(x, Built)}


def load_first(keys: Sequence[KeyT], at_once: int = 1, at_first: int = 1) -> tuple[KeyT, Built]:
    """The first that builds without a spill; failing that, the one that spills least.

    at_once   how many are built side by side where the first spills
    at_first  how many are before that is known, where there is a processor for each

    Raises KernelBuildError where none builds.
    """
    found: list[tuple[KeyT, Built]] = []
    errors: list[str] = []
    at_first = max(1, min(at_first, os.cpu_count() or 1))
    later = (keys[i : i + at_once] for i in range(at_first, len(keys), at_once))
    groups = [keys[:at_first], *later]
    for group in groups:
        for key, built in zip(group, _attempts(group) if group else ()):
            if isinstance(built, str):
                errors.append(built)
            elif built.healthy:
                return key, built
            else:
                found.append((key, built))
    if not found:
        raise KernelBuildError("; ".join(errors) or "no tile fits these head dims")
    return min(found, key=lambda x: (x[1].serialised, x[1].spill_bytes))
