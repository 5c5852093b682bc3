"""Masks: however they are made, the closed form is the set of keys that a query sees."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tests.graph.harness import check, specs
from tests.graph.inputs import (
    INF,
    LOWEST,
    B,
    D,
    H,
    S,
    attend,
    chance,
    future,
    normal,
    qkv,
    queries_and_keys,
    scores_of,
    slope_at_bound,
    uniform,
)

CAUSAL = "attention(score=0.25*s, mask=kv <= q, dead=nan)"


def triangle() -> Tensor:
    return torch.tril(torch.ones(S, S))


def _written(s: Tensor) -> Tensor:
    mask = torch.zeros(S, S)
    mask[future()] = -INF
    return s + mask


def _written_into_the_scores(s: Tensor) -> Tensor:
    s[..., future()] = -INF
    return s


def _filled_in_place(s: Tensor) -> Tensor:
    s.masked_fill_(future(), -INF)
    return s


def _meshgrid(s: Tensor) -> Tensor:
    q, kv = torch.meshgrid(torch.arange(S), torch.arange(S), indexing="ij")
    return s.masked_fill(q < kv, -INF)


def _positions(s: Tensor) -> Tensor:
    at = torch.ones(S, dtype=torch.long).cumsum(0) - 1
    return s.masked_fill(at.unsqueeze(0) > at.unsqueeze(1), -INF)


def _torch_recipe(s: Tensor) -> Tensor:
    # generate_square_subsequent_mask of PyTorch's own tutorial.
    mask = (torch.triu(torch.ones(S, S)) == 1).transpose(0, 1)
    mask = mask.float().masked_fill(mask == 0, float("-inf")).masked_fill(mask == 1, 0.0)
    return s + mask


def _where_infinite(s: Tensor) -> Tensor:
    q, kv = queries_and_keys()
    return torch.where(kv <= q, s, torch.tensor(-INF))


def _masked_value(s: Tensor) -> Tensor:
    # GPT-2 in transformers.
    value = torch.full([], torch.finfo(s.dtype).min, dtype=s.dtype)
    return torch.where(triangle().bool()[None, None], s.to(s.dtype), value)


CAUSAL_MASKS = {
    "where": lambda s: torch.where(triangle() > 0, s, -INF),
    "where with a tensor": _where_infinite,
    "where with finfo.min": _masked_value,
    "tril == 0": lambda s: s.masked_fill(triangle() == 0, -INF),
    "inverted tril": lambda s: s.masked_fill(~triangle().bool(), -INF),
    "logical_not": lambda s: s.masked_fill(triangle().bool().logical_not(), -INF),
    "triu": lambda s: s.masked_fill(future(), -INF),
    "triu of -inf added": lambda s: s + torch.triu(torch.full((S, S), -INF), diagonal=1),
    "triu of finfo.min added": lambda s: s + torch.full((S, S), LOWEST).triu(1),
    "logarithm added": lambda s: s + triangle().log(),
    "logarithm of a product": lambda s: s + (triangle() * (1 - future().float())).log(),
    "1 - tril, times finfo.min": lambda s: s + (1.0 - triangle()) * torch.finfo(s.dtype).min,
    "subtracted": lambda s: s - 1e38 * future().to(s.dtype),
    "torch's recipe": _torch_recipe,
    "torch's function": lambda s: s + nn.Transformer.generate_square_subsequent_mask(S),
    "written by a boolean index": _written,
    "scores written by a boolean index": _written_into_the_scores,
    "in place": _filled_in_place,
    "meshgrid": _meshgrid,
    "cumsum of ones": _positions,
    "4-D": lambda s: s.masked_fill(triangle().view(1, 1, S, S) == 0, -INF),
    "expanded": lambda s: s.masked_fill(future().expand(B, 1, S, S), -INF),
    "repeated": lambda s: s.masked_fill(future().repeat(B, H, 1, 1), -INF),
    "sliced": lambda s: s.masked_fill(torch.ones(64, 64).tril()[:S, :S] == 0, -INF),
    "integers": lambda s: s.masked_fill(triangle().long().eq(0), -INF),
    "twice": lambda s: s.masked_fill(future(), -INF).masked_fill(future(), -INF),
    "-inf after finfo.min": lambda s: s.masked_fill(future(), LOWEST).masked_fill(future(), -INF),
    "transposed": lambda s: s.mT.masked_fill(future().mT, -INF).mT,
}


@pytest.mark.parametrize("mask", CAUSAL_MASKS.values(), ids=CAUSAL_MASKS)
def test_causal(mask):
    assert specs(check(lambda q, k, v: attend(mask(scores_of(q, k)), v), *qkv())) == CAUSAL


def test_causal_of_sdpa():
    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    assert specs(check(attention, *qkv())) == CAUSAL


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_causal_in_half_precision(dtype):
    def attention(q, k, v):
        s = scores_of(q, k).masked_fill(future(), torch.finfo(q.dtype).min)
        return F.softmax(s, -1, dtype=torch.float32).to(q.dtype) @ v

    assert specs(check(attention, *qkv(dtype=dtype))) == CAUSAL


class Cached(nn.Module):
    """A mask made once, as a buffer of the longest length."""

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, q, k, v):
        s = scores_of(q, k)
        return attend(s.masked_fill(self.mask[:, :, : s.size(-2), : s.size(-1)] == 0, -INF), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8, torch.int64], ids=str)
def test_buffer(dtype):
    report = check(Cached(torch.ones(1, 1, 40, 40).tril().to(dtype)), *qkv())
    kind = {torch.float32: "float", torch.bool: "bool"}.get(dtype, "int")
    assert specs(report) == (
        f"attention(score=0.25*s, mask=load(0, 0, 0, q, kv) != 0, dead=nan, aux=[{kind}])"
    )


def by_positions(visible):
    def attention(q, k, v):
        rows, columns = queries_and_keys()
        return attend(scores_of(q, k).masked_fill(~visible(rows, columns), -INF), v)

    return specs(check(attention, *qkv()))


def test_windows():
    assert_expected_inline(
        by_positions(lambda q, kv: (q - kv < 5) & (kv <= q)),
        """attention(score=0.25*s, mask=(kv <= q) & (kv >= q - 4), dead=nan)""",
    )
    assert_expected_inline(
        by_positions(lambda q, kv: (q - kv).abs() <= 3),
        """attention(score=0.25*s, mask=(kv <= q + 3) & (kv >= q - 3), dead=nan)""",
    )
    assert_expected_inline(
        by_positions(lambda q, kv: torch.logical_and(kv > q - 5, torch.le(kv, q))),
        """attention(score=0.25*s, mask=(kv <= q) & (kv >= q - 4), dead=nan)""",
    )
    assert_expected_inline(
        by_positions(lambda q, kv: torch.ones(S, S).tril(2).triu(-3).bool()),
        """attention(score=0.25*s, mask=(kv <= q + 2) & (kv >= q - 3), dead=nan)""",
    )


@pytest.mark.parametrize("width", [2**31 - 1, 2**31, 2**63 - 1], ids=str)
def test_a_window_of_the_largest_integer_is_none(width):
    assert_expected_inline(
        by_positions(lambda q, kv: (kv - q < width) & (q - kv < width)),
        """attention(score=0.25*s)""",
    )
    assert_expected_inline(
        by_positions(lambda q, kv: (kv <= q) & (kv > q - 2**29)),
        """attention(score=0.25*s, mask=(kv <= q) & (kv >= q - 536870911), dead=nan)""",
    )


def test_prefix():
    assert_expected_inline(
        by_positions(lambda q, kv: (kv < 7) | (kv <= q)),
        """attention(score=0.25*s, mask=(kv <= 6) | (kv <= q), dead=nan)""",
    )


def test_global_tokens_and_window():
    assert_expected_inline(
        by_positions(lambda q, kv: (q < 2) | (kv < 2) | ((q - kv).abs() <= 3)),
        """attention(score=0.25*s, mask=((kv <= q + 3) & (kv >= q - 3)) | (kv <= 1) | (q <= 1), dead=nan)""",
    )


def test_chunks():
    assert_expected_inline(
        by_positions(lambda q, kv: (q // 8 == kv // 8) & (kv <= q)),
        """attention(score=0.25*s, mask=(floordiv(q, 8) == floordiv(kv, 8)) & (kv <= q), dead=nan)""",
    )
    assert_expected_inline(
        by_positions(
            lambda q, kv: torch.eye(3).repeat_interleave(8, 0).repeat_interleave(8, 1) > 0
        ),
        """attention(score=0.25*s, mask=floordiv(q, 8) == floordiv(kv, 8), dead=nan)""",
    )


def test_dilated():
    assert_expected_inline(
        by_positions(lambda q, kv: ((q - kv) % 3 == 0) & (kv <= q)),
        """attention(score=0.25*s, mask=(kv <= q) & (mod(q - kv, 3) == 0), dead=nan)""",
    )


def test_strided():
    assert_expected_inline(
        by_positions(lambda q, kv: (kv <= q) & ((q - kv < 4) | (kv % 4 == 3))),
        """attention(score=0.25*s, mask=((kv >= q - 3) | (mod(kv, 4) == 3)) & (kv <= q), dead=nan)""",
    )


def test_exclusive_or():
    assert_expected_inline(
        by_positions(lambda q, kv: (kv <= q) ^ (kv < 3)),
        """attention(score=0.25*s, mask=((kv <= 2) & (kv >= q + 1)) | ((kv <= q) & (kv >= 3)), dead=nan)""",
    )


def test_each_head_its_own_window():
    def attention(q, k, v):
        rows, columns = queries_and_keys()
        width = 2 * torch.arange(H)[:, None, None] + 2
        return attend(scores_of(q, k).masked_fill((rows - columns).abs() > width, -INF), v)

    assert_expected_inline(
        specs(check(attention, *qkv())),
        """attention(score=0.25*s, mask=(kv <= 2*h + q + 2) & (kv >= q - 2*h - 2), dead=nan)""",
    )


def test_query_rows_at_the_end_of_a_cache():
    def attention(q, k, v):
        rows = torch.arange(S - 5, S)[:, None]
        return attend(scores_of(q, k).masked_fill(torch.arange(S)[None] > rows, -INF), v)

    _, k, v = qkv()
    assert_expected_inline(
        specs(check(attention, normal(B, H, 5, D), k, v)),
        """attention(score=0.25*s, mask=kv <= q + 19, dead=nan)""",
    )


def test_one_query_row():
    def attention(q, k, v, position):
        return attend(scores_of(q, k).masked_fill(torch.arange(S) > position, -INF), v)

    _, k, v = qkv()
    report = check(attention, normal(B, H, 1, D), k, v, torch.tensor([17]))
    assert_expected_inline(
        specs(report), """attention(score=0.25*s, mask=kv <= load(0, 0), dead=nan, aux=[int])"""
    )


def test_static_cache():
    def attention(q, k, v, cache_position):
        mask = torch.arange(S)[None] <= cache_position[:, None]
        return attend(scores_of(q, k) + torch.where(mask, 0.0, LOWEST)[None, None], v)

    _, k, v = qkv()
    report = check(attention, normal(B, H, 3, D), k, v, torch.tensor([9, 10, 11]))
    assert_expected_inline(
        specs(report),
        """attention(score=0.25*s, mask=kv <= load(0, q), dead=score, fill=0.25*s - 3.4028234663852886e+38, aux=[int])""",
    )


def test_documents():
    def attention(q, k, v, document):
        rows, columns = queries_and_keys()
        same = document[:, None, :, None] == document[:, None, None, :]
        return attend(scores_of(q, k).masked_fill(~(same & (columns <= rows)), -INF), v)

    report = check(attention, *qkv(), torch.arange(S).div(7).long().expand(B, S).contiguous())
    assert_expected_inline(
        specs(report),
        """attention(score=0.25*s, mask=(kv <= q) & (load(0, b, q) == load(0, b, kv)), dead=nan, aux=[int])""",
    )


def test_lengths():
    def attention(q, k, v, lengths):
        visible = torch.arange(S)[None, :] < lengths[:, None]
        return attend(scores_of(q, k).masked_fill(~visible[:, None, None, :], -INF), v)

    assert_expected_inline(
        specs(check(attention, *qkv(), torch.tensor([24, 11]))),
        """attention(score=0.25*s, mask=kv < load(0, b), dead=nan, aux=[int])""",
    )


def test_image_and_text():
    # Gemma 3: causal, but the tokens of one image see one another.
    def attention(q, k, v, image):
        rows, columns = queries_and_keys()
        inside = (image[:, None, :, None] == image[:, None, None, :]) & (image >= 0)[:, None, None]
        return attend(torch.where(inside | (columns <= rows), scores_of(q, k), -INF), v)

    image = torch.full((B, S), -1)
    image[0, 3:9], image[1, 12:20] = 0, 1
    assert_expected_inline(
        specs(check(attention, *qkv(), image)),
        """attention(score=0.25*s, mask=((load(0, b, kv) >= 0) & (load(0, b, q) == load(0, b, kv))) | (kv <= q), dead=nan, aux=[int])""",
    )


PASSED_IN = {
    "keys": ((S,), "kv"),
    "queries and keys": ((S, S), "q, kv"),
    "keys of each sequence": ((B, 1, 1, S), "b, 0, 0, kv"),
    "keys of each head": ((1, H, 1, S), "0, h, 0, kv"),
    "keys of each sequence and head": ((B, H, 1, S), "b, h, 0, kv"),
    "three axes": ((H, S, S), "h, q, kv"),
    "all axes": ((B, H, S, S), "b, h, q, kv"),
    "one head's": ((1, 1, S, S), "0, 0, q, kv"),
}


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


def test_tree():
    # Speculative decoding: a token sees its ancestors, found by following parents.
    def attention(q, k, v, parents):
        visible = torch.eye(S, dtype=torch.bool)
        at = torch.arange(S)
        for _ in range(3):
            at = parents[at]
            visible = visible | F.one_hot(at, S).bool()
        return attend(scores_of(q, k).masked_fill(~visible, -INF), v)

    assert_expected_inline(
        specs(check(attention, *qkv(), (torch.arange(S) - 1) // 2 % S)),
        """attention(score=0.25*s, mask=(load(0, q) == kv) | (load(0, where(load(0, q) < 0, load(0, q) + 24, load(0, q))) == kv) | (load(0, where(load(0, where(load(0, q) < 0, load(0, q) + 24, load(0, q))) < 0, load(0, where(load(0, q) < 0, load(0, q) + 24, load(0, q))) + 24, load(0, where(load(0, q) < 0, load(0, q) + 24, load(0, q))))) == kv) | (q == kv), dead=nan, aux=[int])""",
    )


LOGARITHMS_OF_MASKS = {
    "product": (lambda x: x * triangle(), "(kv <= q) & (load(0, b, 0, 0, kv) != 0)"),
    "difference": (lambda x: 1 - (1 - x) * future(), "(kv <= q) | (load(0, b, 0, 0, kv) != 0)"),
    "smaller": (lambda x: torch.minimum(x, triangle()), "(kv <= q) & (load(0, b, 0, 0, kv) != 0)"),
    "clamped sum": (
        lambda x: (x + triangle()).clamp(max=1),
        "(kv <= q) | (load(0, b, 0, 0, kv) != 0)",
    ),
}


@pytest.mark.parametrize("name", LOGARITHMS_OF_MASKS)
def test_logarithm_of_masks(name):
    of, mask = LOGARITHMS_OF_MASKS[name]

    def attention(q, k, v, seen):
        return attend(scores_of(q, k) + of(seen.float()).log(), v)

    seen = chance(0.8, B, 1, 1, S)
    spec = f"attention(score=0.25*s, mask={mask}, dead=nan, aux=[bool])"
    assert specs(check(attention, *qkv(), seen)) == spec


@pytest.mark.parametrize("learns", [False, True])
def test_logarithm_of_numbers_under_a_mask(learns):
    # What is no mask is read, as the program computes it.
    def attention(q, k, v, weights):
        return attend(scores_of(q, k) + (weights * triangle()).log(), v)

    weights = uniform(B, 1, 1, S).requires_grad_(learns)
    assert_expected_inline(
        specs(check(attention, *qkv(), weights)),
        """attention(score=load(0, b, 0, q, kv) + 0.25*s, mask=kv <= q, dead=nan, aux=[float])""",
    )


def test_mask_that_multiplies_the_scores():
    # 0 is not -inf: a hidden key keeps the weight exp(0).
    def attention(q, k, v):
        return attend(scores_of(q, k) * triangle(), v)

    assert_expected_inline(
        specs(check(attention, *qkv())), """attention(score=where(kv <= q, 0.25*s, 0))"""
    )


@pytest.mark.parametrize(
    "divided",
    [
        lambda s, t: s / t[:, None, None],
        lambda s, t: s * (1 / t)[:, None, None],
        lambda s, t: s / (t.abs()[:, None, None] * torch.arange(S) + 1),
    ],
)
@pytest.mark.parametrize("weigh", [lambda s: s.softmax(-1), torch.sigmoid])
def test_mask_that_multiplies_scores_with_a_temperature(divided, weigh):
    def attention(q, k, v, t):
        scores = divided(q @ k.mT, t) * triangle() + (1 - triangle()) * LOWEST
        return weigh(scores) @ v

    temperatures = uniform(H, seed=4).add_(3).requires_grad_()
    assert "mask=kv <= q" in specs(check(attention, *qkv(), temperatures))


def test_mask_that_multiplies_a_quotient_by_0():
    # 0 / 0 is NaN for the keys that the mask hides, and so is all of their rows.
    def attention(q, k, v, lengths):
        hidden = (lengths == 0).float()
        return attend(scores_of(q, k) / lengths * (1 - hidden) + hidden * LOWEST, v)

    report = check(attention, *qkv(), torch.arange(S).float(), training=False)
    assert specs(report) == "lift: not-pointwise"


def test_zero_times_infinity():
    # (1 - mask) * -inf is NaN where the mask is 1, and so is everything after it.
    def attention(q, k, v):
        return attend(scores_of(q, k) + (1 - triangle()) * -INF, v)

    assert_expected_inline(
        specs(check(attention, *qkv())),
        """attention(score=load(0, kv - q + 23) + 0.25*s, aux=[float])""",
    )


def test_numbers_that_only_decide_have_no_gradient():
    def attention(q, k, v, predicted):
        level = predicted.sigmoid()
        hidden = level[:, None, :, None] < level[:, None, None, :]
        return attend(scores_of(q, k).masked_fill(hidden, -10.0), v)

    assert "load(0, b, q) < load(0, b, kv)" in specs(check(attention, *qkv(), normal(B, S)))
