"""Where batch, heads, queries and keys lie: the same attention in any order and rank of axes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from tests.graph.harness import check, rewrite_only, specs
from tests.graph.inputs import SCALE, B, D, H, S, attend, chance, normal, plain, qkv, scores_of


def test_einsum_in_any_layout():
    def bshd(q, k, v):
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(SCALE).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    def sbhd(q, k, v):
        weights = torch.einsum("qbhd,kbhd->bhqk", q, k).mul(SCALE).softmax(-1)
        return torch.einsum("bhqk,kbhd->qbhd", weights, v)

    def heads_last(q, k, v):
        weights = torch.einsum("bqdh,bkdh->bqkh", q, k).mul(SCALE).softmax(2)
        return torch.einsum("bqkh,bkdh->bqdh", weights, v)

    def keys_before_queries(q, k, v):
        weights = torch.einsum("bhqd,bhkd->kbhq", q, k).mul(SCALE).softmax(0)
        return torch.einsum("kbhq,bhkd->dqhb", weights, v)

    assert_expected_inline(specs(check(bshd, *qkv(B, S, H, D))), """attention(score=0.25*s)""")
    assert_expected_inline(specs(check(sbhd, *qkv(S, B, H, D))), """attention(score=0.25*s)""")
    assert_expected_inline(
        specs(check(heads_last, *qkv(B, S, D, H))), """attention(score=0.25*s)"""
    )
    assert_expected_inline(specs(check(keys_before_queries, *qkv())), """attention(score=0.25*s)""")


def test_two_dimensions():
    assert_expected_inline(
        specs(check(plain, *qkv(S, D))), """attention(score=0.25*s, out_order=qbhd)"""
    )
    assert_expected_inline(
        specs(check(lambda q, k, v: (q @ k.T).softmax(1) @ v, *qkv(S, D))),
        """attention(score=s, out_order=qbhd)""",
    )
    assert_expected_inline(
        specs(check(lambda q, k, v: torch.inner(q, k).softmax(-1) @ v, *qkv(S, D))),
        """attention(score=s, out_order=qbhd)""",
    )
    assert_expected_inline(
        specs(
            check(lambda q, k, v: torch.tensordot(q, k, ([1], [1])).softmax(-1).mm(v), *qkv(S, D))
        ),
        """attention(score=s, out_order=qbhd)""",
    )


def test_three_dimensions():
    def diffusers(q, k, v):
        s = torch.baddbmm(torch.empty(B * H, S, S), q, k.transpose(-1, -2), beta=0, alpha=SCALE)
        return torch.bmm(s.softmax(-1), v)

    assert_expected_inline(
        specs(check(plain, *qkv(B * H, S, D))), """attention(score=0.25*s, out_order=bqhd)"""
    )
    assert_expected_inline(
        specs(check(diffusers, *qkv(B * H, S, D))), """attention(score=0.25*s, out_order=bqhd)"""
    )


def test_baddbmm_adds_its_mask():
    def attention(q, k, v, mask):
        return torch.bmm(torch.baddbmm(mask, q, k.mT, alpha=SCALE, beta=2).softmax(-1), v)

    q, k, v = qkv(B * H, S, D)
    assert_expected_inline(
        specs(check(attention, q, k, v, normal(B * H, S, S))),
        """attention(score=2*load(0, b, q, kv) + 0.25*s, aux=[float], out_order=bqhd)""",
    )
    assert_expected_inline(
        specs(check(attention, q, k, v, normal(B * H, 1, S))),
        """attention(score=2*load(0, b, 0, kv) + 0.25*s, aux=[float], out_order=bqhd)""",
    )


def test_five_and_six_dimensions():
    assert_expected_inline(specs(check(plain, *qkv(2, 3, H, S, D))), """attention(score=0.25*s)""")
    assert_expected_inline(
        specs(check(plain, *qkv(2, 3, 2, H, S, D))), """attention(score=0.25*s)"""
    )


def test_window_partition():
    # Windows of a picture, folded into the batch and back.
    def attention(q, k, v):
        def windows(x: Tensor) -> Tensor:
            x = x.view(B, 2, 4, 2, 4, H, D).permute(0, 1, 3, 5, 2, 4, 6)
            return x.reshape(B * 4, H, 16, D)

        y = plain(windows(q), windows(k), windows(v))
        return y.view(B, 2, 2, H, 4, 4, D).permute(0, 1, 4, 2, 5, 3, 6).reshape(B, 8, 8, H, D)

    assert_expected_inline(
        specs(check(attention, *qkv(B, 8, 8, H, D))), """attention(score=0.25*s, out_order=bqhd)"""
    )


def test_axial():
    def attention(q, k, v):
        rows = plain(*(x.permute(0, 1, 3, 2, 4) for x in (q, k, v)))
        return rows.permute(0, 1, 3, 2, 4)

    assert_expected_inline(
        specs(check(attention, *qkv(B, 5, 6, H, D))), """attention(score=0.25*s)"""
    )


def test_fused_projection():
    def unbound(x):
        q, k, v = x.view(B, S, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        return plain(q, k, v).transpose(1, 2).reshape(B, S, H * D)

    def chunked(x):
        q, k, v = (t.view(B, S, H, D).transpose(1, 2) for t in x.chunk(3, dim=-1))
        return plain(q, k, v).transpose(1, 2).contiguous().view(B, S, H * D)

    def interleaved(x):
        # GPT-NeoX: each head's q, k and v lie together.
        q, k, v = x.view(B, S, H, 3 * D).transpose(1, 2).split(D, dim=-1)
        return plain(q, k, v).transpose(1, 2).flatten(2)

    def sliced(x):
        q, k, v = (x[..., i * H * D : (i + 1) * H * D] for i in range(3))
        q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in (q, k, v))
        return plain(q, k, v).transpose(1, 2).flatten(-2)

    for function in (unbound, chunked, interleaved, sliced):
        assert specs(check(function, normal(B, S, 3 * H * D))) == (
            "attention(score=0.25*s, out_order=bqhd)"
        )


def test_keys_permuted():
    # K arrives as [B, S, H, D]; `permute(0, 2, 3, 1)` is its transpose.
    def attention(q, k, v):
        return (q @ k.permute(0, 2, 3, 1) * SCALE).softmax(-1) @ v.permute(0, 2, 1, 3)

    q, _, _ = qkv()
    assert_expected_inline(
        specs(check(attention, q, normal(B, S, H, D), normal(B, S, H, D))),
        """attention(score=0.25*s)""",
    )


def test_keys_already_transposed():
    q, _, v = qkv()
    assert_expected_inline(
        specs(check(lambda q, k, v: (q @ k).softmax(-1) @ v, q, normal(B, H, D, S), v)),
        """attention(score=s)""",
    )


def test_cross_attention_with_another_width_of_values():
    q, _, _ = qkv()
    assert_expected_inline(
        specs(check(plain, q, normal(B, H, 13, D), normal(B, H, 13, 5))),
        """attention(score=0.25*s)""",
    )


def test_shared_tensors():
    q, k, _ = qkv()
    assert_expected_inline(specs(check(lambda x: plain(x, x, x), q)), """attention(score=0.25*s)""")
    assert_expected_inline(
        specs(check(lambda x, y: plain(x, y, y), q, k)), """attention(score=0.25*s)"""
    )
    assert_expected_inline(
        specs(check(lambda x, y: plain(x, y, x), q, k)), """attention(score=0.25*s)"""
    )


def test_channels_attend_to_channels():
    # XCiT, with keys and queries as columns: an attention whose head dimension is the length.
    def attention(q, k, v):
        return attend(F.normalize(q, dim=-1).mT @ F.normalize(k, dim=-1), v.mT).mT

    assert_expected_inline(specs(check(attention, *qkv())), """attention(score=s)""")


def test_latent_attention_of_deepseek():
    # A rotated part that all heads share, beside a part of their own.
    def attention(q, latent, rotated, up_k, up_v):
        k = (latent @ up_k).view(B, S, H, 8).transpose(1, 2)
        v = (latent @ up_v).view(B, S, H, 12).transpose(1, 2)
        k = torch.cat([k, rotated[:, None].expand(B, H, S, 8)], dim=-1)
        return plain(q, k, v)

    report = check(
        attention,
        qkv()[0],
        normal(B, S, 10),
        normal(B, S, 8),
        normal(10, H * 8),
        normal(10, H * 12),
    )
    assert_expected_inline(specs(report), """attention(score=0.25*s)""")


def test_cache_that_grows():
    def attention(q, k, v, past_k, past_v):
        return plain(q, torch.cat([past_k, k], 2), torch.cat([past_v, v], 2))

    q, k, v = qkv(B, H, 1, D)
    report = check(attention, q, k, v, normal(B, H, 9, D, seed=7), normal(B, H, 9, D, seed=8))
    assert_expected_inline(specs(report), """attention(score=0.25*s)""")


def test_static_cache_that_is_written():
    def attention(q, k, v, cache_k, cache_v, position):
        cache_k = cache_k.index_copy(2, position, k)
        cache_v = cache_v.index_copy(2, position, v)
        s = scores_of(q, cache_k).masked_fill(torch.arange(12) > position, -torch.inf)
        return attend(s, cache_v), cache_k

    q, k, v = qkv(B, H, 1, D)
    cache = normal(B, H, 12, D, seed=7), normal(B, H, 12, D, seed=8)
    assert_expected_inline(
        specs(check(attention, q, k, v, *cache, torch.tensor([5]))),
        """attention(score=0.25*s, mask=kv <= load(0, 0), dead=nan, aux=[int])""",
    )


def test_one_query_and_one_key():
    q, k, v = qkv(B, H, 1, D)
    assert_expected_inline(
        specs(check(plain, q, normal(B, H, S, D), normal(B, H, S, D))),
        """attention(score=0.25*s)""",
    )
    assert_expected_inline(specs(check(plain, q, k, v)), """detect: single-key""")


def test_one_head_and_one_sequence():
    assert_expected_inline(
        specs(check(plain, *qkv(1, 1, S, D))), """attention(score=0.25*s, out_order=qbhd)"""
    )
    assert_expected_inline(
        specs(check(plain, *qkv(1, H, S, D))), """attention(score=0.25*s, out_order=bqhd)"""
    )
    assert_expected_inline(
        specs(check(plain, *qkv(B, 1, S, D))), """attention(score=0.25*s, out_order=bqhd)"""
    )


def test_head_dimension_of_one():
    assert_expected_inline(specs(check(plain, *qkv(B, H, S, 1))), """attention(score=0.25*s)""")

    def features(q, k, v):
        # Each feature attends to all features, as in a GAN's discriminator without pixels.
        return torch.bmm(v, torch.bmm(q, k).softmax(-1).mT)

    inputs = normal(B, S, 1), normal(B, 1, S, seed=2), normal(B, 1, S, seed=3)
    assert specs(check(features, *inputs)) == "attention(score=s, out_order=bqhd)"


def test_empty_batch():
    def attention(q, k, v):
        return attend(scores_of(q, k), v)

    report = check(attention, *qkv(0, H, S, D))
    assert_expected_inline(specs(report), """detect: empty""")
    assert_expected_inline(specs(check(attention, *qkv(B, H, 0, D))), """detect: empty""")


def test_output_viewed_at_once():
    views = {
        "bhqd": lambda y: y.flatten(1, 2),
        "transposed": lambda y: y.transpose(1, 2).reshape(B, S, H * D),
        "permuted": lambda y: y.permute(0, 2, 1, 3).contiguous().view(B, S, -1),
        "heads into batch": lambda y: y.reshape(B * H, S, D)[1:],
        "one head": lambda y: y[:, 1],
        "one query": lambda y: y[:, :, -1],
        "halves": lambda y: torch.cat(y.chunk(2, -1), -2),
        "split": lambda y: y.split(2, dim=1)[1],
    }
    for name, view in views.items():
        report = check(lambda q, k, v, view=view: view(plain(q, k, v)), *qkv())
        assert [region.fused for region in report.regions] == [True], name


def test_output_read_twice():
    def attention(q, k, v):
        y = plain(q, k, v)
        return y.transpose(1, 2).reshape(B, S, H * D), y.sum(), y[:, 0]

    assert_expected_inline(specs(check(attention, *qkv())), """attention(score=0.25*s)""")


def test_output_of_another_memory_order_is_eagers():
    def attention(q, k, v):
        return torch.einsum("bhqk,bkhd->bqhd", scores_of(q, k).softmax(-1), v)

    q, k, _ = qkv()
    v = normal(B, S, H, D)
    ours = torch.compile(attention, backend=rewrite_only)(q, k, v)
    assert ours.stride() == attention(q, k, v).stride()


def test_mask_in_the_layout_of_the_scores():
    def attention(q, k, v, mask):
        s = torch.einsum("bqhd,bkhd->bqkh", q, k) * SCALE
        weights = s.masked_fill(mask[:, :, :, None], -torch.inf).softmax(2)
        return torch.einsum("bqkh,bkhd->bqhd", weights, v)

    mask = chance(0.3, B, S, S)
    mask[..., 0] = False
    assert_expected_inline(
        specs(check(attention, *qkv(B, S, H, D), mask)),
        """attention(score=0.25*s, mask=load(0, b, q, kv) == 0, dead=nan, aux=[bool])""",
    )
