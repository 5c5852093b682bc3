"""Biases of queries and keys whose keys do not lie side by side in memory.

A pair representation's bias is [q, kv, h] before it is permuted (AlphaFold 2, algorithm 13), and so
are rows that a table is gathered for, by an index that may be flat (Swin, BEiT). The lifter reads
what is permuted, in which a head's keys are apart: each is a line of memory of its own. Kernels
take such a bias tile by tile where it is [b, h, q, kv], which the rewritten graph makes of it; of a
bias that the graph computes, Inductor writes it so at once.
"""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fa3_compile.frontend.dynamo.graph import example_value
from fa3_compile.frontend.dynamo.sizes import sym
from fa3_compile.frontend.lift.captured import Arranged, Captured
from fa3_compile.frontend.region import Region
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.expr import KV, SKV, B, Expr, H, Q, load, loads_in

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def keys_side_by_side(region: Region) -> None:
    """Has the region's spec read [.., q, kv] of such biases."""
    for i, x in enumerate(region.loads):
        if not isinstance(x, Captured) or x.diagonals or x.places or x.dtype not in FLOATS:
            continue
        reads = {y.index for y in loads_in(*region.spec.expressions) if y.tensor == i}
        if len(reads) == 1 and (found := _arrangement(region, x, *reads)) is not None:
            arranged, index = found
            region.loads[i] = x._replace(arranged=arranged)
            region.spec = _reading(region.spec, i, index)


def _arrangement(
    region: Region, x: Captured, index: tuple[Expr, ...]
) -> tuple[Arranged, tuple[Expr, ...]] | None:
    """How to see the tensor as [.., q, kv], and its index then; None where it is that, or is read
    at other places."""
    value = example_value(x.source)
    split, rows = None, region.layout.total(region.layout.query)
    strides: list = [*value.stride()]
    for d, at in enumerate(index):
        if {Q, KV} <= at.free_symbols:
            columns = at.coeff(Q)
            whole = columns in (SKV, region.key_length) and at == KV + columns * Q
            if not whole or sym(value.shape[d]) != sympy.expand(rows * region.key_length):
                return None
            split = d, rows, region.key_length
            index = (*index[:d], Q, KV, *index[d + 1 :])
            strides[d : d + 1] = [None, strides[d]]
            break
    if index.count(Q) != 1 or index.count(KV) != 1:
        return None
    if any(at.free_symbols - {B, H} for at in index if at not in (Q, KV)):
        return None
    order = sorted(range(len(index)), key=lambda d: _place(index[d]))
    places = [_place(at) for at in index if at != 0]
    in_order = places == sorted(places)
    apart = strides[index.index(KV)]
    if in_order and split is None and not (isinstance(apart, int) and apart > 1):
        return None
    if in_order and split is not None and statically_known_true(apart == 1):
        return Arranged(split, None), index
    return Arranged(split, tuple(order)), tuple(index[d] for d in order)


def _place(at: Expr) -> int:
    """Constants, what batches have, heads, queries, keys."""
    return 4 if at == KV else 3 if at == Q else 2 if H in at.free_symbols else int(at != 0)


def _reading(spec: AttentionSpec, tensor: int, index: tuple[Expr, ...]) -> AttentionSpec:
    def moved(expr):
        found = {x: load(tensor, *index) for x in loads_in(expr) if x.tensor == tensor}
        return expr.xreplace(found)

    changed = replace(
        spec,
        score=moved(spec.score),
        mask=moved(spec.mask),
        fill=None if spec.fill is None else moved(spec.fill),
        sinks=tuple(moved(x) for x in spec.sinks),
        weight=None if spec.weight is None else moved(spec.weight),
    )
    return AttentionSpec.parse(str(changed))
