"""Features, positions and keys on several axes at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from tests.graph.harness import check, rewrite_only, specs
from tests.graph.inputs import INF, SCALE, B, D, H, S, attend, normal, plain, qkv, scores_of


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
        assert (
            specs(check(attention, *inputs))
            == specs(check(swapped, *inputs))
            == "attention(score=s)"
        )

    def test_rows_and_features(self):
        """Tied rows of MSA Transformer (Rao et al. 2021, section 3.1)."""

        def attention(q, k, v):
            s = torch.einsum("brihd,brjhd->bhij", q, k) * SCALE
            return torch.einsum("bhij,brjhd->brihd", s.softmax(-1), v)

        assert_expected_inline(
            specs(check(attention, *qkv(B, 5, S, H, 8))), """attention(score=0.25*s)"""
        )

    def test_all_heads_together(self):
        """Contracted over heads, whose weights are then shared."""

        def attention(q, k, v):
            s = torch.einsum("bhid,bhjd->bij", q, k) * SCALE
            return torch.einsum("bij,bhjd->bhid", s.softmax(-1), v)

        assert_expected_inline(
            specs(check(attention, *qkv())), """attention(score=0.25*s, out_order=bqhd)"""
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
