"""Between the softmax and V: gates, differences of two softmaxes, other weights added."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from tests.graph.dropout import check_dropout
from tests.graph.harness import check, specs
from tests.graph.inputs import (
    INF,
    SCALE,
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
    uniform,
    weights_of,
)


class TestGates:
    """Factors that are no dropout."""

    def test_of_query_and_key(self):
        report = check(lambda q, k, v, g: weights_of(q, k) * g @ v, *qkv(), normal(H, S, S))
        assert_expected_inline(
            specs(report), """attention(score=0.25*s, weight=load(0, h, q, kv), aux=[float])"""
        )

    def test_of_the_query_alone_is_a_factor_of_the_output(self):
        report = check(
            lambda q, k, v, g: weights_of(q, k) * g.sigmoid() @ v, *qkv(), normal(B, 1, S, 1)
        )
        assert specs(report) == "attention(score=0.25*s)"

    def test_numbers(self):
        report = check(lambda q, k, v: weights_of(q, k) * 0.5 @ v, *qkv())
        assert specs(report) == "attention(score=0.25*s)"

    def test_decay_with_distance(self):
        def attention(q, k, v, slope):
            rows, columns = queries_and_keys()
            return weights_of(q, k) * (-slope * (rows - columns).abs()).exp() @ v

        report = check(attention, *qkv(), normal(H, 1, 1))
        assert [r.fused for r in report.regions] == [True]

    def test_of_the_scores_themselves(self):
        def attention(q, k, v):
            s = scores_of(q, k)
            return s.softmax(-1) * s.sigmoid() @ v

        report = check(attention, *qkv())
        assert_expected_inline(specs(report), """check: scores-read""")

    def test_of_the_head_dimension(self):
        # Weights of their own for each feature of V: no product of matrices.
        def attention(q, k, v):
            return (weights_of(q, k)[..., None] * v[:, :, None] * v.sigmoid()[:, :, None]).sum(-2)

        assert check(attention, *qkv()).fused == []


class TestDifferences:
    """Differential attention: several softmaxes, one V."""

    def test_two_halves(self):
        def attention(q, k, v):
            (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
            return (weights_of(q1, k1) - 0.3 * weights_of(q2, k2)) @ v

        assert_expected_inline(
            specs(check(attention, *qkv())),
            """\
attention(score=0.25*s)
attention(score=0.25*s)""",
        )

    def test_one_softmax_of_twice_the_heads(self):
        def attention(q, k, v, a, b):
            p = scores_of(q, k) + torch.zeros(S, S).masked_fill(future(), -INF)
            p = torch.nan_to_num(p).softmax(-1, dtype=torch.float32).view(B, H, 2, S, S)
            factor = a.exp() - b.exp() + 0.2
            return (p[:, :, 0] - factor * p[:, :, 1]) @ v

        q, k, _ = qkv(B, 2 * H, S, D)
        report = check(attention, q, k, normal(B, H, S, 2 * D), normal(1), normal(1, seed=9))
        assert_expected_inline(
            specs(report),
            """\
attention(score=0.25*s, mask=kv <= q, dead=nan)
attention(score=0.25*s, mask=kv <= q, dead=nan)""",
        )

    def test_factor_of_each_head(self):
        def attention(q, k, v, factor):
            (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
            return (weights_of(q1, k1) - factor * weights_of(q2, k2)) @ v

        report = check(attention, *qkv(), normal(H, 1, 1))
        assert [r.fused for r in report.regions] == [True, True]

    def test_two_products(self):
        def attention(q, k, v):
            (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
            return attend(scores_of(q1, k1), v) - 0.3 * attend(scores_of(q2, k2), v)

        assert [r.fused for r in check(attention, *qkv()).regions] == [True, True]

    def test_mixture_of_three(self):
        def attention(q, k, v, mix):
            s, c = scores_of(q, k), mix.softmax(0)
            causal = s.masked_fill(future(), -INF)
            return (
                c[0] * s.softmax(-1) + c[1] * causal.softmax(-1) + c[2] * (2 * s).softmax(-1)
            ) @ v

        report = check(attention, *qkv(), normal(3))
        assert sorted(specs(report).split("\n")) == [
            "attention(score=0.25*s)",
            "attention(score=0.25*s, mask=kv <= q, dead=nan)",
            "attention(score=0.5*s)",
        ]

    def test_dropout_of_each(self):
        def made(drop):
            def attention(q, k, v):
                (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
                first, second = drop(weights_of(q1, k1), 0.25), drop(weights_of(q2, k2), 0.25)
                return (first - 0.3 * second) @ v

            return attention

        assert [r.fused for r in check_dropout(made, *qkv()).regions] == [True, True]

    def test_dropout_of_the_difference(self):
        # Both lose the same elements.
        def made(drop):
            def attention(q, k, v):
                (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
                return drop(weights_of(q1, k1) - 0.3 * weights_of(q2, k2), 0.25) @ v

            return attention

        assert [r.fused for r in check_dropout(made, *qkv()).regions] == [True, True]

    def test_product_of_two(self):
        def attention(q, k, v):
            (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
            return (weights_of(q1, k1) * weights_of(q2, k2)) @ v

        check(attention, *qkv())

    def test_softmax_of_another_axis_in_the_sum(self):
        def attention(q, k, v):
            s = scores_of(q, k)
            return (s.softmax(-1) - s.softmax(-2)) @ v

        assert not any(r.fused for r in check(attention, *qkv()).regions)


class TestOtherWeightsAdded:
    """A softmax and a function of the same scores without one, as Adapt-or-Perish restores images
    by: each is an attention of its own."""

    def test_dense_and_sparse(self):
        def attention(q, k, v, w, bias):
            s = scores_of(q, k) + bias
            dense, sparse = s.softmax(-1), s.relu() ** 2
            first, second = w[0].exp() / w.exp().sum(), w[1].exp() / w.exp().sum()
            return (dense * first + sparse * second) @ v

        report = check(attention, *qkv(), normal(2), normal(H, S, S))
        assert_expected_inline(
            "\n".join(r.spec.split(", score")[0] for r in report.regions),
            """\
