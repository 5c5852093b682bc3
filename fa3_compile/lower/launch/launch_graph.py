"""The kernels of a call that follow each other, as one launch: a CUDA graph whose parameters are
set anew in each call.

Two cuLaunchKernel take 12.6 us on the host of an H100, to set the parameters of two nodes and to
launch their graph takes 5.6. A graph that is launched again waits for itself, whatever the stream:
so each belongs to one stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fa3_compile.lower.choose import KernelBuildError
from fa3_compile.lower.launch.launch_cuda import (
    Block,
    Launch,
    beside_captures,
    checked,
    driver,
    lasts,
)

# Kernels of a graph. One alone would cost the device 0.4 us where another kernel follows it.
LEAST = 2
# As the driver's CUDA_KERNEL_NODE_PARAMS calls what Launch.arguments has in this order.
ARGUMENTS = (
    "func", "gridDimX", "gridDimY", "gridDimZ", "blockDimX", "blockDimY", "blockDimZ",
    "sharedMemBytes",
)  # fmt: skip


class OfStreams(dict[int, list]):
    """Stream -> the parameters, with a graph of them, that no thread is using. Streams that may be
    destroyed have one list."""

    def __missing__(self, stream: int) -> list:
        return self.setdefault(stream if lasts(stream) else -1, [])


def launch_graph(launches: Sequence[Launch], blocks: Sequence[Block], stream: int) -> list[Any]:
    """A graph of the kernels one after the other, in the current context, then of each kernel its
    node and what that is set to: its parameters are copied from its block. Nothing but None where
    the kernels are to be launched one by one: while the stream is captured, or may be destroyed.

    The graph is never destroyed, as the kernels are not: it may be running when nothing holds it.
    """
    none = [None] * (1 + 2 * len(launches))
    if torch._C._cuda_isCurrentStreamCapturing() or not lasts(stream):
        return none
    cu = driver()
    nodes: list[Any] = []
    try:
        with beside_captures():
            graph = checked(cu.cuGraphCreate(0))
            for launch, block in zip(launches, blocks):
                values = cu.CUDA_KERNEL_NODE_PARAMS()
                for name, value in zip(ARGUMENTS, launch.arguments):
                    setattr(values, name, value)
                values.kernelParams = block.pointer
                before = nodes[-2:-1]
                node = checked(cu.cuGraphAddKernelNode(graph, before, len(before), values))
                nodes += [node, values]
            return [checked(cu.cuGraphInstantiate(graph, 0)), *nodes]
    except KernelBuildError:  # by a driver that makes no graphs of such kernels
        return none
