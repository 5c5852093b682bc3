"""A compiled Triton kernel as a launch of the CUDA driver.

Triton's own launcher looks at every argument of every call: 17 us for the 25 of a forward kernel,
where the driver is given a finished list of parameters in 0.3.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from fa3_compile.lower.launch_cuda import Launch, driver

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