attention(score=load(0, h, q, kv) + 0.25*s, aux=[float])
attention(normalize=none""",
        )

    def test_masked_and_halved_by_a_row_factor(self):
        def attention(q, k, v, gate):
            s = scores_of(q, k)
            p = s.masked_fill(future(), -INF).softmax(-1) - s.sigmoid().masked_fill(future(), 0)
            return (gate * p) @ v

        report = check(attention, *qkv(), uniform(H, S, 1))
        assert_expected_inline(
            specs(report),
            """\
attention(score=0.25*s, mask=kv <= q, dead=nan)
attention(normalize=none, score=sigmoid(0.25*s), mask=kv <= q)""",
        )

    def test_dropout_of_the_sum(self):
        # Both lose the same elements.
        def made(drop):
            def attention(q, k, v):
                s = scores_of(q, k)
                return drop(s.softmax(-1) + s.relu(), 0.25) @ v

            return attention

        assert [r.fused for r in check_dropout(made, *qkv()).regions] == [True, True]

    def test_factors_of_the_sum(self):
        def attention(q, k, v, mask, gate):
            s = scores_of(q, k)
            return ((s.softmax(-1) + s.relu()) * gate).masked_fill(mask < 0, 0) @ v

        report = check(attention, *qkv(), normal(S, S), uniform(S))
        assert [r.fused for r in report.regions] == [True, True]

    def test_two_softmaxes_and_other_weights(self):
        def attention(q, k, v):
            (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
            s = scores_of(q1, k1)
            return (s.softmax(-1) - 0.3 * weights_of(q2, k2) + s.tanh()) @ v

        assert [r.fused for r in check(attention, *qkv()).regions] == [True, True, True]

    @pytest.mark.parametrize("other", [lambda s: s.cumsum(-1), lambda s: s.softmax(-2).sqrt()])
    def test_weights_that_are_no_function_of_a_score(self, other):
        def attention(q, k, v):
            s = scores_of(q, k)
            return (s.softmax(-1) + other(s)) @ v

        [region] = check(attention, *qkv()).regions
        assert not region.fused and region.code == "softmax-result-changed"

    def test_scores_themselves(self):
        def attention(q, k, v):
            s = scores_of(q, k)
            return (s.softmax(-1) + s) @ v

        [region] = check(attention, *qkv()).regions
        assert not region.fused


def test_scale_is_not_lost_where_one_factor_is_a_sum():
    def attention(q, k, v, g):
        p = weights_of(q, k)
        return (p * g + 0.5 * p) @ v

    report = check(attention, *qkv(), uniform(S))
    assert [r.fused for r in report.regions] == [True]


def test_scaled_product_with_v():
    def attention(q, k, v):
        p = (q @ k.mT * SCALE).softmax(-1)
        return torch.baddbmm(torch.empty(()), p, v, beta=0, alpha=0.5)

    assert specs(check(attention, *qkv(H, S, D))) == "attention(score=0.25*s, out_order=bqhd)"


def test_product_with_v_that_adds_to_something():
    def attention(q, k, v, x):
        return torch.baddbmm(x, (q @ k.mT).softmax(-1), v, beta=0.5)

    report = check(attention, *qkv(H, S, D), normal(H, S, D))
    assert_expected_inline(specs(report), """detect: product-adds""")


@pytest.mark.parametrize(
    "factor",
    [
        lambda n, small: 1 / n[:, None, None, None],
        lambda n, small: 1 / torch.arange(1, S + 1)[:, None],
        lambda n, small: (small.long() * 200)[:, None],
    ],
    ids=["lengths", "positions", "8 bits"],
)
def test_factors_of_integers_are_neither_rounded_nor_wrapped(factor):
    def attention(q, k, v, n, small):
        return (scores_of(q, k).softmax(-1) * factor(n, small)) @ v

    lengths, small = torch.arange(3, B + 3), torch.arange(S, dtype=torch.int8) - 3
    assert check(attention, *qkv(), lengths, small).fused
