"""benchmarks/sm90_checks.py tells calls that failed from errors in memory."""

from benchmarks.sm90_checks import findings

LOG = """\
========= COMPUTE-SANITIZER
full 333 ok
========= Program hit CUDA_ERROR_NOT_FOUND (error 500) due to "named symbol not found" on CUDA \
API call to cuModuleGetGlobal_v2.
=========     Saved host backtrace up to driver entry point at error
=========     Host Frame: [0x469065] in libcuda.so.1
=========
========= Invalid __global__ read of size 16 bytes
=========     at attention_fwd+0x1230
=========     by thread (1,0,0) in block (3,0,0)
=========     Address 0x7f0000 is out of bounds
========= Warning: Detected overlapping instrumentation
========= Program hit CUDA_ERROR_NOT_FOUND (error 500) due to "named symbol not found" on CUDA \
API call to cuModuleGetGlobal_v2.
========= ERROR SUMMARY: 3 errors
"""


def test_api_calls_are_told_from_memory_errors() -> None:
    found = {kind: dict(x) for kind, x in findings(LOG).items()}
    assert found == {
        "error": {"Invalid __global__ read of size 16 bytes": 1},
        "API call": {"cuModuleGetGlobal_v2: CUDA_ERROR_NOT_FOUND": 2},
        "warning": {"Warning: Detected overlapping instrumentation": 1},
    }


def test_a_clean_run_has_no_findings() -> None:
    log = (
        "========= COMPUTE-SANITIZER\nfull 333 ok\n========= RACECHECK SUMMARY: 0 hazards displayed"
    )
    assert not any(findings(log).values())
