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
        weights = _weights(spec, lse, shape, aux, sizes)
        return [(x, -weight * delta.unsqueeze(3)) for x, weight in zip(spec.sinks, weights)]


def weight_of_sinks(
    spec: AttentionSpec, lse: Tensor, shape: Shape, aux: Sequence[Tensor], sizes: Sequence[int]
) -> Tensor:
    """What all sinks of a row weigh, [B, H, Sq]; 0 where nothing does."""
    with torch.no_grad():
        weights = _weights(spec, lse, shape, aux, sizes)
        return torch.stack(weights).sum(0).squeeze(3).nan_to_num(0.0)


def _weights(spec, lse, shape, aux, sizes) -> list[Tensor]:
    """Of each sink, [B, H, Sq, 1]."""
    values = elements(spec.sinks, spec, shape, None, aux, sizes, torch.float32, lse.device)
    return [torch.exp(x.to(torch.float32) - lse.unsqueeze(3)) for x in values]


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
