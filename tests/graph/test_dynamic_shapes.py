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
    SCALE,
    B,
    D,
    H,
    attend,
    normal,
    of_lengths,
    qkv,
    scores_of,
)


def causal(q, k, v):
    n = q.size(-2)
    return attend(scores_of(q, k).masked_fill(torch.ones(n, n).triu(1).bool(), -INF), v)


def test_plain():
    assert_expected_inline(
        runs(lambda q, k, v: attend(scores_of(q, k), v), of_lengths(24, 7, 40)),
        """attention(score=load(0)*s, aux=[float])""",
    )


def test_batch():
    inputs = [of_lengths(24, batch=n)[0] for n in (2, 3, 5)]
    assert_expected_inline(
        runs(causal, inputs), """attention(score=load(0)*s, mask=kv <= q, dead=nan, aux=[float])"""
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


def test_heads_split_and_merged():
    def attention(x):
        b, n, _ = x.shape
        q, k, v = x.view(b, n, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        return attend(scores_of(q, k), v).transpose(1, 2).reshape(b, n, H * D)

    inputs = [(normal(b, n, 3 * H * D),) for b, n in ((2, 24), (3, 7), (1, 40))]
    assert_expected_inline(
        runs(attention, inputs),
        """\
attention(score=load(0)*s, aux=[float], out_order=bqhd)
attention(score=load(0)*s, aux=[float], out_order=qbhd)""",
    )


def test_heads_folded_into_the_batch():
    def attention(q, k, v):
        b, h, n, d = q.shape
        q, k, v = (x.reshape(b * h, n, d) for x in (q, k, v))
        s = torch.bmm(q, k.transpose(1, 2)) * SCALE
        return torch.bmm(s.softmax(-1), v).view(b, h, n, d)

    assert_expected_inline(
        runs(attention, of_lengths(24, 7, 40)), """attention(score=load(0)*s, aux=[float])"""
    )


def test_grouped_heads():
    def attention(q, k, v):
        b, h, n, d = k.shape
        k, v = (x[:, :, None].expand(b, h, 2, n, d).reshape(b, 2 * h, n, d) for x in (k, v))
        return attend(scores_of(q, k), v)

    inputs = [
        (normal(B, 4, n, D), normal(B, 2, n, D, seed=1), normal(B, 2, n, D, seed=2))
        for n in (24, 7, 40)
    ]
    assert_expected_inline(
        runs(attention, inputs, dynamic=None),
        """\
attention(score=0.25*s)
attention(score=0.25*s)""",
    )


def test_grouped_heads_of_both_numbers():
    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def of(batch, heads, n):
        return (
            normal(batch, 4 * heads, n, D),
            normal(batch, heads, n, D),
            normal(batch, heads, n, 9),
        )

    # One compilation for as many query heads to a KV head, whatever their number.
    assert runs(attention, [of(3, 2, 24), of(4, 3, 7)]) == "attention(score=0.25*s)"
    # With three to one there is another, and its numbers are right.
    two = (normal(3, 6, 24, D), normal(3, 2, 24, D, seed=1), normal(3, 2, 24, D, seed=2))
    assert runs(attention, [two]) == "attention(score=0.25*s)"


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


def test_windows_of_a_picture_whose_size_changes():
    # Swin: windows folded into the batch, and which of them were shifted together read from a map.
    def windows(x):
        b, h, w, c = x.shape
        x = x.view(b, h // 2, 2, w // 2, 2, c)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)

    def attention(x, region):
        q = k = v = windows(x).unflatten(-1, (2, 8)).transpose(1, 2)
        scores = q @ k.mT * SCALE
        seen = windows(region)[..., 0]
        apart = seen[:, None] != seen[:, :, None]
        scores = scores.view(-1, len(seen), *scores.shape[1:]) - 100.0 * apart[:, None]
        return attend(scores.view(-1, *scores.shape[2:]), v)

    def picture(h, w):
        corner = torch.arange(h)[:, None] + torch.arange(w) > 5
        return normal(B, h, w, 16), corner[None, ..., None]

    inputs = [picture(4, 6), picture(8, 4)]
    [spec] = runs(attention, inputs, training=False).splitlines()
    assert spec.startswith("attention(score=load(0)*s + where(")
    # What is shifted together is read in the picture, as with fixed sizes: n0 windows high, n1 wide.
    assert (
        "load(1, 0, floordiv(q, 2) + 2*mod(floordiv(b, n1), n0), 2*mod(b, n1) + mod(q, 2)" in spec
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


def test_repeated_heads_of_dynamic_number():
    # Two of a size share a symbol, so that the heads are 2 * b**2 / b.
    def repeated(x):
        b, h, n, d = x.shape
        return x[:, :, None].expand(b, h, 2, n, d).reshape(b, 2 * h, n, d)

    def attention(q, k, v):
        return attend(scores_of(q, repeated(k)), repeated(v))

    report = check(attention, normal(2, 4, 9, 16), *(x[:, :2] for x in qkv()[1:]), dynamic=True)
    assert [r.fused for r in report.regions] == [True]


def test_a_mask_of_whole_blocks():
    # 4 * (n // 4) is n, says the broadcast of mask and scores; 2 * (n // 2) below is not.
    def blocks(q, k, v):
        chosen = (torch.arange(k.size(2) // 4) % 2 == 0).repeat_interleave(4)
        return attend(scores_of(q, k).masked_fill(chosen, -INF), v)

    def halves(q, k, v):
        even = 2 * (k.size(2) // 2)
        return attend(scores_of(q, k)[..., :even], v[:, :, :even])

    assert runs(blocks, of_lengths(24, 16, 40)).startswith("attention(score=load(0)*s, mask=")
    assert runs(halves, of_lengths(17, 23)) == "detect: keys-apart"


@pytest.mark.filterwarnings("error:Raw SymInt")
@pytest.mark.parametrize("training", [False, True])
def test_multi_head_attention(training):
    layer = nn.MultiheadAttention(32, H, dropout=0.0, batch_first=True).train(training)

    def attention(x):
        return layer(x, x, x, need_weights=False)[0]

    assert_expected_inline(
        runs(attention, [(normal(n, m, 32),) for n, m in ((2, 8), (3, 9))]),
        """attention(score=0.35355339059327373*s, out_order=qbhd)""",
    )


def test_dynamic_batches_of_equal_size():
    # Duck shaping gives both batch dimensions one symbol: the flattened batch is its square.
    q, k, v = (normal(3, 3, H, n, D, seed=n) for n in (7, 12, 12))
    report = check(lambda q, k, v: attend(scores_of(q, k), v), q, k, v, dynamic=True)
    assert len(report.fused) == 1, str(report)


def test_windows_of_a_length():
    # Block-local attention: 4 divides each length, a guard says, and the three are equal.
    def attention(q, k, v):
        q, k, v = (x.reshape(B, H, x.size(2) // 4, 4, D) for x in (q, k, v))
        out = torch.einsum("bhwij,bhwjd->bhwid", (q @ k.mT).softmax(-1), v)
        return out.reshape(B, H, -1, D)

    assert (
        runs(attention, of_lengths(12, 16, 24), dynamic=None)
        == "attention(score=s)\nattention(score=s)"
    )


def test_windows_of_a_picture_put_together_again():
    # Swin: the height and the width are known to be even by one guard, of their product.
    def attention(x):
        b, h, w, c = x.shape
        x = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        out = attend(x @ x.mT, x).view(b, h // 2, w // 2, 2, 2, c)
        return out.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)

    pictures = [(normal(B, h, w, 16),) for h, w in ((4, 6), (6, 10), (8, 4))]
    first, second = runs(attention, pictures, dynamic=None).splitlines()
    assert first.startswith("attention(score=s") and second.startswith("attention(score=s")


def test_a_length_of_windows_is_still_a_length():
    def attention(q, k, v):
        rows, columns = q.size(-2), k.size(-2)
        hidden = torch.ones(rows, columns).triu(columns - rows + 1).bool()
        pooled = k.view(B, H, columns // 4, 4, D).mean(3)
        return attend(scores_of(q, k).masked_fill(hidden, -INF), v) + pooled.sum(2, keepdim=True)

    inputs = [
        (normal(B, H, n, D), normal(B, H, m, D, seed=1), normal(B, H, m, D, seed=2))
        for n, m in ((5, 24), (3, 32), (8, 12))
    ]
    assert_expected_inline(
        runs(attention, inputs, dynamic=None),
        """\
attention(score=0.25*s, mask=kv <= q + 19, dead=nan)
attention(score=0.25*s, mask=kv <= Skv + q - Sq, dead=nan)""",
    )


def test_a_length_that_is_cut_to_whole_windows():
    # Nothing says that 4 divides it: 4 * (n // 4) is another size.
    def attention(q, k, v):
        q, k, v = (x[:, :, : x.size(2) // 4 * 4] for x in (q, k, v))
        q, k, v = (x.reshape(B, H, x.size(2) // 4, 4, D) for x in (q, k, v))
        return attend(q @ k.mT, v).reshape(B, H, -1, D)

    runs(attention, of_lengths(13, 18, 24), dynamic=None)


def test_lengths_whose_halves_lose_as_much():
    # (n // 2) * m = n * (m // 2) holds of odd lengths too.
    def attention(q, k, v):
        n, m = q.size(2), k.size(2)
        torch._check(n // 2 * m == n * (m // 2))
        return attend(scores_of(q, k)[..., : m // 2 * 2], v[:, :, : m // 2 * 2])

    assert runs(attention, of_lengths(17, 23)) == "detect: keys-apart"
