"""Every tile of the shipped table built for sm_90a, without a GPU: no spill, no serialised wgmma.

What each column of the table is for is built with its plainest attention, in bfloat16 and float16
by turns; load_first skips a tile that a richer score makes spill, but none may spill by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fa3_compile.lower.binaries import build_nvrtc
from fa3_compile.lower.render.render_cuda import CudaKey, render
from fa3_compile.lower.tiles.config_sm90 import (
    DENSE,
    DENSE_COLUMNS,
    Sm90Config,
    candidates,
    table,
    table_first,
)
from fa3_compile.spec.attention import AttentionSpec
from tests.numerics.sass import given_back_early, instructions

CAUSAL = "mask=(kv - q <= 0)"
COLUMNS = {
    "full": "score=0.1*s",
    "rows": f"score=0.1*s, {CAUSAL}",
    "scores": f"score=20.0*tanh(0.005*s), {CAUSAL}",
    "masks": "score=0.1*s, mask=load(0, b, q) == load(0, b, kv), aux=[int]",
    "dense": "score=0.1*s + load(0, b, h, q, kv), aux=[float]",
    "dense rows": f"score=0.1*s + load(0, b, h, q, kv), {CAUSAL}, aux=[float]",
    "wide dense": "score=0.1*s + load(0, b, h, q, kv), aux=[float]",
    "wide dense rows": f"score=0.1*s + load(0, b, h, q, kv), {CAUSAL}, aux=[float]",
    "table": "score=0.1*s + load(0, h, kv - q + Sq - 1), aux=[float]",
    "table rows": f"score=0.1*s + load(0, h, kv - q + Sq - 1), {CAUSAL}, aux=[float]",
}
# What a column captures: C++ element types ("" for that of Q), axes of stride 1, the dense tile.
CAPTURED = {"masks": (("int64_t",), ((2,),), None)}
CAPTURED |= dict.fromkeys(("dense", "dense rows"), (("",), ((3,),), 0))
CAPTURED |= dict.fromkeys(("wide dense", "wide dense rows"), (("float",), ((3,),), 0))
CAPTURED |= dict.fromkeys(("table", "table rows"), (("",), ((1,),), None))


@dataclass(frozen=True)
class Shipped:
    """One entry: a tile for the attention of its column."""

    column: str
    dim: int
    dtype: str
    config: Sm90Config

    def key(self) -> CudaKey:
        spec = AttentionSpec.parse(f"attention({COLUMNS[self.column]})")
        elements, unit, tile = CAPTURED.get(self.column, ((), (), None))
        elements = tuple(x or self.dtype for x in elements)
        by_distance = self.column.startswith("table")
        rest = (self.config, elements, unit, tile, by_distance)
        return CudaKey(spec, self.dtype, self.dim, self.dim, *rest)

    def __str__(self) -> str:
        c = self.config
        kind = "-packed" * c.packed + "-split" * c.split + "-optimistic" * c.optimistic
        kind += "-dense-first" * c.dense_first + f"-ahead{c.ahead}" * (c.ahead > 0)
        return f"{self.column}-{self.dim}-{c.block_m}x{c.block_n}{kind}-{self.dtype}"


def shipped() -> list[Shipped]:
    found: list[tuple[str, int, Sm90Config]] = []
    for dim in table():
        for column in COLUMNS:
            if column.startswith("table"):
                begins = table_first(dim, dim, 4096, masked=column == "table rows")
                found += [(column, dim, begins)] if begins is not None else []
                continue
            tiles = candidates(
                dim, dim, 4096, masked=column not in ("full", "dense", "wide dense"),
                plain=column in ("full", "rows"),
                dense=4 if column.startswith("wide") else 2 * column.startswith("dense"),
                asks_mask=column == "masks", capped=column == "scores", begins=True, bare=True,
            )  # fmt: skip
            if column.endswith("dense rows"):
                first = next((x for x in tiles if x.held_queries), None)
                tiles = [] if first is None else [first]
            found += [(column, dim, x) for x in tiles]
        found += [("rows", dim, candidates(dim, dim, 4096, True, True, 0, split=True)[0])]
        few = candidates(dim, dim, 1, False, True, 0)
        packed = candidates(dim, dim, 1, False, True, 0, group=8)
        found += [("full", dim, pair[i % 2]) for i, pair in enumerate(zip(few, packed))]
    return [
        Shipped(column, dim, ("Bf16", "Fp16")[i % 2], x) for i, (column, dim, x) in enumerate(found)
    ]


def build(entry: Shipped) -> build_nvrtc.Built:
    return build_nvrtc.build(render(entry.key()), build_nvrtc.headers())


@pytest.mark.skipif(build_nvrtc.missing() is not None, reason="no cuda-bindings")
@pytest.mark.parametrize("entry", shipped(), ids=str)
def test_builds_without_spills(entry: Shipped, tmp_path) -> None:
    built = build(entry)
    assert built.healthy, built.log
    if "dense" in entry.column:
        pytest.importorskip("triton")  # which brings nvdisasm
        assert not given_back_early(instructions(built.cubin, tmp_path))


def test_every_tile_of_the_table_is_among_them() -> None:
    listed = {(dim, column, tile) for dim, row in table().items() for column in row
              for tile in row[column]}  # fmt: skip
    here = {
        (x.dim, x.column, (x.config.block_m, x.config.block_n))
        for x in shipped()
        if x.config.block_m > 64 and not x.config.split and not x.config.dense_first
        if not x.column.endswith("dense rows")
    }
    listed |= {
        (dim, DENSE_COLUMNS[element], (x.block_m, x.block_n))
        for (element, dim, masked), x in DENSE.items()
        if not masked
    }
    assert here == listed
