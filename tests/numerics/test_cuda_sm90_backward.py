"""The backward of `cuda_sm90` on a Hopper GPU: every form's gradients against float64."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.sm90_backward import asked, checks, compare
from fa3_compile.lower.kernels import cuda_sm90_backward as backward
from fa3_compile.lower.kernels.cuda_sm90 import CudaSm90
from fa3_compile.lower.kernels.reference import attention_backward
from fa3_compile.runtime.op import BackwardInputs

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="a Hopper GPU is needed"),
]


@pytest.mark.parametrize("check", checks([])[::3], ids=lambda x: f"{x.form}-{x.dims[0]}-{x.dtype}")
def test_gradients(check) -> None:
    form, problem, (q, k, v, aux), needs = asked(check, "cuda")
    if reason := backward.supports_backward(problem):
        pytest.skip(reason)
    out, lse = CudaSm90().run(problem, q, k, v, aux, form.sizes)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    given = BackwardInputs(dout, dlse, q, k, v, out, lse, aux, form.sizes, needs)
    found = backward.run_backward(problem, given)
    wide = [x.double() if x.is_floating_point() else x for x in aux]
    exact = attention_backward(
        problem.spec, dout.double(), dlse.double(), q.double(), k.double(), v.double(), wide,
        form.sizes, needs,
    )  # fmt: skip
    eager = attention_backward(problem.spec, dout, dlse, q, k, v, aux, form.sizes, needs)
    wrong, _ = compare(found, exact, eager)
    assert wrong is None


def test_deterministic_algorithms_repeat_every_bit() -> None:
    [check] = [x for x in checks(["causal"]) if x.form == "causal" and x.dims == (128, 128)][:1]
    form, problem, (q, k, v, aux), needs = asked(check, "cuda")
    out, lse = CudaSm90().run(problem, q, k, v, aux, form.sizes)
    dout = torch.randn_like(out)
    torch.use_deterministic_algorithms(True)
    try:
        given = BackwardInputs(dout, None, q, k, v, out, lse, aux, form.sizes, needs)
        runs = [
            [x for x in backward.run_backward(problem, given)[:3] if x is not None]
            for _ in range(20)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for x in runs for a, b in zip(runs[0], x, strict=True))
