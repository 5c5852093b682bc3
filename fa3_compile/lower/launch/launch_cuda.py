"""The CUDA driver through cuda-bindings: modules, tensor maps, parameters and launches."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo import guards

from fa3_compile.lower.choose import KernelBuildError
from fa3_compile.runtime.launch import make_room

MAP_BYTES = 128
LARGEST = 1024  # tensor maps that are kept
COUNTERS = 256  # of a module: templates/cuda/attention_fwd.cu.jinja


@functools.cache
def driver() -> Any:
    """cuda-bindings' driver API, imported on first use."""
    return importlib.import_module("cuda.bindings.driver")


def checked(result: tuple) -> Any:
    """The values of a driver call; KernelBuildError names what failed."""
    status, *values = result
    if status.value != 0:
        raise KernelBuildError(f"the CUDA driver says {status.name}")
    return values[0] if len(values) == 1 else values


def ensure_context(device: int) -> None:
    """Gives this thread the context of a device, as CUDA's runtime does when it is first called.

    One of autograd's threads, or a server's, may get here before that: tensors come from PyTorch's
    cache, and the current device is 0 without a call.
    """
    cu = driver()
    if not int(checked(cu.cuCtxGetCurrent())):
        context = checked(cu.cuDevicePrimaryCtxRetain(checked(cu.cuDeviceGet(device))))
        checked(cu.cuCtxSetCurrent(context))


@contextlib.contextmanager
def beside_captures() -> Iterator[None]:
    """Lets this thread allocate, load and wait while a CUDA graph is being captured, which such
    calls would end, whichever thread is capturing (CUDA driver API, stream capture modes)."""
    cu = driver()
    relaxed = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = checked(cu.cuThreadExchangeStreamCaptureMode(relaxed))
    try:
        yield
    finally:
        checked(cu.cuThreadExchangeStreamCaptureMode(before))


def lasts(stream: int) -> bool:
    """Whether the current stream, whose handle this is, is never destroyed: PyTorch's own are not.

    CUDA gives the handle of a destroyed one to the next, which may run beside what is left of it:
    what is kept by handle would be both streams'. Of PyTorch's ids those of its pools are odd, and
    that of another stream is its handle (c10/cuda/CUDAStream.cpp).
    """
    number, *_ = torch._C._cuda_getCurrentStream(torch._C._cuda_getDevice())
    return stream == 0 or number % 2 == 1


class Counters(dict[int, int]):
    """Stream -> address of an int of a module that is zero between the launches on this stream."""

    def __init__(self, address: int) -> None:
        super().__init__()
        self._address, self._lock = address, threading.Lock()

    def __missing__(self, stream: int) -> int:
        with self._lock:  # two streams that two threads meet at once have a counter each
            if stream in self:
                return self[stream]
            if len(self) >= COUNTERS or not lasts(stream):
                raise KeyError(stream)
            return self.setdefault(stream, self._address + 4 * len(self))


@dataclass(frozen=True)
class Module:
    """A cubin in the current context, its kernels by name, and the attention's shared memory."""

    handle: Any
    shared_bytes: int
    counters: Counters

    def counter(self, stream: int) -> tuple[int, torch.Tensor | None]:
        """The address of an int that is zero between launches, and what has to be held until the
        last launch: nothing where it is the stream's own, whose launches follow each other.

        A graph that is being captured may be replayed beside anything: it has, and clears, its own.
        """
        if not torch._C._cuda_isCurrentStreamCapturing():
            with contextlib.suppress(KeyError):
                return self.counters[stream], None
        own = torch.zeros(1, dtype=torch.int32, device="cuda")
        return own.data_ptr(), own

    def kernel(self, name: str) -> Any:
        return checked(driver().cuModuleGetFunction(self.handle, name.encode()))


