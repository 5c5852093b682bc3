"""What the Triton backward's kernels leave out of dQ, dK and dV: rows without a key or a weight."""

from __future__ import annotations

import torch

from fa3_compile.lower import hoist
from fa3_compile.lower.kernels import triton_forward as forward
from fa3_compile.lower.kernels.dead_rows import add_uniform_rows, set_nan_rows
from fa3_compile.lower.render_backward import has_fill_rows
from fa3_compile.spec.attention import AttentionSpec


def finish_rows(problem, tensors, q, k, v, dout, lse) -> None:
    """Adds it to tensors["dq_ptr"], tensors["dk_ptr"] and tensors["dv_ptr"]."""
    spec, dv = problem.spec, tensors["dv_ptr"]
    if forward.may_have_dead_rows(spec, q.shape[2], k.shape[2]):
        if spec.dead == "score" and not has_fill_rows(spec):
            grads = (tensors["dq_ptr"], tensors["dk_ptr"], dv)
            dead, delta = tensors["dead_ptr"], tensors["delta_ptr"]
            add_uniform_rows(spec, dead, delta, grads, q, k, v, dout, torch.float32)
        elif spec.dead == "nan" and not spec.sinks:
            set_nan_rows(dv, lse)
    elif spec.dead == "nan" and not spec.sinks and _may_lose_rows(spec):
        set_nan_rows(dv, lse)


def _may_lose_rows(spec: AttentionSpec) -> bool:
    """Whether every score of a row that has keys may be -inf."""
    return hoist.may_be_minus_inf(spec.score) and spec.has_mask
