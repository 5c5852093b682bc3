"""What can go wrong with the Hopper forward kernel beside its numbers, on a Hopper GPU.

    python benchmarks/sm90_checks.py repeat      a thousand runs of each sample, the same bits
    python benchmarks/sm90_checks.py sizes       empty axes, more than 2^31 elements
    python benchmarks/sm90_checks.py sanitize    compute-sanitizer's memcheck and racecheck
    python benchmarks/sm90_checks.py samples     each sample once, for the sanitizer

Inputs have NaN beside every row (tests/numerics/forms.py). Exits with 1 where anything is wrong.
"""

from __future__ import annotations

import collections
import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.sm90_dev import problem_of
from fa3_compile.lower.kernels.cuda_sm90 import CudaSm90
from fa3_compile.lower.kernels.reference import attention
from fa3_compile.spec.attention import AttentionSpec
from tests.numerics.forms import BY_NAME, Form, Shape, compare, inputs, shape_for

# Each part of the kernel once.
SAMPLES = (
    "full", "causal", "window", "softcap", "alibi", "dense bias", "left padding", "documents",
    "dense mask", "sink, filled", "window, added", "dropout, causal", "static cache",
)  # fmt: skip
BF16 = torch.bfloat16


def shapes(form: Form) -> list[Shape]:
    """Many queries, and a few of packed heads against keys that are dealt out."""
    many = shape_for(form, 64, 64, 333, 421, 2)
    return [many, Shape(1, 4, 1, 5, 1500, 128, 128)]


def samples() -> int:
    wrong = 0
    kernel = CudaSm90()
    for name in SAMPLES:
        form = BY_NAME[name]
        for shape in shapes(form):
            q, k, v, aux = inputs(form, shape, BF16, "cuda")
            problem = problem_of(form.spec(), q, k, v, aux)
            said = compare(form, *kernel.run(problem, q, k, v, aux, form.sizes), q, k, v, aux)
            # A module that a tool keeps from being loaded leaves the work to Triton.
            if next(reversed(kernel._bound.values())) is None:
                said = "another family ran"
            print(name, shape.q_len, said or "ok", flush=True)
            wrong += said is not None
    return wrong


def repeat(runs: int = 1000) -> int:
    wrong = 0
    kernel = CudaSm90()
    for name in SAMPLES:
        form = BY_NAME[name]
        for shape in shapes(form):
            q, k, v, aux = inputs(form, shape, BF16, "cuda")
            problem = problem_of(form.spec(), q, k, v, aux)
            first = [x.clone() for x in kernel.run(problem, q, k, v, aux, form.sizes)]
            differing = torch.zeros((), dtype=torch.int64, device="cuda")
            for _ in range(runs):
                for x, y in zip(kernel.run(problem, q, k, v, aux, form.sizes), first):
                    bits = torch.int16 if x.dtype == BF16 else torch.int32
                    differing += (x.view(bits) != y.view(bits)).sum()
            print(f"{name}, {shape.q_len} queries: {int(differing)} bits differ", flush=True)
            wrong += int(differing) > 0
    return wrong


def sizes() -> int:
    """Empty axes; then tensors beyond 2^31 elements, the last heads against float64."""
    wrong = 0
    kernel, spec = CudaSm90(), AttentionSpec.parse("attention(score=0.09*s)")

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=BF16)

    for q_shape, kv_shape in (
        ((0, 4, 5, 64), (0, 2, 7, 64)), ((2, 4, 0, 64), (2, 2, 7, 64)),
        ((2, 4, 5, 64), (2, 2, 0, 64)),
    ):  # fmt: skip
        q, k, v = made(*q_shape), made(*kv_shape), made(*kv_shape)
        out, lse = kernel.run(problem_of(spec, q, k, v, []), q, k, v, [], ())
        expected, expected_lse = attention(spec, q, k, v, [], ())
        same = torch.equal(out.isnan(), expected.isnan()) and torch.equal(
            out.nan_to_num(), expected.nan_to_num()
        )
        same = same and torch.equal(lse, expected_lse)
        print(f"q {q_shape}, k {kv_shape}: {'ok' if same else 'wrong'}", flush=True)
        wrong += not same
    for q_shape, kv_shape in (
        ((1, 64, 300_000, 128), (1, 64, 200, 128)), ((1, 64, 3, 128), (1, 64, 300_000, 128)),
        ((70, 64, 1, 128), (70, 8, 32_768, 128)),
    ):  # fmt: skip
        q, k, v = made(*q_shape), made(*kv_shape), made(*kv_shape)
        out, lse = kernel.run(problem_of(spec, q, k, v, []), q, k, v, [], ())
        rows = slice(-500, None)
        last = [x[-1:, -1:].double() for x in (q[:, :, rows], k, v)]
        exact, exact_lse = attention(spec, last[0], last[1], last[2], [], ())
        error = (out[-1:, -1:, rows] - exact).abs().max().item()
        off = (lse[-1:, -1:, rows] - exact_lse).abs().max().item()
        fine = error < 2e-2 * exact.abs().max().item() + 1e-3 and off < 2e-3
        largest = max(q.numel(), k.numel())
        print(
            f"{largest / 2**31:.2f} * 2^31 elements, {q_shape[2]} queries: error {error:.1e}, LSE "
            f"{off:.1e} {'ok' if fine else 'wrong'}", flush=True
        )  # fmt: skip
        wrong += not fine
        del q, k, v, out, lse
        torch.cuda.empty_cache()
    return wrong


# What memcheck says of a driver or runtime call that did not succeed. The caller may well expect
# that, as of a look-up that may find nothing: anything else is about memory.
API_CALL = re.compile(r"Program hit (\S+) .*on CUDA API call to (\w+)")
# The first line of a report has one space behind the bar, the others more.
REPORT = re.compile(r"========= (?! )(?!COMPUTE-SANITIZER|\w+ SUMMARY)(.+)")


def findings(log: str) -> dict[str, collections.Counter[str]]:
    """The reports in a sanitizer's log by their first lines: "API call" for calls that failed,
    "warning", and "error" for everything else."""
    found = {x: collections.Counter() for x in ("error", "API call", "warning")}
    for line in log.splitlines():
        if not (report := REPORT.match(line)):
            continue
        text = report[1].strip()
        if call := API_CALL.match(text):
            found["API call"][f"{call[2]}: {call[1]}"] += 1
        else:
            found["warning" if text.startswith("Warning") else "error"][text] += 1
    return found


def sanitize() -> int:
    """Every tensor in an allocation of its own, so that reads beside one are found.

    Memory errors and hazards are wrong, and so is a run that fails; failed API calls are shown.
    """
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    wrong = 0
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool]
        command += ["--kernel-name-exclude", "kernel_substring=at6native"]
        command += [sys.executable, __file__, "samples"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        Path(os.environ.get("OUT", "."), f"sm90_{tool}.txt").write_text(done.stdout + done.stderr)
        found = findings(done.stdout)
        print(f"{tool}: exit {done.returncode}")
        for kind, said in found.items():
            print(f"{kind}: {sum(said.values())}")
            print(*(f"  {n} x {x}" for x, n in said.most_common(12)), sep="\n")
        if done.returncode:
            print(done.stdout[-600:], done.stderr[-600:], sep="\n")
        wrong += bool(found["error"]) or done.returncode != 0
    return wrong


if __name__ == "__main__":
    modes = {"repeat": repeat, "sizes": sizes, "sanitize": sanitize, "samples": samples}
    if sys.argv[1:2] == [] or sys.argv[1] not in modes:
        raise SystemExit(__doc__)
    raise SystemExit(1 if modes[sys.argv[1]]() else 0)