def load_module(cubin: bytes, attention: str = "attention_fwd") -> Module:
    """Loads a cubin of templates/cuda/<attention>.cu.jinja into the current context."""
    host = bytearray(4)
    with beside_captures():
        handle = checked(driver().cuModuleLoadData(cubin))
        address, _ = checked(driver().cuModuleGetGlobal(handle, b"shared_bytes"))
        checked(driver().cuMemcpyDtoH(host, address, 4))
    counters, _ = checked(driver().cuModuleGetGlobal(handle, b"counters"))
    module = Module(handle, struct.unpack("i", host)[0], Counters(int(counters)))
    attribute = driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver().cuFuncSetAttribute(module.kernel(attention), attribute, module.shared_bytes))
    return module


# What a kernel's parameters may point to, beside the captured tensors.
NAMES = ("q", "k", "v", "out", "lse", "counter", "scratch", "lists", "report", "number")
# (offset in the parameters, a name or the number of a captured tensor, bytes to add): where an
# address of a call belongs.
Place = tuple[int, "str | int", int]


class Block(NamedTuple):
    """A kernel's parameters in memory, which one launch at a time may use: the driver copies them
    while it launches, without the interpreter's lock.

    words    the memory
    pointer  of the array of pointers that cuLaunchKernel takes
    array    that array
    """

    words: memoryview
    pointer: int
    array: Any


