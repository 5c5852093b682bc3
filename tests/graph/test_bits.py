"""Masks made of the bits of integers: of positions, of packed masks, of flags that tokens have."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import flex_attention as flex

from tests.graph.harness import check, specs
from tests.graph.inputs import INF, S, attend, qkv, queries_and_keys, scores_of


def mask_of(seen, *captured, **options) -> str:
    """The mask of a program whose keys are seen where `seen(q, kv, *captured)` says so."""

    def attention(q, k, v, *captured):
        mask = seen(*queries_and_keys(q.size(2), k.size(2)), *captured)
        return attend(scores_of(q, k).masked_fill(~mask, -INF), v)

    inputs = [x.detach() for x in qkv()]
    return specs(check(attention, *inputs, *captured, **options)).split("mask=")[1].split(", d")[0]


POSITIONS = {
    "bitwise_and(5, bitwise_xor(kv, q)) == 0": lambda q, kv: ((q ^ kv) & 5) == 0,
    "bitwise_or(kv, q) <= 30": lambda q, kv: (q | kv) <= 30,
    "bitwise_and(kv, -q - 1) == 0": lambda q, kv: (~q & kv) == 0,
    "bitwise_and(kv, left_shift(1, mod(q, 5))) == 0": lambda q, kv: (kv & (1 << (q % 5))) == 0,
    # All bits that a position may have, those below one of them, and those above.
    "kv <= q": lambda q, kv: (kv & 31) <= (q | 0),
    "mod(kv, 8) <= mod(q, 8)": lambda q, kv: (kv & 7) <= (7 & q),
    "floordiv(kv, 8) <= floordiv(q, 8)": lambda q, kv: (kv >> 3) <= (q >> 3),
}


@pytest.mark.parametrize("mask", POSITIONS)
def test_bits_of_positions(mask):
    assert mask_of(POSITIONS[mask]) == mask


def test_bits_of_positions_of_any_length():
    found = mask_of(lambda q, kv: ((q & 20) | (q >> 2)) >= (kv & 20), dynamic=True)
    assert found == "bitwise_or(bitwise_and(20, q), floordiv(q, 4)) >= bitwise_and(20, kv)"


WIDE = {
    "bits that wrap around": lambda q, kv: ((kv << 29) & (q << 29)) == 0,
    "more than 31 places": lambda q, kv: (kv & (3 << (2 * q)) & (1 << (2 * kv))) == 0,
}


@pytest.mark.parametrize("seen", WIDE.values(), ids=WIDE)
def test_what_does_not_fit_into_32_bits_is_read(seen):
    assert "load" in mask_of(seen)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_packed_mask_is_read_as_it_is(dtype):
    packed = torch.randint(-(2**31), 2**31, (S, 2)).to(dtype)
    packed |= 1

    def seen(q, kv, packed):
        return (packed[q, kv // 16] >> (kv % 16) & 1).bool()

    assert mask_of(seen, packed) == (
        "mod(right_shift(load(0, q, floordiv(kv, 16)), mod(kv, 16)), 2) != 0"
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8])
def test_flags_of_tokens(dtype):
    flags = torch.randint(1, 127, (S,)).to(dtype)

    def seen(q, kv, flags):
        return (~flags[q] & flags[kv] & 4 == 0) | ((flags[q] ^ 1) <= flags[kv]) | (q == kv)

    found = mask_of(seen, flags)
    assert "load(0, q)" in found and "load(0, kv)" in found and "bitwise_xor" in found


def test_booleans_and_numbers_side_by_side():
    mask = torch.rand(S, S) > 0.5
    assert mask_of(lambda q, kv, m: (m & 1).bool() | (q == kv), mask).startswith("(load(0, q, kv)")


def row_of_pixel(code):
    """The row in a picture whose pixels are in Morton order: every other bit of their number."""
    code = code & 0x5555
    code = (code | (code >> 1)) & 0x3333
    return (code | (code >> 2)) & 0x0F0F


@pytest.mark.usefixtures("flex_gradients_on_the_cpu")
def test_flex_attention_in_morton_order():
    def near(b, h, q, kv):
        rows = row_of_pixel(q) - row_of_pixel(kv)
        columns = row_of_pixel(q >> 1) - row_of_pixel(kv >> 1)
        return (rows.abs() <= 1) & (columns.abs() <= 1)

    blocks = flex.create_block_mask(near, None, None, S, S, device="cpu")
    report = check(lambda q, k, v: flex.flex_attention(q, k, v, block_mask=blocks), *qkv())
    assert len(report.fused) == 1 and "bitwise_or(bitwise_and(21, kv)" in specs(report)
