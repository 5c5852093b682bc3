"""Gradients by the distance: put where a load takes a part of the tensor, else torch's own."""

from __future__ import annotations

import pytest
import torch

from fa3_compile.lower.kernels.triton_captured import chained
from fa3_compile.lower.kernels.triton_diagonals import Part
from fa3_compile.lower.printers.elements import Shape
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.expr import loads_in

LENGTHS = (2, 3, 1, 7)  # batch, heads, and diagonals

PARTS = {
    "kv": (7,),
    "kv + 2": (9,),
    "h, kv": (3, 7),
    "h, kv + 1": (4, 8),
    "kv, h": (9, 3),
    "1, b, kv + 2, 0, h": (2, 2, 9, 1, 5),
}
OTHERS = {
    "kv + 2": (8,),
    "kv - 1": (9,),
    "2*kv": (13,),
    "max(kv, 2)": (7,),
    "h, h": (3, 3),
    "7 - kv": (8,),
}


def of(index: str, shape: tuple[int, ...]):
    """(spec, load, sums, tensor, part) of `load(0, index)` of a tensor of that shape."""
    spec = AttentionSpec.parse(f"attention(score=s + load(0, {index}), aux=[float])")
    [x] = loads_in(spec.score)
    batch, heads, _, diagonals = LENGTHS
    lengths = (batch if "b" in index else 1, heads if "h" in index else 1, 1, diagonals)
    sums = torch.randn(lengths, generator=torch.Generator().manual_seed(0))
    return spec, x, sums, torch.zeros(shape), Part.of(x, lengths, shape)


@pytest.mark.parametrize("index", PARTS)
def test_a_part_of_the_tensor(index):
    spec, x, sums, tensor, part = of(index, PARTS[index])
    assert part is not None
    wanted = chained([(x, sums)], spec, Shape(*sums.shape), 0, [tensor], [])
    torch.testing.assert_close(part.gradient(sums, tensor), wanted)


@pytest.mark.parametrize("index", OTHERS)
def test_anything_else(index):
    assert of(index, OTHERS[index])[-1] is None
