"""What the kernels of a stream tell the host without its waiting for them.

A word of the host's memory for each stream, in which a kernel leaves the number that it was given.
Numbers are given once in a process: an answer that comes late is nobody else's.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
from collections.abc import Iterator

from fa3_compile.lower.launch.launch_cuda import beside_captures, driver, ensure_context, lasts
from fa3_compile.lower.launch.stream_scratch import STREAMS

LINE = 128  # bytes of a stream, so that none of them waits for another's
NOTHING = 2**64 - 1  # what is there at first

numbers: Iterator[int] = itertools.count(1)


class StreamReports(dict[int, tuple[int, memoryview]]):
    """Stream -> the address of its word, and the word as what is read. KeyError where it gets none.

    Not for a stream that is being captured: a replay would tell again what was asked only once.
    """

    def __init__(self, device: int) -> None:
        super().__init__()
        self._device, self._lock, self._base = device, threading.Lock(), 0

    def __missing__(self, stream: int) -> tuple[int, memoryview]:
        with self._lock:
            if stream not in self:
                if len(self) >= STREAMS or not lasts(stream):
                    raise KeyError(stream)
                self._base = self._base or self._allocated()
                if not self._base:
                    raise KeyError(stream)
                address = self._base + LINE * len(self)
                word = ctypes.c_uint64.from_address(address)
                word.value = NOTHING
                self[stream] = address, memoryview(word).cast("B").cast("Q")
            return self[stream]

    def _allocated(self) -> int:
        """Memory of the host that has the same address on the device; 0 where there is none left.
        It is never freed: the last kernel to write there may run when everything else is gone."""
        ensure_context(self._device)
        cu = driver()
        flags = cu.CU_MEMHOSTALLOC_PORTABLE | cu.CU_MEMHOSTALLOC_DEVICEMAP
        with beside_captures():
            status, address = cu.cuMemHostAlloc(LINE * STREAMS, flags)
        return int(address) if status is cu.CUresult.CUDA_SUCCESS else 0


@functools.cache
def stream_reports(device: int) -> StreamReports:
    """Those of a device of this process."""
    return StreamReports(device)
