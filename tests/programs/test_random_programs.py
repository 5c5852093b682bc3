"""Random attention programs: eager's numbers and gradients, and no fusion of what is no attention.

`FA3_RANDOM_PROGRAMS=5000 pytest tests/programs/test_random_programs.py` runs more of them.
benchmarks/coverage/random_programs.py runs many thousand and keeps a summary.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, note, seed, settings

from tests.programs.check import check_program
from tests.programs.grammar import programs
from tests.programs.program import Program

COUNT = int(os.environ.get("FA3_RANDOM_PROGRAMS", "200"))
# So that workers share them.
PARTS = 8


@pytest.mark.parametrize("part", range(PARTS))
def test_random_programs(part: int) -> None:
    @seed(part)
    @settings(
        max_examples=-(-COUNT // PARTS),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(programs())
    def check(program: Program) -> None:
        note(repr(program))
        check_program(program)

    check()
