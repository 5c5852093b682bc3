"""Machine code of sm_90, as nvdisasm prints it, and what is wrong with it: wgmma descriptors, and
shared memory that is given back too early."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

# What a wgmma descriptor's high word is: the swizzle, and the stride of 8 rows in 16 bytes.
HIGH_WORDS = {0x40000040, 0x80000020, 0xC0000010}
UNKNOWN = "unknown"
Value = int | str


def instructions(cubin: bytes, folder: Path) -> list[str]:
    from triton import knobs

    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [knobs.nvidia.nvdisasm.path, "-c", str(file)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = (re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?) ;", line) for line in printed.splitlines())
    return [x[1] for x in found if x is not None]


def wrong_descriptors(code: list[str]) -> list[str]:
    """The products whose second descriptor has a high word that was added up from registers that
    hold something else: uniform registers are followed in the order of the code."""
    registers: dict[str, Value] = {"URZ": 0}
    wrong = []
    for line in code:
        line = re.sub(r"^@!?U?P\d+ ", "", line)
        if "HGMMA" in line:
            place = re.search(r"gdesc\[UR(\d+)\]", line)
            assert place is not None
            high = registers.get(f"UR{int(place[1]) + 3}", UNKNOWN)
            if high == "sum" or (isinstance(high, int) and high not in HIGH_WORDS):
                wrong.append(line)
            continue
        name, _, rest = line.partition(" ")
        operands = [x.strip().removesuffix(".reuse") for x in rest.split(",")]
        if operands[0].startswith("UR"):
            _follow(registers, name, operands)
    return wrong


def _follow(registers: dict[str, Value], name: str, operands: list[str]) -> None:
    target = operands[0]
    after = f"UR{int(target[2:]) + 1}" if target != "URZ" else target
    if name == "UMOV":
        registers[target] = _value(registers, operands[1])
    elif name == "UIADD3.X":
        one, other = (_value(registers, x) for x in operands[1:3])
        if isinstance(one, int) and isinstance(other, int):
            registers[target] = (one + other) & 0xFFFFFFFF
        else:
            registers[target] = "sum"
    elif name == "UIADD3.64":
        source = operands[1]
        high = registers.get(f"UR{int(source[2:]) + 1}", UNKNOWN) if source != "URZ" else 0
        is_constant = isinstance(_value(registers, operands[2]), int)
        registers[target], registers[after] = UNKNOWN, high if is_constant else UNKNOWN
    else:
        registers[target] = UNKNOWN
        if "WIDE" in name or ".64" in name:
            registers[after] = UNKNOWN
    registers["URZ"] = 0


def _value(registers: dict[str, Value], operand: str) -> Value:
    if operand.startswith("UR"):
        return registers.get(operand, UNKNOWN)
    try:
        return int(operand, 0) & 0xFFFFFFFF
    except ValueError:
        return UNKNOWN


def given_back_early(code: list[str]) -> list[str]:
    """The arrivals at a barrier behind an ldmatrix whose registers nothing has waited for yet, in the
    order of the code: what is loaded to its place next may overtake it. A fence waits for all."""
    waiting: list[set[str]] = []
    wrong = []
    for line in code:
        name, _, rest = re.sub(r"^@!?U?P\d+ ", "", line).partition(" ")
        if name.startswith("LDSM"):
            first = int(re.match(r"R(\d+)", rest)[1])  # pyright: ignore[reportOptionalSubscript]
            waiting.append({f"R{first + i}" for i in range(4)})
        elif name.startswith("FENCE.VIEW.ASYNC"):
            waiting = []
        elif name.startswith("SYNCS.ARRIVE") and waiting:
            wrong.append(line)
        else:
            used = set(re.findall(r"(?<![A-Z])R\d+", rest))
            if name.startswith("HGMMA"):
                used |= {
                    f"R{int(x) + i}"
                    for x in re.findall(r"(?<![A-Z])R(\d+)", rest)
                    for i in range(4)
                }
            waiting = [x for x in waiting if not x & used]
    return wrong
