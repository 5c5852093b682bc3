"""Weights that are added to a softmax: (a p + w) V is a times the attention, plus w V."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.graph.harness import check, specs
from tests.graph.inputs import INF, B, H, S, normal, qkv, queries_and_keys, scores_of, weights_of

ATTENTION = "attention(score=0.25*s)"


def found(weights, *captured, **options) -> str:
    """What is found where V is weighed by `weights(q, k, *captured)`."""
    return specs(check(lambda q, k, v, *x: weights(q, k, *x) @ v, *qkv(), *captured, **options))


def gated(q, k, positions, gate):
    """ConViT's gated positional attention (d'Ascoli et al. 2021, equation 7)."""
    gate = torch.sigmoid(gate)
    return (1 - gate) * weights_of(q, k) + gate * positions.softmax(-1)


def shaped(q, k, identity, attention, mean):
    """Shaped attention (Noci et al. 2023; He and Hofmann 2023, equation 11), causal."""
    at, keys = queries_and_keys()
    p = scores_of(q, k).masked_fill(keys > at, -INF).softmax(-1)
    center = (keys <= at) / (at + 1)
    return identity * torch.eye(S) + attention * p - mean * center


GATES = (normal(H, S, S, seed=7), normal(H, 1, 1, seed=8))


def test_gated_positions():
    assert found(gated, *GATES) == ATTENTION


@pytest.mark.parametrize("dynamic", [None, True])
def test_gated_positions_divided_by_their_sum(dynamic):
    def attention(q, k, v, positions, gate):
        weights = gated(q, k, positions, gate)
        weights /= weights.sum(-1).unsqueeze(-1)
        return (weights @ v).transpose(1, 2).reshape(B, S, -1)

    report = check(attention, *qkv(), *GATES, dynamic=dynamic)
    assert len(report.fused) == 1 and not report.regions[0].reason


def test_positions_that_a_layer_makes_are_no_region_of_their_own():
    """As in ConViT, whose positions are a layer's of where the two tokens lie."""

    def attention(q, k, v, places, layer):
        positions = F.linear(places, layer).permute(2, 0, 1).softmax(-1)
        return (0.3 * weights_of(q, k) + 0.7 * positions) @ v

    report = check(attention, *qkv(), normal(S, S, 3, seed=5), normal(H, 3, seed=6))
    assert specs(report) == ATTENTION


def test_shaped():
    captured = [normal(1, seed=i) for i in range(3)]
    assert found(shaped, *captured) == "attention(score=0.25*s, mask=kv <= q, dead=nan)"


def by_hand(q, k, added):
    exponentials = scores_of(q, k).exp()
    weights = exponentials / exponentials.sum(-1, keepdim=True) + added.exp()
    return weights / weights.sum(-1, keepdim=True)


ADDED = {
    "a number": lambda q, k, t: 1 - weights_of(q, k),
    "what each row has": lambda q, k, t: weights_of(q, k) + t[..., :1],
    "what each key has": lambda q, k, t: 0.5 * (weights_of(q, k) + t[:, :1]),
    "a softmax by hand, normalised anew": by_hand,
}


@pytest.mark.parametrize("weights", ADDED.values(), ids=ADDED)
def test_added(weights):
    assert found(weights, normal(H, S, S, seed=9)) == ATTENTION


def test_masked_as_a_whole():
    def weights(q, k, added):
        at, keys = queries_and_keys()
        return (weights_of(q, k) + added).masked_fill(keys > at, 0)

    assert found(weights, normal(S, S)) == "attention(score=0.25*s, weight=where(kv <= q, 1, 0))"


def test_grouped_heads():
    def attention(q, k, v, added):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        return (weights_of(q, k) + added) @ v

    q, k, v = qkv()
    report = check(attention, q, k[:, :2].detach(), v[:, :2].detach(), normal(H, S, S))
    assert specs(report) == ATTENTION


def test_the_weights_of_the_layer_before():
    def attention(q, k, v):
        first = weights_of(q, k)
        return (weights_of(first @ v, k) + first) @ v

    assert specs(check(attention, *qkv())).count(ATTENTION) == 3


class TestDeclined:
    def test_what_a_dropout_is_of_as_a_whole(self):
        def attention(q, k, v, t):
            return F.dropout(weights_of(q, k) + t) @ v

        [region] = check(attention, *qkv(), normal(S, S)).regions
        assert region.code == "softmax-result-changed"
        assert region.reason.startswith("a dropout is of the sum of a softmax and other weights")

    def test_a_softmax_that_cannot_be_read(self):
        def weights(q, k):
            return weights_of(q, k) + scores_of(k, q).sort(-1)[0].softmax(-1)

        assert "opaque-scores" in found(weights)

    def test_sums_of_dropped_weights(self):
        def weights(q, k, added):
            mixed = F.dropout(weights_of(q, k)) + added
            return mixed / mixed.sum(-1, keepdim=True)

        assert "attention" not in found(weights, normal(S, S).exp())

    def test_sums_of_a_softmax_with_a_sink(self):
        def weights(q, k):
            scores = torch.cat([scores_of(q, k), torch.zeros(B, H, S, 1)], -1)
            p = scores.softmax(-1)[..., :-1]
            return p * p.sum(-1, keepdim=True)

        assert "attention" not in found(weights)

    def test_sums_over_heads(self):
        def weights(q, k, added):
            mixed = weights_of(q, k) + added
            return mixed / mixed.sum(1, keepdim=True)

        assert "attention" not in found(weights, normal(S, S).exp())

    def test_parts_of_v(self):
        def attention(q, k, v, added):
            w = weights_of(q, k) + added
            return w[..., :8] @ v[..., :8, :] + w[..., 8:] @ v[..., 8:, :]

        assert "attention" not in specs(check(attention, *qkv(), normal(S, S)))


class TestLessTheirMean:
    """(softmax - 1/n) V is as exact as eager's where V is far from 0."""

    def of(self, weights, mean):
        q, k, v = normal(B, H, 5, 8), normal(B, H, 160, 8, seed=1), normal(B, H, 160, 8, seed=2)
        far = (v.detach() + mean).requires_grad_()
        return specs(check(lambda q, k, v: weights(scores_of(q, k)) @ v, q, k, far))

    @pytest.mark.parametrize("factor", [1, -3])
    def test_of_the_whole(self, factor):
        assert self.of(lambda s: factor * (s.softmax(-1) - 1 / 160), mean=100) == ATTENTION

    def test_of_what_is_seen(self):
        seen = torch.arange(160) < 150
        spec = self.of(lambda s: s.masked_fill(~seen, -INF).softmax(-1) - 1 / 160, mean=100)
        assert "mask" in spec

    @pytest.mark.parametrize(
        "weights",
        [
            lambda s: s.softmax(-1) - 0.5 / 160,
            lambda s: s.softmax(-1) + 1 / 160,
            lambda s: torch.cat([s, 0 * s[..., :1]], -1).softmax(-1)[..., :-1] - 1 / 160,
            lambda s: s.masked_fill(s > 1, -INF).softmax(-1).nan_to_num() - 1 / 160,
            lambda s: (
                s.masked_fill(torch.arange(5)[:, None] < 2, -INF).softmax(-1).nan_to_num() - 1 / 160
            ),
        ],
    )
    def test_near_misses(self, weights):
        # What they add up to is not 0: V's mean counts.
        assert "attention(" in self.of(weights, mean=0.3)
