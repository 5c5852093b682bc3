"""Random attention programs: eager's numbers and gradients, and no fusion of what is no attention.

`FA3_RANDOM_PROGRAMS=5000 pytest tests/graph/test_random_programs.py` runs more of them.
"""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, given, note, settings

from tests.graph.harness import check, specs
from tests.graph.programs import Program, programs

COUNT = int(os.environ.get("FA3_RANDOM_PROGRAMS", "60"))

# "weights-free" is a mutation that could not be made: the program is attention still.
STILL_ATTENTION = ("", "weights-free")


@settings(
    max_examples=COUNT,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(programs())
def test_random_program(program: Program) -> None:
    note(repr(program))
    torch._dynamo.reset()
    report = check(program.function, *program.arguments)
    note(specs(report))
    fused = [region for region in report.regions if region.fused]
    if program.mutant in STILL_ATTENTION:
        assert len(fused) == 1, f"{program}: {specs(report)}"
    else:
        assert not fused, f"{program}: {specs(report)}"
