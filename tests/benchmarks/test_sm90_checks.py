"""benchmarks/kernels/sm90_checks.py and sanitizer.py: what their findings say, and what was not reached."""

import subprocess
import sys
import time

from benchmarks.kernels.sanitizer import findings
from benchmarks.kernels.sm90_checks import Shard, finish

LOG = """\
========= COMPUTE-SANITIZER
full 333 ok
========= Program hit CUDA_ERROR_NOT_FOUND (error 500) due to "named symbol not found" on CUDA \
API call to cuModuleGetGlobal_v2.
=========     Saved host backtrace up to driver entry point at error
=========     Host Frame: [0x469065] in libcuda.so.1
=========         Host Frame: find in driver.cpp:7 [0x9] in driver.cpython-312-x86_64-linux-gnu.so
=========         Host Frame: main [0x1d90] in libc.so.6
=========
========= Invalid __global__ read of size 16 bytes
=========     at void attention_fwd<float>(int)+0x1230
=========     by thread (1,0,0) in block (3,0,0)
=========     Address 0x7f0000 is out of bounds
========= Warning: Detected overlapping instrumentation
========= Program hit CUDA_ERROR_NOT_FOUND (error 500) due to "named symbol not found" on CUDA \
API call to cuModuleGetGlobal_v2.
========= Target application returned an error
========= ERROR SUMMARY: 3 errors
"""


def test_api_calls_are_told_from_memory_errors() -> None:
    found = {kind: dict(x) for kind, x in findings(LOG).items()}
    call = "cuModuleGetGlobal_v2: CUDA_ERROR_NOT_FOUND"
    assert found == {
        "error": {"Invalid __global__ read of size 16 bytes at attention_fwd": 1},
        "ordered": {},
        "API call": {f"{call} from driver.cpython-312-x86_64-linux-gnu.so": 1, call: 1},
        "warning": {"Warning: Detected overlapping instrumentation": 1},
    }


def races(*accesses: str) -> dict[str, int]:
    """How many of a race's accesses are of which kind."""
    lines = [f"========= Error: Race reported between {accesses[0]}"]
    lines += [f"=========     and {x} [256 hazards]" for x in accesses[1:]]
    return {kind: sum(x.values()) for kind, x in findings("\n".join(lines)).items() if x}


def test_accesses_that_mbarriers_order_are_told_from_races() -> None:
    copy = "Write access at fa3::bulk_load(unsigned int, const void *, int)+0x94e0 in tma.cuh:36"
    read = "Read access at fa3::load_shared(float *, unsigned int)+0x1ad0 in fragment.cuh:57"
    give = "Write access at fa3::store_words(unsigned int)+0x6fd0 in fragment.cuh:67"
    take = "Read access at fa3::load_words(unsigned int *)+0x2300 in fragment.cuh:73"
    look = "Read access at fa3::TileRing::look() const+0x610 in /work/fa3/tile_ring.cuh:27"
    tell = (
        "Write access at fa3::TileRing::publish(const fa3::TileCoord &)+0x8710 in tile_ring.cuh:16"
    )
    assert races(copy, read) == races(read, copy) == races(take, give) == {"ordered": 1}
    assert races(look, tell) == {"ordered": 1}
    assert races(copy, read, look, read) == {"ordered": 2, "error": 1}
    for race in ((give, read), (copy, take), (copy, copy), (look, give), (tell, read)):
        assert races(*race) == {"error": 1}
    assert races(copy) == races("Write access at") == {"error": 1}
    assert races("Write access at attention_bwd+0x10", "Read access at 0x20") == {"error": 1}


def test_a_clean_run_has_no_findings() -> None:
    log = (
        "========= COMPUTE-SANITIZER\nfull 333 ok\n========= RACECHECK SUMMARY: 0 hazards displayed"
    )
    assert not any(findings(log).values())


def test_what_a_process_has_not_said_is_wrong(tmp_path) -> None:
    def shard(program: str, seconds: float = 60.0) -> Shard:
        log = tmp_path / "log"
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=log.open("w"), start_new_session=True
        )
        found = Shard("once0", ["forward: full", "triton: sink"], log, process)
        assert finish([found], time.monotonic() + seconds) == len(found.wrong())
        return found

    assert shard("while True: pass", 0.0).wrong().keys() == {"forward: full", "triton: sink"}
    both = "print('forward: full -> ok'); print('triton: sink -> {}')"
    assert shard(both.format("ok")).wrong() == {}
    assert shard(both.format("dq off")).wrong() == {"triton: sink": "dq off"}
    assert shard("print('forward: full -> ok')").wrong() == {"triton: sink": "not reached"}
    assert shard(both.format("ok") + "; exit(3)").wrong()["exit"].startswith("3: forward")
