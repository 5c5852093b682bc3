"""CUDA source -> cubin with NVRTC, and what the compiler said about it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

OPTIONS = (
    "--std=c++20",
    "--device-as-default-execution-space",
    "--ptxas-options=-v",
    "--no-source-include",
)
# ptxas: wgmma serialised (C7508 is "setmaxnreg ignored", C7510 and its neighbours the products).
SERIALISED = re.compile(r"C75\d\d|setmaxnreg ignored|wgmma.*serialized", re.IGNORECASE)


class BuildError(RuntimeError):
    """NVRTC refused a source. `log` is its output, `source` the text that was given."""

    def __init__(self, log: str, source: str):
        super().__init__(f"NVRTC could not compile a generated kernel:\n{log}")
        self.log = log
        self.source = source


@dataclass(frozen=True)
class Built:
    """A compiled kernel and the resources it takes."""

    cubin: bytes
    log: str
    registers: int
    spill_bytes: int
    serialised: bool

    @property
    def healthy(self) -> bool:
        """No spill and no serialised matrix product."""
        return self.spill_bytes == 0 and not self.serialised


def read_headers(root: Path) -> dict[str, str]:
    """Include name -> text of every header under `root` (kernels/)."""
    names = {path: path.relative_to(root) for path in sorted(root.rglob("*.cuh"))}
    return {str(name).removeprefix("include/"): path.read_text() for path, name in names.items()}


def build(source: str, headers: dict[str, str], arch: str = "sm_90a") -> Built:
    """Compile for `arch`; needs no GPU.

    Raises BuildError with the compiler's log.
    """
    from cuda.bindings import nvrtc

    def check(result):
        status, *values = result
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"NVRTC call failed: {status.name}")
        return values[0] if values else None

    program = check(
        nvrtc.nvrtcCreateProgram(
            source.encode(),
            b"attention.cu",
            len(headers),
            [text.encode() for text in headers.values()],
            [name.encode() for name in headers],
        )
    )
    try:
        options = [option.encode() for option in (f"--gpu-architecture={arch}", *OPTIONS)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        size = check(nvrtc.nvrtcGetProgramLogSize(program))
        raw = b" " * size
        check(nvrtc.nvrtcGetProgramLog(program, raw))
        log = raw.decode(errors="replace").strip("\0 \n")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise BuildError(log, source)
        cubin = b" " * check(nvrtc.nvrtcGetCUBINSize(program))
        check(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    registers = max((int(n) for n in re.findall(r"Used (\d+) registers", log)), default=0)
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    return Built(cubin, log, registers, spills, bool(SERIALISED.search(log)))
