"""`triton` in float32: how many terms of a product it adds up one after another.

Each is rounded as the sum so far is, so that a long chain is further from float64 than cuBLAS, which
adds up in parts where a product has few rows.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from fa3_compile.lower.kernels import triton_keys
from fa3_compile.lower.kernels.triton_backward import render_key as backward_key
from fa3_compile.lower.kernels.triton_keys import render_key
from fa3_compile.lower.render.render import LONGEST_CHAIN, chunks
from fa3_compile.lower.render.render_forward import is_prefix
from fa3_compile.lower.tiles import tune_forward
from fa3_compile.lower.tiles.tune_backward import table_configs
from tests.numerics import test_triton_backward_compile as backward
from tests.numerics.test_triton_compile import CAUSAL, compiled, own_caches, problem  # noqa: F401


def dots(kernel) -> list[tuple[str, int]]:
    """What each product is added to, and its terms."""
    found = re.findall(r"tt\.dot .*, (%\w+)[, ].*: tensor<\d+x(\d+)xf32", kernel.asm["ttgir"])
    assert len(found) == kernel.asm["ttgir"].count("tt.dot ")
    return [(name, int(count)) for name, count in found]


def longest_chain(kernel) -> int:
    """FMAs of the machine code each of which adds to the one before."""
    lengths: dict[str, int] = {}
    for line in re.findall(r"fma\.rn\.f32\s+([^;]*);", kernel.asm["ptx"]):
        to, _, _, onto = line.split(", ")
        lengths[to] = 1 + lengths.get(onto, 0)
    return max(lengths.values())


def check(kernel) -> None:
    assert all(onto.startswith("%cst") for onto, _ in dots(kernel))
    assert max(count for _, count in dots(kernel)) <= LONGEST_CHAIN
    assert longest_chain(kernel) <= LONGEST_CHAIN


def test_forward() -> None:
    asked = problem(CAUSAL, 128, 80, torch.float32)
    check(compiled(asked, tune_forward.table_config(asked)))


@pytest.mark.parametrize("name", ["query_blocks", "key_blocks"])
def test_backward(name: str) -> None:
    asked = problem(CAUSAL, 64, 90, torch.float32)
    check(backward.compiled(asked, name, table_configs(asked).queries))


def test_tensor_cores_add_up_themselves(monkeypatch) -> None:
    """In 16 bits, and in float32 where torch's products are TF32."""
    half, single = problem(CAUSAL, 128, 90), problem(CAUSAL, 128, 90, torch.float32)
    config = tune_forward.table_config(single)
    assert not render_key(half, tune_forward.table_config(half)).parts
    assert render_key(single, config).parts and backward_key(single, ()).parts
    monkeypatch.setattr(triton_keys, "precision", lambda dtype: "tf32")
    assert not render_key(single, config).parts and not backward_key(single, ()).parts
    assert "tl.fma" not in render_key(single, config).source()


@pytest.mark.parametrize(
    ("dim", "widths"),
    [(8, [16]), (40, [32, 16]), (64, [32, 32]), (72, [32, 32, 16]), (97, [32, 32, 32, 16])],
)
def test_parts_cover_a_head(dim: int, widths: list[int]) -> None:
    found = chunks("k", dim, LONGEST_CHAIN)
    assert [x.width for x in found] == widths
    assert [x.start for x in found] == [32 * i for i in range(len(widths))]
    assert [x.tail for x in found[:-1]] == [False] * (len(widths) - 1)


@pytest.mark.parametrize(("v_dim", "expected"), [(512, True), (576, True), (520, False)])
def test_values_that_are_parts_of_keys(v_dim: int, expected: bool) -> None:
    assert is_prefix(576, v_dim, parts=True) == expected


def test_columns_of_values_are_whole_where_rows_are_summed() -> None:
    """Of the forward's product P V: its sums are over keys."""
    asked = replace(problem(CAUSAL, 64, 80, torch.float32), v_dim=128)
    source = render_key(asked, tune_forward.table_config(asked)).source()
    assert "acc0" in source and "acc1" not in source
