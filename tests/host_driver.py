"""The host's side of a GPU on a machine without one, as strict as the real one.

`libcuda.so.1` is host_driver.cc, so that cuda-bindings and Triton are the real ones and refuse what
they refuse on a GPU. Tensors lie in the CPU's memory and say that they are on cuda:0 or cuda:1. A
kernel is a function of a shared library, or one that does nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C._dynamo import guards
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fa3_compile.lower import choose, dispatch
from fa3_compile.lower.bound import BindingKernel
from fa3_compile.lower.kernels import cuda_sm90_backward, cuda_sm90_lists, triton_backward

COMPILER = shutil.which("g++")
DEVICES = torch.device("cuda", 0), torch.device("cuda", 1)
DEVICE = DEVICES[0]
STREAM = 0x5EA
# What meets tensors of another device by right.
CROSSING = {"to", "copy_", "as_subclass", "__getitem__", "__setitem__"}
UNINITIALISED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def missing() -> str | None:
    """Why there can be no such driver here."""
    if COMPILER is None:
        return "no g++"
    if importlib.util.find_spec("cuda") is None or not importlib.util.find_spec("cuda.bindings"):
        return "no cuda-bindings"
    return "the driver of a GPU is loaded" if torch.cuda.is_available() else None


def shared_library(source: Path | str, to: Path, *options: str) -> Path:
    """C++ compiled by g++; a source is a file or text."""
    text = source.read_text() if isinstance(source, Path) else source
    command = [str(COMPILER), "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", *options]
    done = subprocess.run(
        [*command, "-x", "c++", "-", "-o", str(to)], input=text, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[:4000]
    return to


@functools.cache
def _library() -> ctypes.CDLL:
    """Whoever asks for libcuda.so.1 from now on gets the library that is loaded."""
    folder = Path(tempfile.mkdtemp(prefix="host_driver"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = Path(__file__).with_suffix(".cc")
    return ctypes.CDLL(
        str(shared_library(source, folder / "libcuda.so.1", "-Wl,-soname,libcuda.so.1"))
    )


def allocations() -> int:
    """Pieces of device memory that the driver has given and not got back."""
    return _library().host_driver_allocations()


def graphs_launched() -> int:
    return _library().host_driver_graphs_launched()


@contextlib.contextmanager
def captured() -> Iterator[None]:
    """Some thread captures a CUDA graph meanwhile, as torch.cuda.graph does; what would end that
    capture fails the test."""
    library = _library()
    library.host_driver_begin_capture()
    valid = False
    try:
        yield
    finally:
        valid = bool(library.host_driver_end_capture() & 1)
    assert valid, "the capture was ended"


class OnDevice(Tensor):
    """A tensor of the CPU that says it is on cuda:0."""

    gpu = 0
    device = property(lambda self: DEVICES[self.gpu])  # pyright: ignore
    is_cuda = property(lambda _: True)  # pyright: ignore

    def get_device(self) -> int:
        return self.gpu


class OnSecond(OnDevice):
    """One that says it is on cuda:1."""

    gpu = 1


GPUS = (OnDevice, OnSecond)


def on_device(tensors: Any, gpu: int = 0) -> Any:
    """A tensor, or a structure of them and of others, with its tensors on the device."""
    return pytree.tree_map_only(Tensor, lambda x: x.as_subclass(GPUS[gpu]), tensors)


def on_host(tensors: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.as_subclass(Tensor), tensors)


class Devices(TorchFunctionMode):
    """Makes "cuda" mean the CPU's memory, refuses operators on tensors of two devices and addresses
    of others, and leaves NaN in what is not initialised."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        gpus = {getattr(x, "gpu", None) for x in tensors if x.dim() or isinstance(x, OnDevice)}
        if len(gpus) > 1 and name not in CROSSING:
            raise RuntimeError(f"Expected all tensors to be on the same device: {name}")
        if name == "data_ptr" and gpus <= {None}:
            return -func(*args)  # aligned alike, and no address that a kernel's parameters take
        asked = [torch.device(x).index for x in leaves if _is_cuda(x)]
        args, kwargs = pytree.tree_map(lambda x: "cpu" if _is_cuda(x) else x, (args, kwargs or {}))
        found = func(*args, **kwargs)
        if name in UNINITIALISED and found.is_floating_point():
            found.fill_(float("nan"))
        if not asked or not isinstance(found, Tensor):
            return found
        return on_device(found, current_device() if asked[0] is None else asked[0])


def _is_cuda(x: object) -> bool:
    if isinstance(x, torch.device):
        return x.type == "cuda"
    return isinstance(x, str) and x.partition(":")[0] == "cuda"


@dataclass(frozen=True)
class _Properties:
    """torch.cuda.get_device_properties."""

    multi_processor_count: int = 132


def current_device() -> int:
    """That of this thread's context, as CUDA's runtime has it."""
    found = ctypes.c_int()
    return found.value if _library().cuCtxGetDevice(ctypes.byref(found)) == 0 else 0


