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
    future,
    normal,
    qkv,
    queries_and_keys,
    scores_of,
    triangle,
)

CAUSAL = "attention(score=0.25*s, mask=kv <= q, dead=nan)"


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


def test_numbers_that_only_decide_have_no_gradient():
    def attention(q, k, v, predicted):
        level = predicted.sigmoid()
        hidden = level[:, None, :, None] < level[:, None, None, :]
        return attend(scores_of(q, k).masked_fill(hidden, -10.0), v)

    assert "load(0, b, q) < load(0, b, kv)" in specs(check(attention, *qkv(), normal(B, S)))
