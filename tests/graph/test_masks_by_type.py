"""Masks of 0 and 1 in any type, and what arithmetic they are given to."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from tests.graph.harness import check, specs
from tests.graph.inputs import (
    INF,
    LOWEST,
    B,
    S,
    attend,
    qkv,
    scores_of,
    triangle,
)


def masked_by(function, *masks, grad=False):
    """Specs, for a padding mask of 0 and 1 in each of several types."""
    found = set()
    for mask in masks:
        report = check(lambda q, k, v, m: attend(function(scores_of(q, k), m), v), *qkv(), mask)
        found.add(specs(report).replace("aux=[float]", "aux=[..]").replace("aux=[int]", "aux=[..]"))
    return "\n".join(sorted(found))


def padding():
    return (torch.arange(S) >= torch.tensor([[0], [6]])).view(B, 1, 1, S)


NUMBERS = (torch.int64, torch.int32, torch.float32, torch.bfloat16)


def test_masks_of_every_type():
    masks = [padding().to(dtype) for dtype in NUMBERS]
    assert_expected_inline(
        masked_by(lambda s, m: s.masked_fill(m == 0, -INF), *masks),
        """attention(score=0.25*s, mask=load(0, b, 0, 0, kv) != 0, dead=nan, aux=[..])""",
    )
    assert_expected_inline(
        masked_by(lambda s, m: s.masked_fill(m < 0.5, -INF), *masks[:2]),
        """attention(score=0.25*s, mask=load(0, b, 0, 0, kv) >= 0.5, dead=nan, aux=[..])""",
    )
    assert_expected_inline(
        masked_by(lambda s, m: torch.where(m.bool(), s, LOWEST), *masks),
        """attention(score=0.25*s, mask=load(0, b, 0, 0, kv) != 0, dead=score, fill=-3.4028234663852886e+38, aux=[..])""",
    )
    assert_expected_inline(
        masked_by(lambda s, m: s + (1.0 - m.to(s.dtype)) * LOWEST, *masks),
        """attention(score=0.25*s + where(load(0, b, 0, 0, kv) == 1, 0, 3.4028234663852886e+38*load(0, b, 0, 0, kv) - 3.4028234663852886e+38), mask=load(0, b, 0, 0, kv) > 0, dead=score, fill=0.25*s + where(load(0, b, 0, 0, kv) == 1, 0, 3.4028234663852886e+38*load(0, b, 0, 0, kv) - 3.4028234663852886e+38), aux=[..])""",
    )
    assert_expected_inline(
        masked_by(lambda s, m: s + (m.to(s.dtype) - 1.0) * 1e9, *masks),
        """attention(score=0.25*s + where(load(0, b, 0, 0, kv) == 1, 0, 1000000000.0*load(0, b, 0, 0, kv) - 1000000000.0), aux=[..])""",
    )
    assert_expected_inline(
        masked_by(lambda s, m: s * m + (1 - m.to(s.dtype)) * -1e9, *masks),
        """attention(score=0.25*load(0, b, 0, 0, kv)*s + where(load(0, b, 0, 0, kv) == 1, 0, 1000000000.0*load(0, b, 0, 0, kv) - 1000000000.0), aux=[..])""",
    )
    assert_expected_inline(
        masked_by(lambda s, m: s + torch.log(m.to(s.dtype)), *masks[:2]),
        """attention(score=load(0, b, 0, 0, kv) + 0.25*s, aux=[..])""",
    )


def test_mask_of_bytes():
    def attention(q, k, v, mask):
        return attend(scores_of(q, k) + (mask.to(q.dtype) - 1.0) * 1e9, v)

    check(attention, *qkv(), padding().to(torch.uint8))


MASKS_OF_NUMBERS = {
    "multiplied by a triangle": lambda s, m: s + (1 - triangle() * m) * -1e9,
    "of keys and of queries": lambda s, m: s + (1.0 - (m * m.mT).float()) * LOWEST,
    "the smaller of two": lambda s, m: (
        s + torch.minimum((triangle() - 1) * -LOWEST, (1 - m.float()) * LOWEST)
    ),
    "with a floor, as OPT has it": lambda s, m: torch.max(
        s + (1 - m.float()) * LOWEST, torch.tensor(LOWEST)
    ),
    "clamped, as GPT-J had it": lambda s, m: (s + (1 - m.float()) * LOWEST).clamp(min=LOWEST),
}


@pytest.mark.parametrize("rows", ["some keys", "no key"])
@pytest.mark.parametrize("name", MASKS_OF_NUMBERS)
def test_mask_of_integers(name, rows):
    mask = padding().long() * (rows == "some keys")
    mask[0] = 1
    report = check(
        lambda q, k, v, m: attend(MASKS_OF_NUMBERS[name](scores_of(q, k), m), v), *qkv(), mask
    )
    assert [region.fused for region in report.regions] == [True]


def test_boolean_masks():
    for function in (
        lambda s, m: s + (1.0 - m.float()) * LOWEST,
        lambda s, m: s.masked_fill(~m, LOWEST),
        lambda s, m: s + torch.where(m, 0.0, LOWEST),
        lambda s, m: s + torch.zeros(m.shape).masked_fill(~m, LOWEST),
        lambda s, m: s + (~m) * LOWEST,
        lambda s, m: s.masked_fill(m.logical_not(), LOWEST),
        lambda s, m: s.masked_fill(m == False, LOWEST),  # noqa: E712
        lambda s, m: s.masked_fill(m ^ True, LOWEST),
        lambda s, m: s.masked_fill(m.long() < 1, LOWEST),
        lambda s, m: s.masked_fill((1 - m.int()).bool(), LOWEST),
    ):
        assert "mask=load(0, b, 0, 0, kv) != 0, dead=score" in masked_by(function, padding())
