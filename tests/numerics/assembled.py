"""Triton's kernels for GPUs that are not here, and what ptxas said when Triton ran it."""

from __future__ import annotations

import contextlib
import io
import re

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from fa3_compile.lower.binaries.assembler import sound_assembler


def assembled(source: ASTSource, arch: int, options: dict[str, object]) -> CompiledKernel:
    """The kernel for `arch` (90 is sm_90), by the ptxas that our launches take."""
    said = io.StringIO()
    with (
        knobs.nvidia.scope(),
        knobs.compilation.scope(),
        sound_assembler(arch),
        contextlib.redirect_stdout(said),
    ):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # a kernel of Triton's cache says nothing
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    kernel.ptxas_log = said.getvalue()
    return kernel


def spilled_bytes(kernel: CompiledKernel) -> int:
    found = re.findall(r"(\d+) bytes spill (?:stores|loads)", kernel.ptxas_log)
    assert found, kernel.ptxas_log
    return sum(map(int, found))