class CurrentDevice:
    """torch.cuda.device, which sets no context where the device is current already."""

    def __init__(self, device: object) -> None:
        self.index = torch.cuda._utils._get_device_index(device)

    def __enter__(self) -> None:
        self.before = current_device()
        self._exchange(self.index)

    def __exit__(self, *_: object) -> None:
        self._exchange(self.before)

    def _exchange(self, index: int) -> None:
        if index != current_device():
            context = ctypes.c_void_p()
            refused = _library().cuDevicePrimaryCtxRetain(ctypes.byref(context), index)
            assert not refused, f"there is no device {index}"
            _library().cuCtxSetCurrent(context)


def stream_of(index: int) -> int:
    """The current stream of a device."""
    assert type(index) is int and index in (0, 1), f"a device index, got {index!r}"
    return STREAM | index << 16


def _empty_strided(shape, stride, dtype) -> Tensor:
    """With the checks of `_empty_strided_cuda`, and what nobody stored to is NaN."""
    found = guards._empty_strided_cpu(shape, stride, dtype)  # pyright: ignore
    found = found.fill_(float("nan")) if dtype.is_floating_point else found
    return on_device(found, current_device())


class Event:
    """torch.cuda.Event: the later of two, by the order of their records, is a millisecond later."""

    records = 0

    def __init__(self, enable_timing: bool = False) -> None:
        self.times = enable_timing
        self.at: int | None = None

    def record(self, stream: object = None) -> None:
        Event.records += 1
        self.at = Event.records

    def synchronize(self) -> None:
        assert _library().cuStreamSynchronize(None) == 0

    def elapsed_time(self, end: Event) -> float:
        assert self.times and end.times and self.at is not None and end.at is not None
        return float(end.at - self.at)


class _Launched(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("grid", 3 * ctypes.c_uint), ("threads", ctypes.c_uint),
                ("shared", ctypes.c_uint), ("stream", ctypes.c_uint64),
                ("device", ctypes.c_int)]  # fmt: skip


@dataclass(frozen=True)
class Launched:
    """One launch that the driver took."""

    name: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    stream: int
    device: int


@pytest.fixture
def launches(monkeypatch) -> Iterator[list[Launched]]:
    """The launches that a test makes, on a machine that seems to have a Hopper GPU."""
    if reason := missing():
        pytest.skip(reason)
    library, found = _library(), []

    def note(launched) -> None:
        x = launched.contents
        what = x.name.decode(), tuple(x.grid), x.threads, x.shared, x.stream, x.device
        found.append(Launched(*what))

    observer = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Launched))(note)
    library.host_driver_observe(observer)
    library.cuCtxSetCurrent(None)
    for name, value in (
        ("_cuda_getDevice", current_device),
        ("_cuda_getCurrentRawStream", stream_of),
        ("_cuda_getCurrentStream", lambda index: (STREAM | 1, index, 1)),  # of PyTorch's pools
        ("_cuda_isCurrentStreamCapturing", lambda: False),
    ):
        monkeypatch.setattr(torch._C, name, value, raising=False)
    monkeypatch.setattr(torch.cuda, "device", CurrentDevice)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _=None: _Properties())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "the host")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name, module in list(sys.modules.items()):
        if name.startswith("fa3_compile.") and hasattr(module, "empty_cuda"):
            monkeypatch.setattr(module, "empty_cuda", _empty_strided)
    # Nothing that is known of another device, and nothing that others would know of this one.
    for kernel in choose.kernels():
        if isinstance(kernel, BindingKernel):
            monkeypatch.setattr(kernel, "_bound", {})
    monkeypatch.setattr(cuda_sm90_backward, "_bound", {})
    monkeypatch.setattr(cuda_sm90_lists, "_kept", {})
    monkeypatch.setattr(triton_backward, "_launches", {})
    _forget()
    with Devices():
        yield found
    _forget()
    library.host_driver_observe(None)


def _forget() -> None:
    for cached in (dispatch._capability, dispatch.built, dispatch.built_backward):
        cached.cache_clear()


def kernels_of(source: str, to: Path) -> Path:
    """A library with the names of a CUDA source's kernels and globals, its kernels without
    effect."""
    names = re.findall(r'extern "C" __global__[^;{]*?\b(\w+)\s*\(const', source)
    text = "".join(f'extern "C" void {x}(const void*, unsigned, unsigned, unsigned, int) {{}}\n'
                   for x in names)  # fmt: skip
    return shared_library(f'extern "C" {{ int shared_bytes = 1024, counters[256]; }}\n{text}', to)


@pytest.fixture
def triton_driver(launches, monkeypatch) -> Iterator[None]:
    """Triton's own driver for NVIDIA GPUs on that libcuda."""
    triton = pytest.importorskip("triton")
    from triton.backends.nvidia import driver

    folder = Path(_library()._name).parent
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(folder))
    nvidia = driver.CudaDriver()
    monkeypatch.setattr(nvidia, "get_current_device", current_device)
    monkeypatch.setattr(nvidia, "get_device_capability", lambda _=0: (9, 0))
    monkeypatch.setattr(nvidia, "get_current_stream", stream_of)
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(nvidia)
    yield
    triton.runtime.driver._active = before
