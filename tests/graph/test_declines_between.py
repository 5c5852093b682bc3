"""Near-misses of the skeleton: axes, and what stands between the products or after them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from tests.graph.harness import check, declined
from tests.graph.inputs import (
    INF,
    B,
    D,
    H,
    S,
    attend,
    chance,
    normal,
    qkv,
    scores_of,
    weights_of,
)


class TestAxes:
    """The softmax runs over the keys, and V is weighed by them."""

    def test_softmax_over_queries(self):
        assert_expected_inline(
            declined(lambda q, k, v: scores_of(q, k).softmax(-2) @ v), """detect: softmax-axis"""
        )

    def test_softmax_over_heads(self):
        assert_expected_inline(
            declined(lambda q, k, v: scores_of(q, k).softmax(1) @ v), """detect: softmax-axis"""
        )

    def test_softmax_over_the_batch(self):
        assert_expected_inline(
            declined(lambda q, k, v: scores_of(q, k).softmax(0) @ v), """detect: softmax-axis"""
        )

    def test_softmax_over_queries_normalised_over_keys(self):
        """Slot attention (Locatello et al. 2020, equation 1): slots are the queries."""

        def attention(q, k, v):
            weights = scores_of(q, k).softmax(-2) + 1e-8
            return weights / weights.sum(-1, keepdim=True) @ v

        assert_expected_inline(declined(attention), """detect: softmax-axis""")

    def test_softmax_over_queries_and_keys(self):
        def attention(q, k, v):
            return scores_of(q, k).flatten(-2).softmax(-1).view(B, H, S, S) @ v

        assert_expected_inline(declined(attention), """detect: softmax-axis""")

    def test_values_of_all_heads_added_up(self):
        def attention(q, k, v):
            return torch.einsum("bhqk,bhkd->bqd", weights_of(q, k), v)

        [region] = check(attention, *qkv()).regions
        assert region.code == "softmax-axis" and "adds up several axes" in region.reason

    def test_weights_transposed(self):
        assert_expected_inline(
            declined(lambda q, k, v: weights_of(q, k).mT @ v), """detect: softmax-axis"""
        )

    def test_values_weighed_along_heads(self):
        def attention(q, k, v):
            return torch.einsum("bhqk,bgqd->bgkd", weights_of(q, k), v)

        declined(attention)

    def test_product_over_the_batch(self):
        def attention(q, k, v):
            return torch.einsum("bhqk,bhkd->hqd", weights_of(q, k), v)

        declined(attention)

    def test_product_of_elements(self):
        assert_expected_inline(declined(lambda q, k, v: weights_of(q, k)[..., :D] * v), """""")

    def test_linear_attention(self):
        def attention(q, k, v):
            return q.softmax(-1) @ (k.softmax(-2).mT @ v)

        declined(attention)

    def test_weights_rolled(self):
        assert_expected_inline(
            declined(lambda q, k, v: weights_of(q, k).roll(1, -1) @ v), """detect: softmax-axis"""
        )

    def test_rows_put_together(self):
        """Each half would be read at rows, or heads, that its tensor has not."""
        for halves, d in (((0, 0), 1), ((1, 0), 1), ((1, 0), 2), ((1, 1), 2)):

            def attention(q, k, v, halves=halves, d=d):
                parts = weights_of(q, k).chunk(2, d)
                return torch.cat([parts[i] for i in halves], d) @ v

            assert declined(attention) == "detect: operand-unclear"
            assert declined(attention, dynamic=True) == "detect: operand-unclear"

    def test_rows_shifted(self):
        for at in (slice(1, None), slice(None, -1)):
            pad = (0, 0, 0, 1) if at.start else (0, 0, 1, 0)

            def of_scores(q, k, v, at=at, pad=pad):
                return attend(F.pad(scores_of(q, k)[:, :, at], pad), v)

            def of_weights(q, k, v, at=at, pad=pad):
                return F.pad(weights_of(q, k)[:, :, at], pad) @ v

            assert declined(of_scores) == declined(of_weights) == "detect: operand-unclear"

    def test_in_another_order(self):
        # V's heads, rows and keys are not those that the scores are of.
        def flipped(q, k, v):
            return weights_of(q, k).flip(1) @ v

        def rolled(q, k, v):
            return attend(scores_of(q, k).roll(1, 2), v)

        def indexed(q, k, v):
            return weights_of(q, k)[:, torch.arange(H) ^ 1] @ v.flip(1)

        def keys(q, k, v):
            return weights_of(q, k).flip(-1) @ v

        for function in (flipped, rolled, indexed, keys):
            [region] = check(function, *qkv()).regions
            assert "put in another order" in region.reason, region

    def test_values_of_a_few_keys(self):
        def attention(q, k, v):
            return weights_of(q, k)[..., : S // 2] @ v[..., : S // 2, :]

        assert_expected_inline(declined(attention), """detect: weights-partly-used""")

    def test_every_second_key(self):
        def attention(q, k, v):
            return weights_of(q, k)[..., ::2] @ v[..., ::2, :]

        assert_expected_inline(declined(attention), """detect: softmax-axis""")

    def test_several_axes_of_keys(self):
        def flattened(q, k, v):
            s = torch.einsum("bhnd,bhyxd->bhnyx", q, k)
            w = s.flatten(-2).softmax(-1).view_as(s)
            return torch.einsum("bhnyx,bhyxd->bhnd", w, v)

        def by_hand(q, k, v):
            e = torch.einsum("bhnd,bhyxd->bhnyx", q, k).exp()
            return torch.einsum("bhnyx,bhyxd->bhnd", e / e.sum((-1, -2), keepdim=True), v)

        pictures = normal(B, H, 4, 6, D, seed=2), normal(B, H, 4, 6, D, seed=3)
        for function in (flattened, by_hand):
            [region] = check(function, normal(B, H, 5, D), *pictures).regions
            assert "several axes at once" in region.reason


class TestBetween:
    """Between the products every operation is element-wise."""

    def test_cumulative_sum(self):
        def attention(q, k, v):
            return attend(scores_of(q, k).cumsum(-1), v)

        assert_expected_inline(declined(attention), """lift: not-pointwise""")

    def test_softmax_of_a_softmax(self):
        [region] = check(lambda q, k, v: weights_of(q, k).softmax(-1) @ v, *qkv()).regions
        assert region.code == "not-pointwise" and "made of a softmax" in region.reason

    def test_a_threshold_of_sorted_scores(self):
        """Sparsemax (Martins and Astudillo 2016, algorithm 1)."""

        def attention(q, k, v):
            s = scores_of(q, k)
            z = s.sort(-1, descending=True).values
            count = torch.arange(1, S + 1)
            size = (1 + count * z > z.cumsum(-1)).sum(-1, keepdim=True)
            threshold = (z.cumsum(-1).gather(-1, size - 1) - 1) / size
            return (s - threshold).clamp(min=0) @ v

        [region] = check(attention, *qkv()).regions
        assert region.code == "scores-selected" and "sort" in region.reason

    def test_mean_of_the_row(self):
        def attention(q, k, v):
            s = scores_of(q, k)
            return attend(s * s.mean(-1, keepdim=True), v)

        assert_expected_inline(declined(attention), """lift: not-pointwise""")

    def test_maximum_of_the_row_as_a_factor(self):
        def attention(q, k, v):
            s = scores_of(q, k)
            return attend(s / s.abs().amax(-1, keepdim=True), v)

        assert_expected_inline(declined(attention), """detect: row-statistic""")

    def test_maximum_of_the_column(self):
        def attention(q, k, v):
            s = scores_of(q, k)
            return attend(s - s.amax(-2, keepdim=True), v)

        assert_expected_inline(declined(attention), """detect: row-statistic""")

    def test_a_projection_within_the_scores_call(self):
        """A bilinear form in one call: the projected queries are no tensor of the program."""

        def attention(q, k, v, w):
            letters = [0, 1, 2, 3], [3, 4], [0, 1, 5, 4], [0, 1, 2, 5]
            scores = torch.einsum(q, letters[0], w, letters[1], k, *letters[2:])
            return scores.softmax(-1) @ v

        report = check(attention, *qkv(), normal(D, D))
        assert [x.hint[:30] for x in report.regions] == ["Compute it in a call of its ow"]

    def test_blocks_of_keys(self):
        """An online softmax in two blocks: what a kernel does, and none of one softmax."""

        def attention(q, k, v):
            first, second = (scores_of(q, x) for x in k.chunk(2, -2))
            top = torch.maximum(first.amax(-1, keepdim=True), second.amax(-1, keepdim=True))
            parts = [torch.exp(x - top) for x in (first, second)]
            total = sum(x.sum(-1, keepdim=True) for x in parts)
            return sum(x @ y for x, y in zip(parts, v.chunk(2, -2))) / total

        report = check(attention, *qkv())
        assert {(x.code, x.hint[:30]) for x in report.regions} == {
            ("row-statistic", "Write one softmax over all key")
        }

    def test_softmax_mixed_with_sums_of_its_scores(self):
        def attention(q, k, v):
            scores = scores_of(q, k)
            return (scores.softmax(-1) + scores.cumsum(-1)) @ v

        assert_expected_inline(declined(attention), """detect: softmax-result-changed""")

    def test_layer_norm(self):
        def attention(q, k, v):
            return attend(F.layer_norm(scores_of(q, k), (S,)), v)

        declined(attention)

    def test_convolution(self):
        def attention(q, k, v, weight):
            return attend(F.conv2d(scores_of(q, k), weight, padding=1), v)

        declined(attention, *qkv(), normal(H, H, 3, 3))

    def test_talking_heads(self):
        def before(q, k, v, mix):
            return torch.einsum("bhij,hg->bgij", scores_of(q, k), mix).softmax(-1) @ v

        def after(q, k, v, mix):
            return torch.einsum("bhij,hg->bgij", weights_of(q, k), mix) @ v

        def linear(q, k, v, mix):
            s = F.linear(scores_of(q, k).permute(0, 2, 3, 1), mix).permute(0, 3, 1, 2)
            return attend(s, v)

        assert_expected_inline(declined(before, *qkv(), normal(H, H)), """detect: product-axes""")
        assert_expected_inline(declined(after, *qkv(), normal(H, H)), """detect: softmax-axis""")
        assert "mixed" in check(after, *qkv(), normal(H, H)).regions[0].reason
        assert "talking heads" in check(before, *qkv(), normal(H, H)).regions[0].reason
        assert "mixes" in check(linear, *qkv(), normal(H, H)).regions[0].reason

    def test_largest_scores_only(self):
        def threshold(q, k, v):
            s = scores_of(q, k)
            return attend(s.masked_fill(s < s.topk(5, -1).values[..., -1:], -INF), v)

        def scattered(q, k, v):
            s = scores_of(q, k)
            top = s.topk(5, -1)
            return attend(torch.full_like(s, -INF).scatter(-1, top.indices, top.values), v)

        def masked(q, k, v):
            s = scores_of(q, k).masked_fill(torch.ones(S, S).triu(1).bool(), -1e30)
            return attend(s.masked_fill(s < s.topk(5, -1).values[..., -1:], -1e30), v)

        def kth(q, k, v):
            s = scores_of(q, k)
            return attend(s.masked_fill(s < s.kthvalue(5, -1, True).values, -INF), v)

        assert_expected_inline(declined(threshold), """check: scores-selected""")
        assert_expected_inline(declined(scattered), """lift: scores-selected""")
        assert_expected_inline(declined(masked), """lift: scores-selected""")
        assert_expected_inline(declined(kth), """lift: scores-selected""")

    def test_sorted_scores(self):
        declined(lambda q, k, v: attend(scores_of(q, k).sort(-1).values, v))

    def test_shifted_scores(self):
        def attention(q, k, v):
            return attend(scores_of(q, k).roll(1, dims=-2), v)

        declined(attention)

    def test_flipped_keys(self):
        # V is not flipped with the scores.
        declined(lambda q, k, v: attend(scores_of(q, k).flip(-1), v))

    def test_scores_modulated_by_their_softmax(self):
        def attention(q, k, v):
            s = scores_of(q, k)
            return attend(s * s.softmax(-1), v)

        declined(attention)


class TestAfter:
    """Factors alone may lie between the softmax and V."""

    def test_weights_squared(self):
        assert_expected_inline(
            declined(lambda q, k, v: weights_of(q, k).square() @ v),
            """detect: softmax-result-changed""",
        )

    def test_logarithm_of_the_softmax(self):
        def attention(q, k, v):
            return F.log_softmax(scores_of(q, k), -1) @ v

        def added_to(q, k, v, g):
            # g.exp() may be infinite where a weight is too small for float32.
            return (F.log_softmax(scores_of(q, k), -1) + g).exp() @ v

        assert declined(attention) == "detect: softmax-result-changed"
        assert declined(added_to, *qkv(), normal(S, S)) == "detect: softmax-result-changed"

    def test_gumbel_straight_through(self):
        def attention(q, k, v):
            p = weights_of(q, k)
            hard = torch.zeros_like(p).scatter(-1, p.argmax(-1, keepdim=True), 1.0)
            return (hard - p.detach() + p) @ v

        assert_expected_inline(declined(attention), """detect: gradient-stopped""")

    def test_gumbel_softmax(self):
        def attention(q, k, v, hard):
            return F.gumbel_softmax(scores_of(q, k), hard=hard) @ v

        assert_expected_inline(
            declined(lambda *x: attention(*x, hard=False)), """lift: random-numbers"""
        )
        assert_expected_inline(
            declined(lambda *x: attention(*x, hard=True)), """lift: scores-selected"""
        )


def test_what_is_added_to_exponentials_and_to_their_sum():
    """DynamicViT's softmax with a policy (Rao et al. 2021), whose small numbers count where the
    largest score is of a token that is dropped."""

    def attention(q, k, v, policy):
        s = scores_of(q, k)
        policy = policy + (1 - policy) * torch.eye(S)
        e = (s - s.amax(-1, keepdim=True)).exp() * policy
        return (e + 1e-6 / S) / (e.sum(-1, keepdim=True) + 1e-6) @ v

    [region] = check(attention, *qkv(), chance(0.5, B, 1, 1, S).float()).regions
    assert (region.code, region.fused) == ("not-pointwise", False)
    assert region.reason.startswith("division by") and "Divide weights by" in region.hint
    assert "/ (e.sum(-1, keepdim=True) + 1e-6) @ v" in region.where
