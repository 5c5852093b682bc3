"""What rows without a key add to dQ, dK and dV, by torch: the kernels leave it out, it is O(S)."""

from __future__ import annotations

import torch
from torch import Tensor

from fa3_compile.lower.choose import Problem
from fa3_compile.lower.kernels.triton_forward import may_have_dead_rows
from fa3_compile.lower.printers import hoist
from fa3_compile.lower.render.render_backward import fill_slope
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.expr import loads_in


def may_be_nan(spec: AttentionSpec, q_len: int, kv_len: int) -> bool:
    """Whether a row may have no key, or nothing but scores of -inf, and the softmax of that."""
    if spec.sinks or spec.dead == "zero":
        return False
    if spec.dead == "nan":
        return may_have_dead_rows(spec, q_len, kv_len)
    return spec.has_mask and hoist.may_be_minus_inf(spec.score)


def loses_weights(problem: Problem) -> str | None:
    """Why a kernel that looks at no row without a key has not all gradients: of a tensor that
    weighs a row of NaN each is NaN. None where it has."""
    spec = problem.spec
    if spec.weight is None or not may_be_nan(spec, problem.q_len, problem.kv_len):
        return None
    wanted = {i for i, needs_grad in enumerate(problem.aux_needs_grad) if needs_grad}
    if wanted & {x.tensor for x in loads_in(spec.weight)}:
        return "rows without a key are NaN, and so are gradients of what weighs them"
    return None


def add_uniform_rows(
    spec: AttentionSpec,
    dead: Tensor,
    delta: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    dtype: torch.dtype,
) -> None:
    """Adds the share of rows without a key, in which every key has the weight 1 / Skv.

    With P uniform, ds = slope / Skv * (dO.v - delta) is linear in dO, so that the sums over keys
    and rows factor into products of [D, S] and [S, Dv].

    dead, delta  [B, H, Sq]; delta is rowsum(dO * O) - dLSE
    grads        dq, dk and dv, added to in place
    dtype        of the products' operands. bfloat16 is what a kernel's products of such a row would
                 have: a tenth of a causal S = 8192 backward on Hopper without such rows, where
                 float32 takes as much as all of it
    """
    dq, dk, dv = grads
    batch, kv_heads, kv_len, _ = k.shape
    rows = (batch, kv_heads, -1)
    is_dead = dead.bool()
    dout = torch.where(is_dead.unsqueeze(-1), dout, 0.0).to(dtype).reshape(*rows, dout.shape[-1])
    dv.add_(dout.sum(2, keepdim=True, dtype=torch.float32) / kv_len)
    if not (slope := fill_slope(spec)):
        return
    weight = slope / kv_len
    q_rows, k, v = (x.to(dtype) for x in (q.reshape(*rows, q.shape[-1]), k, v))
    of_rows = (torch.where(is_dead, delta, 0.0) * weight).to(dtype).reshape(*rows, 1)
    of_q = dout @ (v.transpose(-1, -2) @ k * weight)
    dq.add_((of_q - of_rows * k.sum(2, keepdim=True, dtype=torch.float32)).view(q.shape))
    of_k = v @ (dout.transpose(-1, -2) @ q_rows * weight)
    dk.add_(of_k - of_rows.transpose(-1, -2) @ q_rows)


def set_nan_rows(dv: Tensor, lse: Tensor) -> None:
    """P of a row whose scores are all -inf is NaN for every key."""
    batch, kv_heads = dv.shape[:2]
    lost = (lse == float("-inf")).view(batch, kv_heads, -1).any(-1)
    dv.masked_fill_(lost[:, :, None, None], float("nan"))
