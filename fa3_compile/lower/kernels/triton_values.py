"""V about its mean, for gradients in float32.

dP = dO V^T, and a row's sum of P dP that is taken off it, are both as large as V's mean; dS, their
difference, is not. Any c may be taken off V, where nothing follows the softmax: dP and, in a row
whose weights sum to 1, that sum lose dO.c alike. In a row with a sink of weight S the sum loses
(1 - S) dO.c, and the rest, S dO.c, is handed in as a gradient of the row's LSE is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fa3_compile.lower.kernels.sinks import weight_of_sinks
from fa3_compile.lower.printers.elements import Shape
from fa3_compile.runtime.op import BackwardInputs
from fa3_compile.spec.attention import AttentionSpec


@dataclass(frozen=True)
class AboutMean:
    """What the kernels are given for `BackwardInputs`, and by how much their delta is too small,
    [B, H, Sq]; None for not at all."""

    given: BackwardInputs
    of_delta: Tensor | None = None


@torch.no_grad()
def about_mean(spec: AttentionSpec, given: BackwardInputs) -> AboutMean:
    """V and the output less the mean of each KV head's outputs, which lies among the values that
    rows see, whatever a mask hides. V of 16 bits is left, to which the rest would be rounded."""
    dout, dlse, q, k, v, out, lse, aux, sizes, _ = given
    if v.dtype != torch.float32 or not spec.normalized or spec.weight is not None or 0 in out.shape:
        return AboutMean(given)
    kv_heads = v.shape[1]
    mean = out.unflatten(1, (kv_heads, -1)).nanmean((2, 3)).nan_to_num(0.0, 0.0, 0.0)
    of_head = mean.repeat_interleave(q.shape[1] // kv_heads, 1).unsqueeze(3)
    values = torch.empty_like(v).copy_(v).sub_(mean.unsqueeze(2))  # dV has strides like these
    moved = given._replace(v=values, out=out - of_head.mT)
    if not spec.sinks:
        return AboutMean(moved)
    of_delta = (dout @ of_head).squeeze(3)
    shape = Shape(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    rest = of_delta * weight_of_sinks(spec, lse, shape, aux, sizes)
    return AboutMean(moved._replace(dlse=rest if dlse is None else dlse + rest), of_delta)
