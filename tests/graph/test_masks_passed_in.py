"""Masks that are given: padding, their products and sums, and what a program makes of them."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from tests.graph.harness import check, specs
from tests.graph.inputs import (
    INF,
    LOWEST,
    PASSED_IN,
    B,
    S,
    attend,
    chance,
    future,
    qkv,
    scores_of,
    slope_at_bound,
    triangle,
)


@pytest.mark.parametrize(("shape", "index"), PASSED_IN.values(), ids=PASSED_IN)
def test_boolean_input(shape, index):
    def attention(q, k, v, mask):
        return attend(scores_of(q, k).masked_fill(mask, -INF), v)

    mask = chance(0.3, *shape)
    mask[..., 0] = False
    assert specs(check(attention, *qkv(), mask)) == (
        f"attention(score=0.25*s, mask=load(0, {index}) == 0, dead=nan, aux=[bool])"
    )


@pytest.mark.parametrize(("shape", "index"), PASSED_IN.values(), ids=PASSED_IN)
def test_float_input(shape, index):
    def attention(q, k, v, mask):
        return attend(scores_of(q, k) + mask, v)

    mask = torch.where(chance(0.3, *shape), -INF, 0.0)
    mask[..., 0] = 0
    assert specs(check(attention, *qkv(), mask)) == (
        f"attention(score=load(0, {index}) + 0.25*s, aux=[float])"
    )


def padding() -> Tensor:
    """1 for a token, 0 for padding on the left: [B, S]."""
    return (torch.arange(S) >= torch.tensor([[0], [6]])).long()


def test_padding_as_hugging_face_extends_it():
    def attention(q, k, v, mask):
        extended = (1.0 - mask[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
        return attend(scores_of(q, k) + extended, v)

    assert_expected_inline(
        specs(check(attention, *qkv(), padding())),
        """attention(score=0.25*s + where(load(0, b, kv) == 1, 0, 3.4028234663852886e+38*load(0, b, kv) - 3.4028234663852886e+38), mask=load(0, b, kv) > 0, dead=score, fill=0.25*s + where(load(0, b, kv) == 1, 0, 3.4028234663852886e+38*load(0, b, kv) - 3.4028234663852886e+38), aux=[int])""",
    )


def test_padding_as_hugging_face_once_extended_it():
    # -10000 is no mask: a score may be larger.
    def attention(q, k, v, mask):
        extended = (1.0 - mask[:, None, None, :].to(q.dtype)) * -10000.0
        return attend(scores_of(q, k) + extended, v)

    assert_expected_inline(
        specs(check(attention, *qkv(), padding())),
        """attention(score=0.25*s + where(load(0, b, kv) == 1, 0, 10000*load(0, b, kv) - 10000), aux=[int])""",
    )


def test_padding_of_some_keys():
    def attention(q, k, v, mask):
        extended = ((1 - mask) * LOWEST)[:, None, None, :]
        return attend(scores_of(q, k) + torch.where(torch.arange(S) > 3, extended, 0.0), v)

    assert_expected_inline(
        specs(check(attention, *qkv(), padding())),
        """attention(score=0.25*s + where(kv >= 4, where(load(0, b, kv) == 1, 0, 3.4028234663852886e+38*load(0, b, kv) - 3.4028234663852886e+38), 0), mask=(kv <= 3) | (load(0, b, kv) > 0), dead=nan, aux=[int])""",
    )


def test_padding_where_one_hides():
    def attention(q, k, v, mask):
        return attend(scores_of(q, k) + mask[:, None, None, :] * LOWEST, v)

    assert_expected_inline(
        specs(check(attention, *qkv(), 1 - padding())),
        """attention(score=0.25*s - 3.4028234663852886e+38*load(0, b, kv), mask=load(0, b, kv) < 1, dead=score, fill=0.25*s - 3.4028234663852886e+38*load(0, b, kv), aux=[int])""",
    )


def test_padding_with_numbers_beyond_one():
    # With 2 the "mask" attracts, and eager's numbers are the specification.
    def attention(q, k, v, mask):
        causal = torch.full((S, S), LOWEST).triu(1)
        return attend(scores_of(q, k) + causal + ((1 - mask) * LOWEST)[:, None, None, :], v)

    mask = 1 + (torch.arange(S) == 9).long().expand(B, S)
    assert [r.fused for r in check(attention, *qkv(), mask.contiguous()).regions] == [True]


def test_causal_and_padding_multiplied():
    def attention(q, k, v, mask):
        both = triangle()[None, None] * mask[:, None, None, :]
        return attend(scores_of(q, k).masked_fill(both == 0, LOWEST), v)

    assert_expected_inline(
        specs(check(attention, *qkv(), padding())),
        """attention(score=0.25*s, mask=(kv <= q) & (load(0, b, kv) != 0), dead=score, fill=-3.4028234663852886e+38, aux=[int])""",
    )


def test_causal_and_padding_combined_by_logic():
    def attention(q, k, v, mask):
        hidden = future()[None, None] | (mask == 0)[:, None, None, :]
        return attend(scores_of(q, k).masked_fill(hidden, -INF), v)

    assert_expected_inline(
        specs(check(attention, *qkv(), padding())),
        """attention(score=0.25*s, mask=(kv <= q) & (load(0, b, kv) != 0), dead=nan, aux=[int])""",
    )


def test_causal_and_padding_added():
    def attention(q, k, v, mask):
        causal = torch.full((S, S), LOWEST).triu(1)
        return attend(scores_of(q, k) + causal + ((1 - mask) * LOWEST)[:, None, None, :], v)

    assert_expected_inline(
        specs(check(attention, *qkv(), padding())),
        """attention(score=0.25*s + where(kv >= q + 1, -3.4028234663852886e+38, 0) + where(load(0, b, kv) == 1, 0, 3.4028234663852886e+38*load(0, b, kv) - 3.4028234663852886e+38), mask=((kv <= q) | (load(0, b, kv) > 1)) & (load(0, b, kv) > 0), dead=score, fill=0.25*s + where(kv >= q + 1, -3.4028234663852886e+38, 0) + where(load(0, b, kv) == 1, 0, 3.4028234663852886e+38*load(0, b, kv) - 3.4028234663852886e+38), aux=[int])""",
    )


def test_causal_and_padding_added_and_clamped():
    def attention(q, k, v, mask):
        causal = torch.full((S, S), LOWEST).triu(1)
        both = causal + ((1 - mask) * LOWEST)[:, None, None, :]
        return attend(scores_of(q, k) + both.clamp(min=LOWEST), v)

    found = specs(check(attention, *qkv(), padding()))
    if slope_at_bound():
        assert_expected_inline(
            found,
            """attention(score=0.25*s + where(kv >= q + 1, -3.4028234663852886e+38, 0) + where(load(0, b, kv) == 1, 0, 3.4028234663852886e+38*load(0, b, kv) - 3.4028234663852886e+38), mask=((kv <= q) | (load(0, b, kv) > 1)) & (load(0, b, kv) > 0), dead=score, fill=0.25*s + where((((3.4028234663852886e+38*load(0, b, kv) - 3.4028234663852886e+38 < -3.4028234663852886e+38) & (kv <= q)) | ((3.4028234663852886e+38*load(0, b, kv) - 6.805646932770577e+38 < -3.4028234663852886e+38) & (kv >= q + 1))) & (load(0, b, kv) != 1), -3.4028234663852886e+38, where(kv >= q + 1, -3.4028234663852886e+38, 0) + where(load(0, b, kv) == 1, 0, 3.4028234663852886e+38*load(0, b, kv) - 3.4028234663852886e+38)), aux=[int])""",
        )
    else:
        assert_expected_inline(
            found,
            """attention(score=0.25*s + where(kv >= q + 1, -3.4028234663852886e+38, 0) + where(load(0, b, kv) == 1, 0, 3.4028234663852886e+38*load(0, b, kv) - 3.4028234663852886e+38), mask=((kv <= q) | (load(0, b, kv) > 1)) & (load(0, b, kv) > 0), dead=score, fill=0.25*s - 3.4028234663852886e+38, aux=[int])""",
        )


def test_keys_then_rows():
    # The padded queries' rows are masked too, and then their weights are NaN.
    def attention(q, k, v, mask):
        both = mask[:, None, :, None] * mask[:, None, None, :]
        return attend(scores_of(q, k).masked_fill(both == 0, -INF), v)

    assert_expected_inline(
        specs(check(attention, *qkv(), padding())),
        """attention(score=0.25*s, mask=(load(0, b, kv) != 0) & (load(0, b, q) != 0), dead=nan, aux=[int])""",
    )


def test_written_into_the_mask():
    # `causal_mask[:, :, :, :n] = causal_mask[...].masked_fill(...)`, transformers before 4.50.
    def attention(q, k, v, mask):
        causal = torch.full((S, S), LOWEST).triu(1)[None, None].expand(B, 1, -1, -1).clone()
        hidden = (causal[:, :, :, :S] + mask[:, None, None, :]) == 0
        causal[:, :, :, :S] = causal[:, :, :, :S].masked_fill(hidden, LOWEST)
        return attend(scores_of(q, k) + causal, v)

    assert_expected_inline(
        specs(check(attention, *qkv(), padding())),
        """attention(score=0.25*s, mask=(kv <= q) & (load(0, b, kv) != 0), dead=score, fill=0.25*s - 3.4028234663852886e+38, aux=[int])""",
    )
