"""Weights without a softmax: which family takes them, and the Triton kernels on a GPU."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from fa3_compile.lower.choose import Problem, choose
from fa3_compile.lower.kernels.reference import attention_backward
from fa3_compile.runtime.op import BackwardInputs
from tests.numerics.forms import UNNORMALISED, Form, compare, inputs, shape_for

# Under Triton's interpreter the same tests run on a CPU, slowly.
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
on_gpu = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="a GPU is needed"
)
forms = pytest.mark.parametrize("form", UNNORMALISED, ids=lambda x: x.name)
LENGTHS = ((333, 421), (421, 333), (128, 512), (1, 700))
DIMS = ((40, 40), (64, 64), (96, 96), (128, 128), (192, 128))


def problem(form: Form, shape, dtype: torch.dtype, aux, device: str, capability) -> Problem:
    dtypes = tuple(x.dtype for x in aux)
    made = Problem(form.spec(), dtype, torch.device(device), capability, *vars(shape).values())
    return replace(made, aux_dtypes=dtypes)


@forms
def test_the_others_say_why_not(form: Form) -> None:
    shape = shape_for(form, 64, 64, 300, 300, 1)
    aux = inputs(form, shape, torch.bfloat16, "cpu")[3]
    asked = problem(form, shape, torch.bfloat16, aux, "cuda", (9, 0))
    assert "softmax" in choose(asked).reasons["cuda_sm90"]
    asked = replace(asked, device=torch.device("cpu"), capability=None)
    assert "softmax" in choose(asked).reasons["cpu"]


def on_device(form: Form, dtype: torch.dtype):
    from fa3_compile.lower.kernels.triton_forward import TritonForward

    n = UNNORMALISED.index(form)
    shape = shape_for(form, *DIMS[n % len(DIMS)], *LENGTHS[n % len(LENGTHS)], (1, 2, 4)[n % 3])
    q, k, v, aux = inputs(form, shape, dtype, DEVICE)
    capability = torch.cuda.get_device_capability() if DEVICE == "cuda" else None
    device = str(q.device)
    return TritonForward(), problem(form, shape, dtype, aux, device, capability), q, k, v, aux


@pytest.mark.gpu
@on_gpu
@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_forward(form: Form, dtype: torch.dtype) -> None:
    kernel, asked, q, k, v, aux = on_device(form, dtype)
    assert kernel.supports(asked) is None
    out, lse = kernel.run(asked, q, k, v, aux, form.sizes)
    assert compare(form, out, lse, q, k, v, aux) is None


@pytest.mark.gpu
@on_gpu
@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradients(form: Form, dtype: torch.dtype) -> None:
    kernel, asked, q, k, v, aux = on_device(form, dtype)
    needs = [True] * 3 + [x.is_floating_point() for x in aux]
    asked = replace(asked, needs_grad=True, aux_needs_grad=tuple(needs[3:]))
    assert kernel.supports_backward(asked) is None
    out, lse = kernel.run(asked, q, k, v, aux, form.sizes)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse) if form.spec().sums else None
    given = BackwardInputs(dout, dlse, q, k, v, out, lse, aux, form.sizes, needs)
    found = kernel.run_backward(asked, given)
    rest = (aux, form.sizes, needs)
    rounded = attention_backward(asked.spec, dout, dlse, q, k, v, *rest)
    exact = attention_backward(
        asked.spec, dout.double(), dlse, q.double(), k.double(), v.double(), *rest
    )
    for ours, theirs, truth in zip(*((*x[:3], *x[3]) for x in (found, rounded, exact))):
        if ours is None or theirs is None or truth is None:
            continue
        off, allowed = ((x.double() - truth).abs().max().item() for x in (ours, theirs))
        assert off <= 2 * allowed + 8 * torch.finfo(dtype).eps * truth.abs().max().item()
