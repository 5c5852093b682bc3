"""Products of queries and keys, or of weights and V, written as a multiplication and a sum."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.graph.harness import assert_same, check, declined, specs
from tests.graph.inputs import INF, SCALE, B, D, H, S, attend, chance, future, normal, qkv

PLAIN = "attention(score=s)"
N, K = 6, 5  # nodes, and neighbours of each
QUERY, KEYS = normal(B, N, D), normal(B, N, K, D, seed=1)
VALUES = normal(B, N, K, D, seed=2)


def scores(q, k):
    return (q[..., :, None, :] * k[..., None, :, :]).sum(-1)


def weighed(w, v):
    return (w[..., None] * v[..., None, :, :]).sum(-2)


def divided_late(e, v):
    return weighed(e, v) / e.sum(-1, keepdim=True)


EVERY_PAIR = {
    "both products": lambda q, k, v: weighed(scores(q, k).softmax(-1), v),
    "the scores": lambda q, k, v: attend(scores(q, k), v),
    "the output": lambda q, k, v: weighed((q @ k.mT).softmax(-1), v),
    "vecdot": lambda q, k, v: attend(torch.linalg.vecdot(q[:, :, :, None], k[:, :, None]), v),
    "kept axes": lambda q, k, v: (
        (q[:, :, :, None] * k[:, :, None]).sum(-1, keepdim=True).softmax(3) * v[:, :, None]
    ).sum(3),
    "divided after V": lambda q, k, v: divided_late(scores(q, k).exp(), v),
    "products that are changed in place": lambda q, k, v: attend(
        (q[:, :, :, None] * k[:, :, None]).mul_(2).div_(2).sum(-1), v
    ),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", EVERY_PAIR)
def test_every_query_with_every_key(name, dynamic):
    assert specs(check(EVERY_PAIR[name], *qkv(), dynamic=dynamic)) == PLAIN


def test_masks_and_scales():
    def attention(q, k, v):
        s = (q[:, :, :, None] * k[:, :, None] * SCALE).sum(-1)
        return weighed(s.masked_fill(future(), -INF).softmax(-1), v)

    assert specs(check(attention, *qkv())) == "attention(score=0.25*s, mask=kv <= q, dead=nan)"


@pytest.mark.parametrize("shape", [(), (1,), (H, 1, 1, 1)], ids=str)
def test_scales_in_tensors(shape):
    def attention(q, k, v, scale):
        s = (q[:, :, :, None] * k[:, :, None] / scale.exp()).sum(-1)
        return (s.softmax(-1)[..., None] * v[:, :, None] * scale).sum(-2)

    report = check(attention, *qkv(), normal(*shape))
    assert [region.fused for region in report.regions] == [True]


def test_scales_of_keys_are_no_scales_of_the_sum():
    # An infinite one is NaN in a sum of both signs, and would be -inf after it.
    def attention(q, k, v, scale):
        return attend((q[:, :, :, None] * k[:, :, None] * scale[..., None, :, :]).sum(-1), v)

    scale = normal(B, H, S, 1).detach()
    scale[..., 3, :] = INF
    assert check(attention, *qkv(), scale, training=False).fused == []


def test_heads_that_share_keys():
    def attention(q, k, v):
        return weighed(scores(q, k[:, :1]).softmax(-1), v[:, :1])

    assert specs(check(attention, *qkv())) == "attention(score=s, out_order=bqhd)"


def of_neighbours(q, k, v):
    """One query a node, whose keys are its own (ProteinMPNN, dense graph attention)."""
    w = (q[:, :, None] * k).sum(-1).softmax(-1)
    return (w[..., None] * v).sum(-2)


def of_neighbours_in_heads(q, k, v, seen):
    q, k, v = (x.unflatten(-1, (2, D // 2)) for x in (q, k, v))
    s = (q[:, :, None] * k).sum(-1).masked_fill(~seen[..., None], -INF)
    return (s.softmax(2)[..., None] * v).sum(2).flatten(2)


def by_a_matrix_and_a_sum(q, k, v):
    return (torch.einsum("bnd,bnkd->bnk", q, k).softmax(-1)[..., None] * v).sum(2)


def by_a_sum_and_a_matrix(q, k, v):
    return torch.einsum("bnk,bnkd->bnd", (q.unsqueeze(2) * k).sum(-1).softmax(-1), v)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "attention",
    [of_neighbours, by_a_matrix_and_a_sum, by_a_sum_and_a_matrix],
    ids=lambda f: f.__name__,
)
def test_keys_of_each_query(attention, dynamic):
    assert specs(check(attention, QUERY, KEYS, VALUES, dynamic=dynamic)) == PLAIN


def test_heads_of_keys_of_each_query():
    seen = chance(0.8, B, N, K)
    seen[..., 0] = True
    report = check(of_neighbours_in_heads, QUERY, KEYS, VALUES, seen)
    assert [region.fused for region in report.regions] == [True]


def of_rows_and_columns(q, k, v):
    """ProteinMPNN (Dauparas et al. 2022), whose products have the keys among their batches."""
    q, k, v = (x.unflatten(-1, (2, D // 2)) for x in (q, k, v))
    s = torch.matmul(q[:, :, None, :, None], k[..., None]).flatten(-3)
    w = s.transpose(-2, -1).softmax(-1)
    return torch.matmul(w.unsqueeze(-2), v.transpose(2, 3)).flatten(2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_keys_among_the_batches(dynamic):
    assert specs(check(of_rows_and_columns, QUERY, KEYS, VALUES, dynamic=dynamic)) == PLAIN


def test_rows_and_columns_of_single_keys():
    # Each query has one key: there is nothing to attend to.
    def attention(q, k, v):
        return (q[..., None, :] @ k[..., None])[..., 0].softmax(-1) * v

    assert not check(attention, *qkv()).regions


def one_query(q, k):
    """MAAC's critic, Luong's score "dot"."""
    w = torch.sum(q.unsqueeze(1).expand_as(k) * k, dim=2).softmax(1)
    return torch.bmm(w.unsqueeze(1), k).squeeze(1)


def one_query_repeated(q, k):
    s = (q[:, None].repeat(1, k.shape[1], 1) * k).sum(-1, keepdim=True)
    return (s.softmax(1) * k).sum(1)


def one_query_by_time(q, k):
    w = (q[None] * k.transpose(0, 1)).sum(2).t().softmax(1)
    return w.unsqueeze(1).bmm(k)


@pytest.mark.parametrize(
    "attention", [one_query, one_query_repeated, one_query_by_time], ids=lambda f: f.__name__
)
def test_one_query(attention):
    assert specs(check(attention, QUERY[:, 0], KEYS[:, 0])) == PLAIN


def test_vectors():
    assert specs(check(lambda q, k: (k @ q).softmax(-1) @ k, QUERY[0, 0], KEYS[0, 0])) == PLAIN


def test_windows():
    """Stand-alone self-attention (Ramachandran et al. 2019): channels come before pixels."""

    def attention(x, w):
        q, k, v = torch.einsum("bchw,ncd->nbdhw", x, w)
        k, v = (F.pad(y, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1) for y in (k, v))
        k, v = (y.reshape(1, 2, 4, 5, 5, 9) for y in (k, v))
        w = (q.reshape(1, 2, 4, 5, 5, 1) * k).sum(2, keepdim=True).softmax(-1)
        return (w * v).sum(-1).reshape(1, 8, 5, 5)

    assert specs(check(attention, normal(1, 8, 5, 5), normal(3, 8, 8, seed=1))) == PLAIN


def test_means():
    def attention(q, k, v):
        return attend((q[:, :, :, None] * k[:, :, None]).mean(-1), v)

    assert specs(check(attention, *qkv())) == "attention(score=0.0625*s)"


def test_terms_of_pairs_are_biases():
    def attention(q, k, v, place, edge):
        return attend(q @ k.mT + (place[:, None] * edge).sum(-1)[:, None], v)

    assert (
        specs(check(attention, *qkv(), normal(B, S, 3, seed=4), normal(B, S, S, 3, seed=5)))
        == "attention(score=load(0, b, q, kv) + s, aux=[float])"
    )


class TestTypes:
    half = tuple(x.detach().bfloat16().requires_grad_() for x in (QUERY, KEYS, VALUES))

    def test_half_precision(self):
        assert specs(check(of_neighbours, *self.half)) == PLAIN

    def test_sums_in_float32(self):
        def attention(q, k, v):
            w = (q[:, :, None] * k).float().sum(-1).softmax(-1)
            return (w[..., None] * v).sum(-2)

        assert specs(check(attention, *self.half)) == PLAIN

    def test_a_sum_of_rounded_products_keeps_them(self):
        def attention(q, k, v):
            w = (q[:, :, None] * k).sum(-1, dtype=torch.bfloat16).float().softmax(-1)
            return (w[..., None] * v).sum(-2)

        assert check(attention, QUERY, KEYS, VALUES).fused == []


class TestNearMisses:
    def test_weights_of_each_feature(self):
        # Point Transformer's vector attention.
        def attention(q, k, v):
            return ((q[:, :, None] * k).softmax(2) * v).sum(2)

        assert not check(attention, QUERY, KEYS, VALUES).regions

    def test_a_function_of_each_product(self):
        assert not check(
            lambda q, k, v: weighed(
                (q[:, :, :, None] * k[:, :, None]).relu().sum(-1).softmax(-1), v
            ),
            *qkv(),
        ).fused

    def test_values_summed_over_another_axis(self):
        def attention(q, k, v):
            return (scores(q, k).softmax(-1)[..., None] * v[..., None, :, :]).sum(-3)

        assert declined(attention, *qkv(2, S, S, D)) == "detect: no-product"

    def test_softmax_over_the_queries(self):
        def attention(q, k, v):
            return weighed(scores(q, k).softmax(-2), v)

        assert declined(attention) == "detect: softmax-axis"

    def test_one_vector_for_all_rows(self):
        def attention(x, w):
            return ((x * w).sum(-1).softmax(-1)[..., None] * x).sum(-2)

        assert not check(attention, KEYS[:, 0], normal(D, seed=3)).regions

    def test_weights_of_scores_that_are_held_constant(self):
        def attention(q, k, v):
            return weighed((q[:, :, :, None] * k[:, :, None]).detach().sum(-1).softmax(-1), v)

        assert check(attention, *qkv()).fused == []

    @pytest.mark.parametrize("written", [1, 2], ids=["keys", "values"])
    def test_factors_that_are_written_in_between(self, written):
        def attention(*given):
            q, *kv = (x.clone() for x in given)
            products = q[:, :, None] * kv[0]
            if written == 1:
                kv[0].zero_()
            parts = products.sum(-1).softmax(-1)[..., None] * kv[1]
            kv[written - 1].zero_()
            return parts.sum(-2)

        assert_same(attention, *(x.detach() for x in (QUERY, KEYS, VALUES)), tolerance=1e-5)


def test_products_that_are_returned_as_well():
    def attention(q, k, v):
        products = q[:, :, None] * k
        parts = products.sum(-1).softmax(-1)[..., None] * v
        return parts.sum(-2), products, parts

    assert specs(check(attention, QUERY, KEYS, VALUES)) == PLAIN
