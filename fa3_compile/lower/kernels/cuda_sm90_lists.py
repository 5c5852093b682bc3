"""Lists of blocks that depend on lengths alone: made once, and kept for all later calls."""

from __future__ import annotations

import threading

import torch

from fa3_compile.lower.kernels.cuda_sm90_backward_parameters import BackwardParameters
from fa3_compile.lower.kernels.cuda_sm90_forward_parameters import ForwardParameters
from fa3_compile.lower.launch.launch_cuda import beside_captures, checked, driver
from fa3_compile.spec.blocks import may_have_holes

# What all kept lists may take of a device's memory, in bytes.
LARGEST = 64 * 2**20
# What decides lists, and the device they are on -> (where they are, bytes). Once made they are
# never freed: a CUDA graph may hold them.
_kept: dict[tuple, tuple[int, int]] = {}
_lock = threading.Lock()


def kept_lists(parameters: ForwardParameters | BackwardParameters, device: int) -> int:
    """The address of the lists of a call; 0 where each call has to make its own: because tensors
    decide them, there is no room for more, or a CUDA graph is being captured."""
    mask = parameters.spec.mask
    if not parameters.map_kind or not may_have_holes(mask):
        return 0
    lengths = (parameters.queries, parameters.keys, *parameters.sizes)
    decided_by = (mask, parameters.list_shape, lengths, device)
    with _lock:
        if decided_by not in _kept:
            bytes_ = parameters.list_shape.bytes
            taken = sum(n for where, (_, n) in _kept.items() if where[-1] == device)
            if taken + bytes_ > LARGEST or torch.cuda.is_current_stream_capturing():
                return 0
            _kept[decided_by] = _made(parameters, device), bytes_
        return _kept[decided_by][0]


def _made(parameters: ForwardParameters | BackwardParameters, device: int) -> int:
    """The address of new lists. Not of PyTorch's pools: memory of a graph's pool may not outlive
    the graph's own tensors."""
    with beside_captures():
        address = int(checked(driver().cuMemAlloc(parameters.list_shape.bytes)))
        addresses = [address if x == "lists" else 0 for x in parameters.names]
        addresses += [x.data_ptr() for x in parameters.aux]
        stream = torch._C._cuda_getCurrentRawStream(device)
        try:
            parameters.block_map()(stream, addresses)
            checked(driver().cuStreamSynchronize(stream))  # the next call may be on another stream
        except BaseException:
            driver().cuMemFree(address)
            raise
    return address
