"""What the Triton backward's kernels leave out of dQ, dK and dV: rows without a key or a weight."""

from __future__ import annotations

import torch

from fa3_compile.lower.kernels import triton_forward as forward
from fa3_compile.lower.kernels.dead_rows import add_uniform_rows, may_be_nan, set_nan_rows
from fa3_compile.lower.render_backward import has_fill_rows


def finish_rows(problem, tensors, q, k, v, dout, lse) -> None:
    """Adds it to tensors["dq_ptr"], tensors["dk_ptr"] and tensors["dv_ptr"]."""
    spec, dv = problem.spec, tensors["dv_ptr"]
    lengths = q.shape[2], k.shape[2]
    uniform = spec.dead == "score" and not has_fill_rows(spec)
    if uniform and forward.may_have_dead_rows(spec, *lengths):
        grads = (tensors["dq_ptr"], tensors["dk_ptr"], dv)
        dead, delta = tensors["dead_ptr"], tensors["delta_ptr"]
        add_uniform_rows(spec, dead, delta, grads, q, k, v, dout, torch.float32)
    if may_be_nan(spec, *lengths):
        set_nan_rows(dv, lse)
