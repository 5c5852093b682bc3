"""The gradients of sinks, which the kernels leave to torch: they are O(S)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fa3_compile.lower.kernels.triton_captured import chained
from fa3_compile.lower.printers.elements import Shape, elements
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec


def sink_cotangents(
    spec: AttentionSpec,
    lse: Tensor,
    delta: Tensor,
    shape: Shape,
    aux: Sequence[Tensor],
    sizes: Sequence[int],
) -> list[tuple[E.Expr, Tensor]]:
    """Each sink and its gradient, [B, H, Sq, 1] float32: its weight is exp(sink - LSE), and its own
    value 0. `delta` is rowsum(dO * O) - dLSE, [B, H, Sq]."""
    with torch.no_grad():
        values = elements(spec.sinks, spec, shape, None, aux, sizes, torch.float32, lse.device)
        return [
            (x, -torch.exp(value.to(torch.float32) - lse.unsqueeze(3)) * delta.unsqueeze(3))
            for x, value in zip(spec.sinks, values)
        ]


def sink_gradients(
    spec: AttentionSpec,
    wanted: Sequence[int],
    lse: Tensor,
    delta: Tensor,
    shape: Shape,
    aux: Sequence[Tensor],
    sizes: Sequence[int],
) -> dict[int, Tensor]:
    """The gradients of the captured tensors that sinks read."""
    read = {x.tensor for x in E.loads_in(*spec.sinks)} & set(wanted)
    if not read:
        return {}
    parts = sink_cotangents(spec, lse, delta, shape, aux, sizes)
    return {i: chained(parts, spec, shape, i, aux, sizes).to(aux[i].dtype) for i in read}
