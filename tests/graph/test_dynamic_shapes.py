"""Lengths that change: symbols in the spec, one compilation, and eager's numbers at each length."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

from fa3_compile.report import collect
from tests.graph.harness import check, rewrite_only, runs, specs
from tests.graph.inputs import (
    INF,
    B,
    D,
    H,
    attend,
    causal,
    normal,
    of_lengths,
    qkv,
    scores_of,
)


def test_plain():
    assert_expected_inline(
        runs(lambda q, k, v: attend(scores_of(q, k), v), of_lengths(24, 7, 40)),
        """attention(score=load(0)*s, aux=[float])""",
    )


def test_causal():
    assert_expected_inline(
        runs(causal, of_lengths(24, 7, 40)),
        """attention(score=load(0)*s, mask=kv <= q, dead=nan, aux=[float])""",
    )


def test_causal_with_a_window():
    def attention(q, k, v):
        at = torch.arange(q.size(-2))
        d = at[:, None] - at[None]
        return attend(scores_of(q, k).masked_fill((d < 0) | (d >= 5), -INF), v)

    assert_expected_inline(
        runs(attention, of_lengths(24, 7, 40)),
        """attention(score=load(0)*s, mask=(kv <= q) & (kv >= q - 4), dead=nan, aux=[float])""",
    )


def test_queries_at_the_end_of_the_keys():
    def attention(q, k, v):
        rows, columns = q.size(-2), k.size(-2)
        hidden = torch.ones(rows, columns).triu(columns - rows + 1).bool()
        return attend(scores_of(q, k).masked_fill(hidden, -INF), v)

    inputs = [
        (normal(B, H, n, D), normal(B, H, m, D, seed=1), normal(B, H, m, D, seed=2))
        for n, m in ((5, 24), (3, 30), (8, 9))
    ]
    assert_expected_inline(
        runs(attention, inputs),
        """attention(score=load(0)*s, mask=kv <= Skv + q - Sq, dead=nan, aux=[float])""",
    )


def test_cross_attention():
    inputs = [
        (normal(B, H, n, D), normal(B, H, m, D, seed=1), normal(B, H, m, D, seed=2))
        for n, m in ((5, 24), (24, 6), (8, 9))
    ]
    assert_expected_inline(
        runs(lambda q, k, v: attend(scores_of(q, k), v), inputs),
        """attention(score=load(0)*s, aux=[float])""",
    )


def test_cache_that_grows():
    def attention(q, k, v, past_k, past_v):
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return attend(scores_of(q, k), v)

    inputs = [
        (*of_lengths(1)[0], normal(B, H, n, D, seed=5), normal(B, H, n, D, seed=6))
        for n in (4, 5, 6, 17)
    ]
    assert_expected_inline(
        runs(attention, inputs),
        """\
