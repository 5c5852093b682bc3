"""Device memory for what a call leaves itself from one kernel to the next, kept for each stream.

The calls on a stream follow each other, so that one piece serves them all, whatever their shapes;
PyTorch's allocator takes 1.1 us a call. The memory is the driver's, not of PyTorch's pools: a pool
that belongs to CUDA graphs must hold nothing that outlives them.
"""

from __future__ import annotations

import functools
import threading

from fa3_compile.lower.launch.launch_cuda import beside_captures, driver, ensure_context, lasts

# Shapes with more take so long on the device that the time of an allocation is hidden.
BYTES = 2**20
# Streams of a device that have memory of their own; PyTorch deals out 65.
STREAMS = 128


class StreamScratch(dict[int, list[int]]):
    """Stream -> the address of its memory; an empty list while a thread is using it.

    A thread pops the address, queues its kernels and appends it again. LookupError where another
    thread has it or the stream gets none: the call then allocates as it likes. Not for a stream
    that is being captured: the graph may be replayed beside anything.
    """

    def __init__(self, device: int) -> None:
        super().__init__()
        self._device, self._lock = device, threading.Lock()

    def __missing__(self, stream: int) -> list[int]:
        with self._lock:
            if stream not in self:
                if len(self) >= STREAMS or not lasts(stream):
                    raise KeyError(stream)
                self[stream] = self._allocated()
            return self[stream]

    def _allocated(self) -> list[int]:
        ensure_context(self._device)
        with beside_captures():
            status, address = driver().cuMemAlloc(BYTES)
        return [int(address)] if status is driver().CUresult.CUDA_SUCCESS else []


@functools.cache
def stream_scratch(device: int) -> StreamScratch:
    """That of a device of this process."""
    return StreamScratch(device)
