"""The kernels of a call that follow each other, as one launch: a CUDA graph whose parameters are
set anew in each call.

Two cuLaunchKernel take 12.6 us on the host of an H100, to set the parameters of two nodes and to
launch their graph takes 5.6. A graph that is launched again waits for itself, whatever the stream:
each belongs to one stream, and calls on others launch their kernels one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fa3_compile.lower.choose import KernelBuildError
from fa3_compile.lower.launch_cuda import Block, Launch, beside_captures, checked, driver

# As the driver's CUDA_KERNEL_NODE_PARAMS calls what Launch.arguments has in this order.
ARGUMENTS = (
    "func", "gridDimX", "gridDimY", "gridDimZ", "blockDimX", "blockDimY", "blockDimZ",
    "sharedMemBytes",
)  # fmt: skip


class LaunchGraph(NamedTuple):
    """Kernels one after the other, whose parameters are copied from their blocks when they are set.

    stream      the handle of the one that it is launched on; -1 where there is no graph
    executable  what is launched
    nodes       of each kernel its node, and what it is set to, one behind the other
    """

    stream: int
    executable: Any
    nodes: tuple[Any, ...]


def launch_graph(launches: Sequence[Launch], blocks: Sequence[Block], stream: int) -> LaunchGraph:
    """The graph of the current context. It is never destroyed, as the kernels are not: it may be
    running when nothing holds it any more."""
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
            executable = checked(cu.cuGraphInstantiate(graph, 0))
    except KernelBuildError:  # by a driver that makes no graphs of such kernels
        return LaunchGraph(-1, None, (None,) * 2 * len(launches))
    return LaunchGraph(stream, executable, tuple(nodes))
