"""The ptxas that assembles Triton's kernels for Hopper.

Triton 3.6 and 3.7 use ptxas 12.8 there, which reads registers that nothing has written where it
steps through a wgmma descriptor of less than 128 bytes' swizzle (a panel of less than 64 columns:
head dims 96, 80, 40): its constants are negative numbers of 64 bits. Such a product reads other
addresses: on an H100 whole panels of outputs and gradients were wrong. 12.9 and 13.0 do not. Triton
3.9 uses the 12.9 that it brings for Blackwell on Hopper too, and so do we.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fa3_compile.lower.choose import KernelBuildError

HOPPER = 90
SOUND = (12, 9)


@contextmanager
def sound_assembler(arch: int) -> Iterator[None]:
    """What Triton compiles inside it for `arch` (90 is sm_90) is not assembled by ptxas 12.8.

    Raises KernelBuildError where there is no other ptxas.
    """
    if arch != HOPPER:
        yield
        return
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    if version(get_ptxas(arch)) >= SOUND:
        yield
        return
    other = knobs.nvidia.ptxas_blackwell
    if version(other) < SOUND:
        raise KernelBuildError(
            f"ptxas {get_ptxas(arch).version} miscompiles Hopper's matrix products; set "
            "TRITON_PTXAS_PATH to one of CUDA 12.9 or newer"
        )
    with knobs.nvidia.scope():
        knobs.nvidia.ptxas = other.path
        yield


def version(tool) -> tuple[int, ...]:
    return tuple(int(x) for x in tool.version.split("."))
