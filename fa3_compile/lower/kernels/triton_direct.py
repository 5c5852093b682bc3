"""A compiled Triton kernel as a launch of the CUDA driver.

Triton's own launcher looks at every argument of every call: 17 us for the 25 of a forward kernel,
where the driver is given a finished list of parameters in 0.3.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fa3_compile.lower.launch.launch_cuda import Launch, driver, empty_cuda

# What a place in the parameters is called that points to Triton's scratch memory.
SCRATCH = "global_scratch"
FORMATS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q",
           "u1": "?", "u8": "B", "u16": "H", "u32": "I", "u64": "Q"}  # fmt: skip


def direct(compiled: Any, programs: int, values: Mapping[str, Any]) -> Launch | None:
    """The launch of a CompiledKernel, whose places are called as its pointers are.

    values  of its integer parameters

    None where it takes what only Triton's own launcher knows how to give.
    """
    facts = compiled.metadata
    special = ("launch_pdl", "launch_cooperative_grid", "profile_scratch_size")
    if facts.num_ctas != 1 or any(getattr(facts, x, 0) for x in special):
        return None
    content, places = b"", []
    for name, kind in compiled.src.signature.items():
        if kind == "constexpr":
            continue
        if isinstance(kind, str) and kind.startswith("*"):
            places.append((len(content), name, 0))
            content += bytes(8)
        elif kind in FORMATS:
            content += struct.pack(f"<{FORMATS[kind]}", values[name]).ljust(8, b"\0")
        else:
            return None
    if facts.global_scratch_size:
        places.append((len(content), SCRATCH, 0))
    content += bytes(16)  # the scratch memory of tensor descriptors, and that of a profiler
    return Launch(
        driver().CUfunction(compiled.function), (programs, 1, 1), 32 * facts.num_warps,
        facts.shared, content, places, names=[x for _, x, _ in places],
        starts=range(0, len(content), 8), keeps=compiled,
    )  # fmt: skip


def on_tensors(
    launch: Launch | None,
    compiled: Any,
    runner: Any,
    programs: int,
    device: torch.device,
    integers: Sequence[int],
) -> Callable[[Sequence[Tensor]], None]:
    """What launches a CompiledKernel on tensors in the order of its pointers, on the current stream
    of their device: `launch` where `direct` gave one, otherwise Triton's `runner`, which takes the
    rest of the kernel's arguments too."""
    index, scratch = device.index, programs * compiled.metadata.global_scratch_size
    raw_stream = torch._C._cuda_getCurrentRawStream

    def run(tensors: Sequence[Tensor]) -> None:
        if torch._C._cuda_getDevice() != index:
            with torch.cuda.device(index):
                return run(tensors)
        stream, addresses = raw_stream(index), [x.data_ptr() for x in tensors]
        if launch is None:
            if scratch:
                _allow_scratch()
            runner(*addresses, *integers, stream=stream)
        elif scratch:
            words = empty_cuda((-(-scratch // 4),), (1,), torch.int32)
            launch(stream, [*addresses, words.data_ptr()])
        else:
            launch(stream, addresses)

    return run


def _allow_scratch() -> None:
    """Tensor descriptors made in a kernel live in global memory that the host allocates."""
    import triton

    triton.set_allocator(_scratch)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, device="cuda", dtype=torch.int8)
