"""The operator `fa3::cpu_backward`: gradients of softmax(scale * Q K^T + bias) V on the CPU.

ATen's kernel rebuilds the weights as exp(score - LSE), and takes the rows' sum of dO * O for what
the weights' own gradients sum to. In float32 that is off by |LSE| * 2^-24 of each weight; where one
key has all of a row's weight, eager's gradients are 0 and its are not. How large an LSE is, only a
run can tell, so that this is one operator for compiled code, and not a program of ATen's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fa3_compile.runtime.cpu_forward import (
    as_declared,
    cpu_forward,
    each_kv_head,
    heads_inside,
    later_keys,
)
from fa3_compile.runtime.op import LIBRARY

LIBRARY.define(
    "cpu_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor? bias, bool causal, float scale) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
cpu_backward = torch.ops.fa3.cpu_backward.default
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Up to these the weights are off by eight roundings of float32, or by one of 16 bits. The scores of
# a softmax that is not nearly one-hot are below 32.
LARGE, LARGE_OF_HALF = 32.0, 1e4
# Where a mean's square is more of the mean of squares, K and V are taken about their means. V of
# numbers between 0 and 1 has 0.75 (4096 keys, bfloat16: dQ was seven times as far from float64 as
# eager's), K at eight times its deviations 0.98 (float32: three times).
K_OFF_ZERO, V_OFF_ZERO = 0.67, 0.2


@torch.library.impl(LIBRARY, "cpu_backward", "CompositeExplicitAutograd")
def _cpu_backward(dout, dlse, q, k, v, out, lse, bias, causal, scale):
    """dout, out [B,H,Sq,Dv]; dlse, lse [B,H,Sq], lse -inf nowhere; q [B,H,Sq,D], k [B,Hkv,Skv,D],
    v [B,Hkv,Skv,Dv]; bias float32 [B|1,H|1,Sq|1,Skv|1]. Rows whose bias is all -inf have no
    gradient. Memory: O(S), or one KV head's scores where an LSE is large."""
    large = LARGE if q.dtype == torch.float32 else LARGE_OF_HALF
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        rebuild = _by_kv_head if bool((lse.abs() > large).any()) else _by_lse
        return rebuild(dout, dlse, q, k, v, out, lse, bias, causal, scale)


@torch.library.register_fake("fa3::cpu_backward", lib=LIBRARY)
def _cpu_backward_fake(dout, dlse, q, k, v, out, lse, bias, causal, scale):
    return heads_inside(q), heads_inside(k), heads_inside(v)


def _by_lse(dout, dlse, q, k, v, out, lse, bias, causal, scale):
    """ATen's."""
    v_mean = _mean_of_values(v, out)
    k_mean = None
    if k.dtype == torch.float32 and dlse is None and bias is None:
        k_mean = _mean_of_keys(q, k, causal, scale)
    if v_mean is not None or k_mean is not None:
        k, v = _about(k, k_mean), _about(v, v_mean)
        out, moved_lse = _forward(q, k, v, bias, causal, scale)
        lse = lse if k_mean is None else moved_lse
    if dlse is not None:
        dout, out = _with_lse(dout, out, dlse)
    dim = max(q.shape[-1], dout.shape[-1])
    padded = (F.pad(x, (0, dim - x.shape[-1])).contiguous() for x in (dout, q, k, v, out))
    grads = FLASH_BACKWARD(*padded, lse.contiguous(), 0.0, causal, attn_mask=bias, scale=scale)
    return tuple(as_declared(g, x) for g, x in zip(grads, (q, k, v)))


def _mean_of_values(v: Tensor, out: Tensor) -> Tensor | None:
    """Of those that rows see, [B,Hkv,1,Dv]: 0 for heads in which it is small, None for all of them.

    dP and a row's sum of dO * O both lose the same by it, so that dS, their difference, stays.
    """
    rows = out.reshape(*v.shape[:2], -1, v.shape[-1])
    seen = rows.mean(2, keepdim=True, dtype=torch.float32)
    return _where_large(seen, v, V_OFF_ZERO)


def _mean_of_keys(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor | None:
    """As `_mean_of_values`, where every key is seen and no score moves far.

    A row's scores all lose the same by it, and dQ has no part in it: the sum of a row's dS is 0.
    """
    if causal and q.shape[2] < k.shape[2]:
        return None
    mean = _where_large(k.mean(2, keepdim=True), k, K_OFF_ZERO)
    if mean is None:
        return None
    moved = q.reshape(*k.shape[:2], -1, q.shape[-1]) @ mean.mT * scale
    return mean if bool((moved.abs() <= LARGE).all()) else None


def _about(x: Tensor, mean: Tensor | None) -> Tensor:
    return x if mean is None else (x.float() - mean).to(x.dtype)


def _where_large(mean: Tensor, x: Tensor, most: float) -> Tensor | None:
    size = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=torch.float32)
    share = mean.square().sum(-1, keepdim=True) * x.shape[2] / size.square()
    return torch.where(share > most, mean, 0.0) if bool((share > most).any()) else None


def _forward(q, k, v, bias, causal, scale) -> tuple[Tensor, Tensor]:
    """The output and the LSE."""
    if bias is None:
        bias = q.new_zeros(1, 1, 1, 1, dtype=torch.float32)
    dim = max(q.shape[-1], v.shape[-1])
    padded = (F.pad(x, (0, dim - x.shape[-1])).contiguous() for x in (q, k, v))
    out, lse = cpu_forward(*padded, bias, causal, scale)
    return out[..., : v.shape[-1]], lse


def _with_lse(dout: Tensor, out: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor]:
    """dO and O with two columns more, for the LSE's gradient: dS = P (dP - delta + dLSE), and the
    kernel computes delta as the sum of dO * O. Where V's columns are zeros they change dP nowhere.
    """
    high = dlse.to(out.dtype)
    low = (dlse - high).to(out.dtype)
    ones = torch.ones_like(dout[..., :1])
    dout = torch.cat((dout, ones, ones), -1)
    return dout, torch.cat((out, -high.unsqueeze(-1), -low.unsqueeze(-1)), -1)


def _by_kv_head(dout, dlse, q, k, v, out, lse, bias, causal, scale):
    """The softmax again, and its gradient as eager has it."""
    dq, dk, dv = (heads_inside(x) for x in (q, k, v))
    bias = None if bias is None else bias.expand(*q.shape[:2], -1, -1)
    later = later_keys(q, k) if causal else None
    for kv_head, member in each_kv_head(q, k):
        key, value = k[kv_head].float(), v[kv_head].float()
        query, dvalue = q[member].float(), dout[member].float()
        x = query @ key.mT * scale
        if bias is not None:
            x += bias[member]
        if later is not None:
            x.masked_fill_(later, float("-inf"))
        p = torch.softmax(x, -1)
        if bias is not None:
            p.masked_fill_((x == float("-inf")).all(-1, keepdim=True), 0.0)
        dp = dvalue @ value.mT
        share = (p * dp).sum(-1, keepdim=True)
        if dlse is not None:
            share -= dlse[member].unsqueeze(-1)
        ds = p * (dp - share) * scale
        dq[member] = (ds @ key).to(q.dtype)
        dk[kv_head] = (ds.mT @ query).sum(0).to(k.dtype)
        dv[kv_head] = (p.mT @ dvalue).sum(0).to(v.dtype)
    return dq, dk, dv
