"""What the Triton backward's kernels leave out of dQ, dK and dV: rows without a key or a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from fa3_compile.lower import hoist
from fa3_compile.lower.kernels import triton_forward as forward
from fa3_compile.lower.render_backward import fill_slope, has_fill_rows
from fa3_compile.spec.attention import AttentionSpec


def finish_rows(problem, tensors, q, k, v, dout, lse) -> None:
    """Adds it to tensors["dq_ptr"], tensors["dk_ptr"] and tensors["dv_ptr"]."""
    spec, dv = problem.spec, tensors["dv_ptr"]
    if forward.may_have_dead_rows(spec, q.shape[2], k.shape[2]):
        if spec.dead == "score" and not has_fill_rows(spec):
            _add_uniform_rows(spec, tensors, q, k, v, dout)
        elif spec.dead == "nan" and not spec.sinks:
            set_nan_rows(dv, lse)
    elif spec.dead == "nan" and not spec.sinks and _may_lose_rows(spec):
        set_nan_rows(dv, lse)


def _may_lose_rows(spec: AttentionSpec) -> bool:
    """Whether every score of a row that has keys may be -inf."""
    return hoist.may_be_minus_inf(spec.score) and spec.has_mask


def _add_uniform_rows(spec: AttentionSpec, tensors, q, k, v, dout) -> None:
    """The share of rows without a key, in which every key has the weight 1 / Skv.

    With P uniform, ds = slope / Skv * (dO.v - delta) is linear in dO, so that the sums over keys
    and rows factor into products of [D, S] and [S, Dv].
    """
    batch, kv_heads, kv_len, _ = k.shape
    rows = (batch, kv_heads, -1)
    dead = tensors["dead_ptr"].bool()
    dout = torch.where(dead.unsqueeze(-1), dout, 0.0).float().reshape(*rows, dout.shape[-1])
    tensors["dv_ptr"].add_((dout.sum(2, keepdim=True) / kv_len).to(v.dtype))
    if not (slope := fill_slope(spec)):
        return
    delta = torch.where(dead, tensors["delta_ptr"], 0.0).reshape(*rows, 1)
    weight = slope / kv_len
    q_rows, k, v = q.float().reshape(*rows, q.shape[-1]), k.float(), v.float()
    dq = dout @ (v.transpose(-1, -2) @ k) - delta * k.sum(2, keepdim=True)
    dk = v @ (dout.transpose(-1, -2) @ q_rows) - (delta * q_rows).sum(2, keepdim=True)
    tensors["dq_ptr"].add_((dq * weight).view(q.shape).to(q.dtype))
    tensors["dk_ptr"].add_((dk * weight).to(q.dtype))


def set_nan_rows(dv: Tensor, lse: Tensor) -> None:
    """P of a row whose scores are all -inf is NaN for every key."""
    batch, kv_heads = dv.shape[:2]
    lost = (lse == float("-inf")).view(batch, kv_heads, -1).any(-1)
    dv.masked_fill_(lost[:, :, None, None], float("nan"))
