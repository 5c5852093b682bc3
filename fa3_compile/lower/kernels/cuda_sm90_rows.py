"""What the Hopper backward leaves to torch, all of it O(S): rows without a key, and sinks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fa3_compile.lower.elements import Shape, elements
from fa3_compile.lower.kernels.triton_captured import chained
from fa3_compile.lower.kernels.triton_forward import may_have_dead_rows
from fa3_compile.lower.render_backward import fill_slope
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec


def may_be_nan(spec: AttentionSpec, q_len: int, kv_len: int) -> bool:
    """Whether a row may have no key, or nothing but scores of -inf, and the softmax of that."""
    return spec.dead == "nan" and not spec.sinks and may_have_dead_rows(spec, q_len, kv_len)


def add_uniform_rows(
    spec: AttentionSpec,
    dead: Tensor,
    delta: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
) -> None:
    """Adds the share of rows without a key, in which every key has the weight 1 / Skv.

    With P uniform, ds = slope / Skv * (dO.v - delta) is linear in dO, so that the sums over keys
    and rows factor into products of [D, S] and [S, Dv]. They are taken in bfloat16, as the other
    products of such a row would be: on a causal S = 8192 without such rows they cost a tenth of
    the backward, in float32 as much as all of it.
    """
    dq, dk, dv = grads
    batch, kv_heads, kv_len, _ = k.shape
    rows = (batch, kv_heads, -1)
    is_dead = dead.bool()
    dout = torch.where(is_dead.unsqueeze(-1), dout, 0.0).to(torch.bfloat16)
    dout = dout.reshape(*rows, dout.shape[-1])
    dv.add_(dout.sum(2, keepdim=True, dtype=torch.float32) / kv_len)
    if not (slope_of_fill := fill_slope(spec)):
        return
    weight = slope_of_fill / kv_len
    q_rows, k, v = (x.to(torch.bfloat16) for x in (q.reshape(*rows, q.shape[-1]), k, v))
    of_rows = (torch.where(is_dead, delta, 0.0) * weight).to(torch.bfloat16).reshape(*rows, 1)
    own = dout @ (v.transpose(-1, -2) @ k * weight)
    dq.add_((own - of_rows * k.sum(2, keepdim=True, dtype=torch.float32)).view(q.shape))
    dk.add_(v @ (dout.transpose(-1, -2) @ q_rows * weight))
    dk.sub_(of_rows.transpose(-1, -2) @ q_rows)


def sink_gradients(
    spec: AttentionSpec,
    wanted: Sequence[int],
    lse: Tensor,
    delta: Tensor,
    shape: Shape,
    aux: Sequence[Tensor],
    sizes: Sequence[int],
) -> dict[int, Tensor]:
    """The gradients of the captured tensors that sinks read: a sink's weight is exp(sink - LSE),
    and its own value 0. `delta` is rowsum(dO * O) - dLSE, [B, H, Sq]."""
    read = {x.tensor for x in E.loads_in(*spec.sinks)} & set(wanted)
    if not read:
        return {}
    with torch.no_grad():
        values = elements(spec.sinks, spec, shape, None, aux, sizes, torch.float32, lse.device)
        parts = [
            (x, -torch.exp(value.to(torch.float32) - lse.unsqueeze(3)) * delta.unsqueeze(3))
            for x, value in zip(spec.sinks, values)
        ]
    return {i: chained(parts, spec, shape, i, aux, sizes).to(aux[i].dtype) for i in read}
