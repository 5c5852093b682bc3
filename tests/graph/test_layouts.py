"""Where batch, heads, queries and keys lie: the same attention in any order and rank of axes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from tests.graph.harness import check, rewrite_only, specs
from tests.graph.inputs import INF, SCALE, B, D, H, S, attend, chance, normal, plain, qkv, scores_of


def fused(function, *args) -> str:
    return specs(check(function, *args))


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

    assert_expected_inline(fused(bshd, *qkv(B, S, H, D)), """attention(score=0.25*s)""")
    assert_expected_inline(fused(sbhd, *qkv(S, B, H, D)), """attention(score=0.25*s)""")
    assert_expected_inline(fused(heads_last, *qkv(B, S, D, H)), """attention(score=0.25*s)""")
    assert_expected_inline(fused(keys_before_queries, *qkv()), """attention(score=0.25*s)""")


def test_two_dimensions():
    assert_expected_inline(fused(plain, *qkv(S, D)), """attention(score=0.25*s, out_order=qbhd)""")
    assert_expected_inline(
        fused(lambda q, k, v: (q @ k.T).softmax(1) @ v, *qkv(S, D)),
        """attention(score=s, out_order=qbhd)""",
    )
    assert_expected_inline(
        fused(lambda q, k, v: torch.inner(q, k).softmax(-1) @ v, *qkv(S, D)),
        """attention(score=s, out_order=qbhd)""",
    )
    assert_expected_inline(
        fused(lambda q, k, v: torch.tensordot(q, k, ([1], [1])).softmax(-1).mm(v), *qkv(S, D)),
        """attention(score=s, out_order=qbhd)""",
    )


def test_three_dimensions():
    def diffusers(q, k, v):
        s = torch.baddbmm(torch.empty(B * H, S, S), q, k.transpose(-1, -2), beta=0, alpha=SCALE)
        return torch.bmm(s.softmax(-1), v)

    assert_expected_inline(
        fused(plain, *qkv(B * H, S, D)), """attention(score=0.25*s, out_order=bqhd)"""
    )
    assert_expected_inline(
        fused(diffusers, *qkv(B * H, S, D)), """attention(score=0.25*s, out_order=bqhd)"""
    )


def test_baddbmm_adds_its_mask():
    def attention(q, k, v, mask):
        return torch.bmm(torch.baddbmm(mask, q, k.mT, alpha=SCALE, beta=2).softmax(-1), v)

    q, k, v = qkv(B * H, S, D)
    assert_expected_inline(
        fused(attention, q, k, v, normal(B * H, S, S)),
        """attention(score=2*load(0, b, q, kv) + 0.25*s, aux=[float], out_order=bqhd)""",
    )
    assert_expected_inline(
        fused(attention, q, k, v, normal(B * H, 1, S)),
        """attention(score=2*load(0, b, 0, kv) + 0.25*s, aux=[float], out_order=bqhd)""",
    )


def test_five_and_six_dimensions():
    assert_expected_inline(fused(plain, *qkv(2, 3, H, S, D)), """attention(score=0.25*s)""")
    assert_expected_inline(fused(plain, *qkv(2, 3, 2, H, S, D)), """attention(score=0.25*s)""")


def test_window_partition():
    # Windows of a picture, folded into the batch and back.
    def attention(q, k, v):
        def windows(x: Tensor) -> Tensor:
            x = x.view(B, 2, 4, 2, 4, H, D).permute(0, 1, 3, 5, 2, 4, 6)
            return x.reshape(B * 4, H, 16, D)

        y = plain(windows(q), windows(k), windows(v))
        return y.view(B, 2, 2, H, 4, 4, D).permute(0, 1, 4, 2, 5, 3, 6).reshape(B, 8, 8, H, D)

    assert_expected_inline(
        fused(attention, *qkv(B, 8, 8, H, D)), """attention(score=0.25*s, out_order=bqhd)"""
    )


def test_axial():
    def attention(q, k, v):
        rows = plain(*(x.permute(0, 1, 3, 2, 4) for x in (q, k, v)))
        return rows.permute(0, 1, 3, 2, 4)

    assert_expected_inline(fused(attention, *qkv(B, 5, 6, H, D)), """attention(score=0.25*s)""")


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
        assert fused(function, normal(B, S, 3 * H * D)) == (
            "attention(score=0.25*s, out_order=bqhd)"
        )


def test_grouped_heads():
    def expanded(q, k, v):
        k, v = (x[:, :, None].expand(B, 2, 2, S, D).reshape(B, 4, S, D) for x in (k, v))
        return plain(q, k, v)

    def interleaved(q, k, v):
        return plain(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1))

    def tiled(q, k, v):
        return plain(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))

    def broadcast(q, k, v):
        return plain(q.view(B, 2, 2, S, D), k[:, :, None], v[:, :, None]).view(B, 4, S, D)

    def stacked(q, k, v):
        k, v = (torch.stack([x, x], dim=2).flatten(1, 2) for x in (k, v))
        return plain(q, k, v)

    def indexed(q, k, v):
        heads = torch.arange(4) // 2
        return plain(q, k[:, heads], v[:, heads])

    def rows(q, k, v):
        # The queries of a group one below the other.
        return plain(q.reshape(B, 2, 2 * S, D), k, v).view(B, 4, S, D)

    q, _, _ = qkv()
    k, v = normal(B, 2, S, D, seed=5), normal(B, 2, S, D, seed=6)
    assert_expected_inline(fused(expanded, q, k, v), """attention(score=0.25*s)""")
    assert_expected_inline(fused(interleaved, q, k, v), """attention(score=0.25*s)""")
    assert_expected_inline(fused(tiled, q, k, v), """attention(score=0.25*s)""")
    assert_expected_inline(fused(broadcast, q, k, v), """attention(score=0.25*s)""")
    assert_expected_inline(fused(stacked, q, k, v), """attention(score=0.25*s)""")
    assert_expected_inline(fused(indexed, q, k, v), """attention(score=0.25*s)""")
    assert_expected_inline(fused(rows, q, k, v), """attention(score=0.25*s)""")


def test_grouped_heads_are_not_expanded():
    def attention(q, k, v):
        k, v = (x[:, :, None].expand(B, 2, 2, S, D).reshape(B, 4, S, D) for x in (k, v))
        return plain(q, k, v)

    shapes = []

    def backend(gm, example_inputs):
        rewrite_only(gm, example_inputs)
        [op] = [n for n in gm.graph.nodes if n.target is torch.ops.fa3.attention.default]
        shapes.extend(op.args[1:3])
        return gm

    q, _, _ = qkv()
    torch.compile(attention, backend=backend)(q, normal(B, 2, S, D), normal(B, 2, S, D))
    # K and V are the inputs themselves.
    assert [node.op for node in shapes] == ["placeholder", "placeholder"]


def test_grouped_heads_with_a_bias_for_each_head():
    def attention(q, k, v, bias):
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        return attend(scores_of(q, k) + bias[:, None, None], v)

    q, _, _ = qkv()
    k, v = normal(B, 2, S, D, seed=5), normal(B, 2, S, D, seed=6)
    assert_expected_inline(
        fused(attention, q, k, v, normal(H)),
        """attention(score=load(0, h) + 0.25*s, aux=[float])""",
    )


def test_one_key_head():
    q, _, _ = qkv()
    k, v = normal(B, 1, S, D, seed=5), normal(B, 1, S, D, seed=6)
    assert_expected_inline(fused(plain, q, k, v), """attention(score=0.25*s)""")
    assert_expected_inline(fused(plain, q, k[:, 0, None], v), """attention(score=0.25*s)""")
    # One head seen four times, with stride 0.
    assert_expected_inline(
        fused(lambda q, k, v: plain(q, k.expand(B, H, S, D), v.expand(B, H, S, D)), q, k, v),
        """attention(score=0.25*s)""",
    )


def test_inputs_of_stride_zero():
    q, k, _ = (x.detach() for x in qkv())
    k = k[:, :1].expand(B, H, S, D)
    torch.testing.assert_close(torch.compile(plain, backend=rewrite_only)(q, k, k), plain(q, k, k))


def test_keys_of_one_batch_element_for_all():
    q, _, _ = qkv()
    assert_expected_inline(
        fused(plain, q, normal(1, H, S, D), normal(1, H, S, D)), """attention(score=0.25*s)"""
    )
    assert_expected_inline(
        fused(plain, q, normal(H, S, D), normal(H, S, D)), """attention(score=0.25*s)"""
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_table_of_queries_for_all_batches(dynamic):
    """PyTorch makes one matrix product of it, whose rows are the keys of all batches."""

    def matmul(table, k, v, hidden):
        scores = (table @ k.mT).masked_fill(hidden, -INF)
        return scores.softmax(-1) @ v

    def einsum(table, k, v, hidden):
        scores = torch.einsum("bnd,qd->bqn", k.tanh(), table).masked_fill(hidden, -INF)
        return torch.einsum("bqn,bnd->bqd", scores.softmax(-1), v)

    def keys_before_queries(table, k, v, hidden):
        scores = (k @ table.T).masked_fill(hidden.mT, -INF)
        return scores.softmax(1).mT @ v

    table, (k, v) = normal(5, D, seed=7), qkv(B, S, D)[1:]
    hidden = torch.arange(S).view(1, 1, S) >= torch.tensor([S, 9]).view(B, 1, 1)
    for function in (matmul, einsum, keys_before_queries):
        (spec,) = specs(check(function, table, k, v, hidden, dynamic=dynamic)).splitlines()
        assert spec.startswith("attention(score=s, mask=load(0, b, ")


def test_keys_permuted():
    # K arrives as [B, S, H, D]; `permute(0, 2, 3, 1)` is its transpose.
    def attention(q, k, v):
        return (q @ k.permute(0, 2, 3, 1) * SCALE).softmax(-1) @ v.permute(0, 2, 1, 3)

    q, _, _ = qkv()
    assert_expected_inline(
        fused(attention, q, normal(B, S, H, D), normal(B, S, H, D)), """attention(score=0.25*s)"""
    )


def test_keys_already_transposed():
    q, _, v = qkv()
    assert_expected_inline(
        fused(lambda q, k, v: (q @ k).softmax(-1) @ v, q, normal(B, H, D, S), v),
        """attention(score=s)""",
    )


def test_cross_attention_with_another_width_of_values():
    q, _, _ = qkv()
    assert_expected_inline(
        fused(plain, q, normal(B, H, 13, D), normal(B, H, 13, 5)), """attention(score=0.25*s)"""
    )


def test_shared_tensors():
    q, k, _ = qkv()
    assert_expected_inline(fused(lambda x: plain(x, x, x), q), """attention(score=0.25*s)""")
    assert_expected_inline(fused(lambda x, y: plain(x, y, y), q, k), """attention(score=0.25*s)""")
    assert_expected_inline(fused(lambda x, y: plain(x, y, x), q, k), """attention(score=0.25*s)""")


def test_channels_attend_to_channels():
    # XCiT, with keys and queries as columns: an attention whose head dimension is the length.
    def attention(q, k, v):
        return attend(F.normalize(q, dim=-1).mT @ F.normalize(k, dim=-1), v.mT).mT

    assert_expected_inline(fused(attention, *qkv()), """attention(score=s)""")


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
        fused(attention, q, k, v, *cache, torch.tensor([5])),
        """attention(score=0.25*s, mask=kv <= load(0, 0), dead=nan, aux=[int])""",
    )


def test_one_query_and_one_key():
    q, k, v = qkv(B, H, 1, D)
    assert_expected_inline(
        fused(plain, q, normal(B, H, S, D), normal(B, H, S, D)), """attention(score=0.25*s)"""
    )
    assert_expected_inline(fused(plain, q, k, v), """detect: single-key""")


def test_one_head_and_one_sequence():
    assert_expected_inline(
        fused(plain, *qkv(1, 1, S, D)), """attention(score=0.25*s, out_order=qbhd)"""
    )
    assert_expected_inline(
        fused(plain, *qkv(1, H, S, D)), """attention(score=0.25*s, out_order=bqhd)"""
    )
    assert_expected_inline(
        fused(plain, *qkv(B, 1, S, D)), """attention(score=0.25*s, out_order=bqhd)"""
    )


def test_head_dimension_of_one():
    assert_expected_inline(fused(plain, *qkv(B, H, S, 1)), """attention(score=0.25*s)""")

    def features(q, k, v):
        # Each feature attends to all features, as in a GAN's discriminator without pixels.
        return torch.bmm(v, torch.bmm(q, k).softmax(-1).mT)

    inputs = normal(B, S, 1), normal(B, 1, S, seed=2), normal(B, 1, S, seed=3)
    assert fused(features, *inputs) == "attention(score=s, out_order=bqhd)"


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

    assert_expected_inline(fused(attention, *qkv()), """attention(score=0.25*s)""")


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
        fused(attention, *qkv(B, S, H, D), mask),
        """attention(score=0.25*s, mask=load(0, b, q, kv) == 0, dead=nan, aux=[bool])""",
    )


def test_positions_before_heads_that_share_their_keys():
    # The rows of one product run over positions and heads: those compared with keys are queries.
    def attention(q, k, v):
        s = torch.einsum("bshd,btd->bsht", q, k) * SCALE
        hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
        p = s.masked_fill(hidden[:, None], -INF).softmax(-1)
        return torch.einsum("bsht,btd->bshd", p, v)

    q, k, v = normal(B, S, H, D), normal(B, S, D, seed=1), normal(B, S, D, seed=2)
    assert_expected_inline(
        specs(check(attention, q, k, v)),
        """attention(score=0.25*s, mask=kv <= q, dead=nan, out_order=bqhd)""",
    )


def test_features_of_several_axes():
    # The points of invariant point attention beside its values.
    def attention(q, k, v, points):
        p = (torch.einsum("bihd,bjhd->bhij", q, k) * SCALE).softmax(-1)
        out = torch.einsum("bhij,bjhd->bihd", p, v)
        return out, torch.einsum("bhij,bjhpc->bcihp", p, points)

    q, k, v = qkv(B, S, H, D)
    report = check(attention, q, k, v, normal(B, S, H, 4, 3, seed=4))
    assert_expected_inline(specs(report), """attention(score=0.25*s)\nattention(score=0.25*s)""")


def test_features_that_queries_have_too():
    def attention(q, k, v):
        p = (torch.einsum("bihd,bjhd->bhijd", q, k) * SCALE).softmax(-2)
        return torch.einsum("bhijd,bjhd->bihd", p, v)

    assert not any(x.fused for x in check(attention, *qkv(B, S, H, D)).regions)


class TestSeveralAxesContracted:
    """d is several axes of the operands."""

    def test_points_and_coordinates(self):
        def attention(q, k, v):
            return torch.einsum("bhij,bjhd->bihd", product(q, k).softmax(-1), v)

        def product(q, k):
            return torch.einsum("bihpc,bjhpc->bhij", q, k)

        def swapped(q, k, v):
            k = k.mT  # [B, S, H, 3, 4]
            s = torch.einsum("bihpc,bjhcp->bhij", q, k)
            return torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v)

        inputs = (
            normal(B, S, H, 4, 3, seed=1),
            normal(B, S, H, 4, 3, seed=2),
            normal(B, S, H, D, seed=3),
        )
        assert fused(attention, *inputs) == fused(swapped, *inputs) == "attention(score=s)"

    def test_rows_and_features(self):
        """Tied rows of MSA Transformer (Rao et al. 2021, section 3.1)."""

        def attention(q, k, v):
            s = torch.einsum("brihd,brjhd->bhij", q, k) * SCALE
            return torch.einsum("bhij,brjhd->brihd", s.softmax(-1), v)

        assert_expected_inline(fused(attention, *qkv(B, 5, S, H, 8)), """attention(score=0.25*s)""")

    def test_all_heads_together(self):
        """Contracted over heads, whose weights are then shared."""

        def attention(q, k, v):
            s = torch.einsum("bhid,bhjd->bij", q, k) * SCALE
            return torch.einsum("bij,bhjd->bhid", s.softmax(-1), v)

        assert_expected_inline(
            fused(attention, *qkv()), """attention(score=0.25*s, out_order=bqhd)"""
        )


class TestPositionsOfSeveralAxes:
    """Pixels are one axis of queries, however the program lays them out."""

    def rows(self, function, *args):
        """(heads, queries) that a kernel is asked for; the numbers are eager's."""
        report = check(function, *args)
        assert report.fused
        return [tuple(x.shape[1:3]) for x in queries_of(function, *args)]

    def test_convolutions(self):
        """As the AttnBlock of latent diffusion's autoencoders has it."""

        def attention(x, w_q, w_k, w_v):
            q, k, v = (F.conv2d(x, w).flatten(2) for w in (w_q, w_k, w_v))
            p = (q.mT @ k * SCALE).softmax(-1)
            return (v @ p.mT).view(x.shape)

        weights = (normal(8, 8, 1, 1, seed=n) for n in (1, 2, 3))
        assert self.rows(attention, normal(B, 8, 6, 4), *weights) == [(1, 24)]

    def test_grid(self):
        def attention(q, k, v):
            return plain(*(x.flatten(2, 3) for x in (q, k, v))).view(q.shape)

        assert self.rows(attention, *qkv(B, H, 6, 4, D)) == [(H, 24)]

    def test_neighbourhoods(self):
        """Both axes are compared with the key's (Hassani et al. 2023, section 3.1)."""

        def attention(q, k, v):
            q, k, v = (x.flatten(2, 3) for x in (q, k, v))
            i = torch.arange(36)
            hidden = ((i // 6)[:, None] - i // 6).abs() > 1
            hidden |= ((i % 6)[:, None] - i % 6).abs() > 1
            return attend(scores_of(q, k).masked_fill(hidden, -INF), v)

        assert self.rows(attention, *qkv(B, H, 6, 6, D)) == [(H, 36)]


def queries_of(function, *args):
    """The queries of every fused attention, as its operator is given them."""
    found = []

    def backend(gm, example_inputs, **settings):
        rewrite_only(gm, example_inputs, **settings)
        calls = gm.graph.find_nodes(op="call_function", target=torch.ops.fa3.attention.default)
        found.extend(node.args[0].meta["example_value"] for node in calls)
        return gm

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(*args)
    return found


class TestKeysInRowsAndColumns:
    """Keys on several axes of one product, which are one axis of the weights: GMA's optical flow
    has b h x y d and b h u v d, and V in the order of a convolution."""

    X, Y = 4, 6

    def pixels(self, *, seed):
        return normal(B, H * D, self.X, self.Y, seed=seed)

    def heads(self, x):
        return x.unflatten(1, (H, D)).permute(0, 1, 3, 4, 2)

    @pytest.mark.parametrize("output", ["pixels", "a sequence"])
    def test_pictures(self, output):
        def attention(q, k, v):
            s = torch.einsum("bhxyd,bhuvd->bhxyuv", self.heads(q) * SCALE, self.heads(k))
            p = s.flatten(4).flatten(2, 3).softmax(-1)
            out = p @ self.heads(v).flatten(2, 3)
            if output == "a sequence":
                return out
            return out.unflatten(2, (self.X, self.Y)).permute(0, 1, 4, 2, 3).flatten(1, 2)

        report = check(attention, *(self.pixels(seed=i) for i in (1, 2, 3)))
        assert specs(report) == "attention(score=0.25*s)"

    def test_videos_masked_by_frames(self):
        def attention(q, k, v, hidden):
            s = torch.einsum("bhnd,bhtuvd->bhntuv", q, k)
            s = s.masked_fill(hidden[:, None, None, :, None, None], -INF)
            return s.flatten(3).softmax(-1) @ v.flatten(2, 4)

        keys = normal(B, H, 2, 3, 4, D, seed=2), normal(B, H, 2, 3, 4, D, seed=3)
        hidden = torch.tensor([[False, False], [False, True]])
        report = check(attention, normal(B, H, 5, D), *keys, hidden)
        assert_expected_inline(
            specs(report),
            """attention(score=s, mask=load(0, b, floordiv(kv, 12)) == 0, dead=nan, aux=[bool])""",
        )

    def test_dynamic_sizes(self):
        def attention(q, k, v):
            s = torch.einsum("bhnd,bhuvd->bhnuv", q, k).flatten(3)
            return s.softmax(-1) @ v

        made = normal(B, H, 5, D), normal(B, H, 4, 6, D, seed=2), normal(B, H, 24, D, seed=3)
        check(attention, *made, dynamic=True)

    def test_columns_first(self):
        """Weights in the order of columns are none of a view of the keys."""

        def attention(q, k, v):
            s = torch.einsum("bhnd,bhuvd->bhnvu", q, k).flatten(3)
            return s.softmax(-1) @ v

        made = normal(B, H, 5, D), normal(B, H, 4, 6, D, seed=2), normal(B, H, 24, D, seed=3)
        check(attention, *made)