attention(score=load(0)*s, aux=[float])
attention(score=load(0)*s, aux=[float])""",
    )


@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_growing_cache_compiles_a_bounded_number_of_times(q_len, dynamic):
    def attention(q, k, v, past_k, past_v):
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        at = torch.arange(k.size(2))
        seen = at[None] <= at[-q.size(2) :, None]
        return attend(scores_of(q, k).masked_fill(~seen, -INF), v)

    def past(n):
        return normal(B, H, n, D, seed=5).detach(), normal(B, H, n, D, seed=6).detach()

    new = [x.detach() for x in of_lengths(q_len)[0]]
    compiled = torch.compile(attention, backend=rewrite_only, dynamic=dynamic)
    with collect() as report:
        for n in (7, 9, 10, 31, 64):
            args = (*new, *past(n))
            torch.testing.assert_close(compiled(*args), attention(*args), atol=2e-5, rtol=2e-5)
    # Automatic: once for the first length, once for every other.
    assert [region.fused for region in report.regions] == [True] * (1 if dynamic else 2)


def test_alibi():
    def attention(q, k, v):
        at = torch.arange(q.size(-2))
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
        return attend(scores_of(q, k) + slopes[:, None, None] * (at[None] - at[:, None]), v)

    assert_expected_inline(
        runs(attention, of_lengths(24, 7, 40)),
        """attention(score=(kv - q)*load(1, h) + load(0)*s, aux=[float, float])""",
    )


def test_padding():
    def attention(q, k, v, padding):
        bias = torch.where(padding, 0.0, torch.finfo(q.dtype).min)[:, None, None, :]
        return attend(scores_of(q, k) + bias, v)

    inputs = [
        (*x, torch.arange(n) >= torch.tensor([[0], [2]]))
        for x, n in zip(of_lengths(24, 7, 40), (24, 7, 40), strict=True)
    ]
    assert_expected_inline(
        runs(attention, inputs),
        """attention(score=load(0)*s, mask=load(1, b, kv) != 0, dead=score, fill=load(0)*s - 3.4028234663852886e+38, aux=[float, bool])""",
    )


def test_relative_table():
    def attention(q, k, v, table):
        n = q.size(-2)
        at = torch.arange(n)
        place = (at[None] - at[:, None]).clamp(-8, 8) + 8
        return attend(scores_of(q, k) + table[place].permute(2, 0, 1), v)

    inputs = [(*x, normal(17, H, seed=9)) for x in of_lengths(24, 7, 40)]
    assert_expected_inline(
        runs(attention, inputs),
        """attention(score=load(0)*s + load(1, where(min(8, max(-8, kv - q)) + 8 < 0, min(8, max(-8, kv - q)) + n0 + 8, min(8, max(-8, kv - q)) + 8), h), aux=[float, float])""",
    )


def test_sdpa():
    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    assert_expected_inline(
        runs(attention, of_lengths(24, 7, 40)),
        """attention(score=0.25*s, mask=kv <= q, dead=nan)""",
    )


class Sliced(nn.Module):
    """nanoGPT: a buffer of the longest length, cut to this one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, q, k, v):
        n = q.size(2)
        return attend(scores_of(q, k).masked_fill(self.bias[:, :, :n, :n] == 0, -INF), v)


def test_sliced_buffer():
    assert_expected_inline(
        runs(Sliced(), of_lengths(24, 7, 40)),
        """attention(score=load(1)*s, mask=load(0, 0, 0, q, kv) != 0, dead=nan, aux=[float, float])""",
    )


@pytest.mark.parametrize("dim", [0, 2], ids=["batch", "length"])
def test_marked_dimension(dim):
    def attention(q, k, v):
        return causal(q, k, v)

    first = [x.detach() for x in of_lengths(24)[0]]
    for x in first:
        torch._dynamo.mark_dynamic(x, dim)
    compiled = torch.compile(attention, backend=rewrite_only)
    with collect() as report:
        compiled(*first)
        others = of_lengths(24, batch=3) if dim == 0 else of_lengths(9, 33)
        for other in ([x.detach() for x in args] for args in others):
            torch.testing.assert_close(compiled(*other), attention(*other), atol=2e-5, rtol=2e-5)
    assert specs(report) == "attention(score=0.25*s, mask=kv <= q, dead=nan)"


def test_one_compilation_for_every_length():
    compiled = torch.compile(causal, backend=rewrite_only, dynamic=True)
    with collect() as report:
        for args in of_lengths(24, 7, 40, 100, 3):
            compiled(*args)
    assert len(report.regions) == 1


def test_products_by_einsum():
    def attention(q, k, v, extra):
        k, v = (torch.cat([x[None].expand(B, -1, -1, -1), y], -2) for x, y in zip(extra, (k, v)))
        p = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
        return torch.einsum("bhij,bhjd->bhid", p, v)

    inputs = [(*qkv(B, H, n, D), normal(2, H, 1, D)) for n in (9, 14)]
    assert runs(attention, inputs) == "attention(score=s)"


def test_a_near_miss_is_reported_as_of_fixed_sizes():
    def attention(q, k, v):
        p = scores_of(q, k).sigmoid()
        return (p / p.cumsum(-1)) @ v

    for dynamic in (False, True):
        assert specs(check(attention, *qkv(), dynamic=dynamic)) == "lift: not-pointwise"


def test_products_without_a_softmax():
    def attention(q, k, v):
        return (scores_of(q, k) + 0.1) @ v

    assert specs(check(attention, *qkv(), dynamic=True)) == "lift: linear"