class Launch:
    """One kernel, its grid and its parameters.

    content  the parameters one after the other, a multiple of 8 bytes
    places   where the addresses of a call belong; a name is one of `names`
    starts   where in `content` each parameter begins
    keeps    what has to live as long as the kernel
    """

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        threads: int,
        shared: int,
        content: bytes,
        places: Sequence[Place],
        names: Sequence[str] = NAMES,
        starts: Sequence[int] = (0,),
        keeps: Any = None,
    ) -> None:
        self.content, self.places, self.starts, self.keeps = content, places, starts, keeps
        self.arguments: tuple[Any, ...] = (kernel, *grid, threads, 1, 1, shared)
        self._block = self.block({})
        at = [(n // 8, names.index(x) if isinstance(x, str) else x + len(names), more)
              for n, x, more in places]  # fmt: skip
        self._copied = [(word, index) for word, index, more in at if not more]
        self._moved = [x for x in at if x[2]]
        self._launch = driver().cuLaunchKernel
        self._success = driver().CUresult.CUDA_SUCCESS
        self._lock = threading.Lock()

    def block(self, known: Mapping[str | int, int]) -> Block:
        """New parameters, the addresses that are `known` in their places."""
        storage = ctypes.create_string_buffer(len(self.content) + 64)
        start = -ctypes.addressof(storage) % 64
        view = memoryview(storage).cast("B")[start : start + len(self.content)]
        view[:] = self.content
        words = view.cast("Q")
        for at, name, more in self.places:
            if name in known:
                words[at // 8] = known[name] + more
        address = ctypes.addressof(storage) + start
        array = (ctypes.c_void_p * len(self.starts))(*(address + x for x in self.starts))
        return Block(words, ctypes.addressof(array), array)

    def renamed(self, names: Mapping[str | int, tuple[str | int, int]]) -> Launch:
        """The same launch of addresses that are called otherwise: (name, bytes to add)."""
        places = [(at, names[x][0], names[x][1] + more) for at, x, more in self.places]
        kernel, x, y, z, threads, _, _, shared = self.arguments
        grid = (x, y, z)
        return Launch(
            kernel, grid, threads, shared, self.content, places, NAMES, self.starts, self.keeps
        )

    def __call__(self, stream: int, addresses: Sequence[int]) -> None:
        """`addresses` in the order of the names, then the captured tensors."""
        words, pointer, _ = self._block
        with self._lock:
            for word, index in self._copied:
                words[word] = addresses[index]
            for word, index, more in self._moved:
                words[word] = addresses[index] + more
            (status,) = self._launch(*self.arguments, stream, pointer, 0)
            if status is not self._success:
                self.again(status, stream, pointer)

    def again(self, status: Any, stream: int, pointer: int) -> None:
        """After a launch that the driver refused: once more where this thread had no context.

        RuntimeError where that is not it.
        """
        if status is driver().CUresult.CUDA_ERROR_INVALID_CONTEXT:
            ensure_context(torch._C._cuda_getDevice())
            (status,) = self._launch(*self.arguments, stream, pointer, 0)
        if status is not self._success:
            raise RuntimeError(f"an attention kernel could not be launched: {status.name}")


def _empty_cuda(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="cuda")


# An uninitialised tensor on the current device, as Inductor's code allocates: without the
# dispatcher.
empty_cuda = getattr(guards, "_empty_strided_cuda", _empty_cuda)


def describable(x: Tensor) -> bool:
    """Whether a tensor map can describe it: last stride 1, the rest whole 16 bytes."""
    return (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and not any(s * x.itemsize % 16 for s, n in zip(x.stride()[:-1], x.shape) if n > 1)
    )


def tensor_map(
    x: Tensor, sizes: Sequence[int], strides: Sequence[int], box: tuple[int, int, int]
) -> bytes:
    """A 4-D map of a tensor of 16 bits or float32.

    sizes, strides  from the outermost axis in, in elements; the innermost stride is 1
    box             (heads, rows, columns) of a load; columns of 128 bytes, as its swizzle, 64 or 32

    The address is its first word, and may be any: callers put their tensor's there.
    """
    key = (x.dtype, tuple(sizes), tuple(strides), box)
    if key in _maps:
        return _maps[key]
    content = _encode(x.dtype, x.data_ptr(), sizes, strides, box)
    if not _encoding_is_known.is_set():
        moved = _encode(x.dtype, x.data_ptr() + 4096, sizes, strides, box)
        first, second = struct.pack("Q", x.data_ptr()), struct.pack("Q", x.data_ptr() + 4096)
        if content[:8] != first or moved != second + content[8:]:
            raise KernelBuildError("this driver encodes tensor maps in a way not known here")
        _encoding_is_known.set()
    make_room(_maps, LARGEST)
    _maps[key] = content
    return content


# Of another tensor's address: keys and values of a length mostly share one, queries of all.
_maps: dict[tuple, bytes] = {}
_encoding_is_known = threading.Event()


def _encode(dtype, address: int, sizes, strides, box: tuple[int, int, int]) -> bytes:
    cu = driver()
    width = max(8, -(-sizes[-1] // 8) * 8)
    # The stride of an axis of length 1 is arbitrary, and has to be a multiple of 16 bytes.
    steps = [s if n > 1 else width for s, n in zip(strides[:-1], sizes)]
    kind, *options = _map_options(dtype, box[2] * dtype.itemsize)
    encoded = checked(
        cu.cuTensorMapEncodeTiled(
            kind,
            4,
            address,
            [cu.cuuint64_t(n) for n in reversed(sizes)],
            [cu.cuuint64_t(dtype.itemsize * n) for n in reversed(steps)],
            [cu.cuuint32_t(n) for n in (*reversed(box), 1)],
            [cu.cuuint32_t(1)] * 4,
            *options,
        )
    )
    return ctypes.string_at(encoded.getPtr(), MAP_BYTES)


@functools.cache
def _map_options(dtype: torch.dtype, width: int) -> tuple[Any, ...]:
    """The element type, and what follows the strides; `width` of a box in bytes."""
    cu = driver()
    kinds, swizzles = cu.CUtensorMapDataType, cu.CUtensorMapSwizzle
    return (
        {
            torch.bfloat16: kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            torch.float16: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            torch.float32: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        }[dtype],
        cu.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        {
            128: swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
            64: swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
            32: swizzles.CU_TENSOR_MAP_SWIZZLE_32B,
        }[width],
        cu.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        cu.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
