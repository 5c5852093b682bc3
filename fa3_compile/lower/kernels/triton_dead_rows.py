"""What the Triton backward's kernels leave out of dQ, dK and dV: rows without a key or a weight."""

from __future__ import annotations

from fa3_compile.lower.kernels import triton_forward as forward
from fa3_compile.lower.kernels.dead_rows import may_be_nan, set_nan_rows
from fa3_compile.lower.kernels.triton_uniform_rows import UniformRows, bind_uniform_rows
from fa3_compile.lower.render.render_backward import has_fill_rows


def bind_dead_rows(spec, tensors) -> UniformRows | None:
    """What adds rows without a key, all of whose weights are the same; None where there are none.

    Raises KernelBuildError.
    """
    uniform = spec.dead == "score" and not has_fill_rows(spec)
    lengths = tensors["q_ptr"].shape[2], tensors["k_ptr"].shape[2]
    if uniform and forward.may_have_dead_rows(spec, *lengths):
        return bind_uniform_rows(spec, tensors)
    return None


def lose_rows(problem, tensors, q, k, lse) -> None:
    """NaN in tensors["dv_ptr"] where a row has nothing but scores of -inf."""
    if may_be_nan(problem.spec, q.shape[2], k.shape[2]):
        set_nan_rows(tensors["dv_ptr"], lse)
