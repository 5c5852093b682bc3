"""Masks before, after and inside score modifiers: order matters, and it is the program's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from tests.graph.harness import check, specs
from tests.graph.inputs import (
    INF,
    LOWEST,
    B,
    D,
    H,
    S,
    attend,
    chance,
    future,
    large,
    normal,
    qkv,
    scores_of,
    triangle,
    uniform,
)


def _hidden_where_small(s):
    s = s.clone()
    s[s.abs() < 0.5] = -INF
    return s


# Each is applied to s; what a hidden key ends up with is in the name.
ORDERS = {
    "capped: -3": lambda s: 3 * torch.tanh(s.masked_fill(future(), -INF) / 3),
    "capped: -3, of finfo.min": lambda s: 3 * torch.tanh((s + (1 - triangle()) * LOWEST) / 3),
    "clamped: -1": lambda s: s.masked_fill(future(), -INF).clamp(min=-1),
    "rectified: 0": lambda s: s.masked_fill(future(), LOWEST).relu(),
    "sigmoid: 0": lambda s: s.masked_fill(future(), -INF).sigmoid(),
    "exponential: 0": lambda s: s.masked_fill(future(), -INF).exp(),
    "square: finite": lambda s: s.masked_fill(future(), -2.0).square(),
    "made finite": lambda s: torch.nan_to_num(s.masked_fill(future(), -INF), neginf=-50.0),
    "made finite, lowest": lambda s: torch.nan_to_num(s.masked_fill(future(), -INF)),
    "added, made finite": lambda s: torch.nan_to_num(
        s + torch.zeros(S, S).masked_fill(future(), -INF), neginf=-50.0
    ),
    "added twice, made finite": lambda s: torch.nan_to_num(
        s + triangle().log() + triangle().mT.log()
    ),
    "made finite: 7": lambda s: torch.nan_to_num(
        s + triangle().log() - triangle().mT.log(), nan=7.0, posinf=1.0, neginf=-2.0
    ),
    "scaled afterwards": lambda s: s.masked_fill(future(), LOWEST) * 0.125,
    "scaled up afterwards": lambda s: s.masked_fill(future(), -1e30) * 8,
    "divided afterwards": lambda s: (s + (1 - triangle()) * -1e9) / 1e9,
    "negated: the hidden attract": lambda s: -s.masked_fill(future(), -1e9),
    "negated twice": lambda s: -(-s).masked_fill(future(), INF),
    "subtracted": lambda s: s - future() * 1e9,
    "subtracted, infinity": lambda s: s - torch.full((S, S), INF).triu(1),
    "multiplied, then filled": lambda s: s * triangle() - 1e4 * (1 - triangle()),
    "multiplied, then lowest": lambda s: s * triangle() + LOWEST * (1 - triangle()),
    "logarithm of almost zero": lambda s: s + (triangle() + 1e-45).log(),
    "logarithm of 1e-9": lambda s: s + (triangle() + 1e-9).log(),
    "by the score": lambda s: s.masked_fill(s < -0.5, -INF),
    "by the score, written": _hidden_where_small,
    "by the score and the place": lambda s: torch.where((s > 0) | ~future(), s, LOWEST),
    "by the score, then by the place": lambda s: s.masked_fill(s < 0.5, -INF).masked_fill(
        future(), -INF
    ),
    "lowest by the score, then by the place": lambda s: s.masked_fill(s < 0.5, LOWEST).masked_fill(
        future(), LOWEST
    ),
    "-inf by the score, then lowest": lambda s: s.masked_fill(s < 0.5, -INF).masked_fill(
        future(), LOWEST
    ),
    "-inf by the score and by the place, above a floor": lambda s: torch.max(
        s.masked_fill(s < 0.5, -INF).masked_fill(future(), -INF), torch.tensor(LOWEST)
    ),
    "-inf above a floor": lambda s: s.masked_fill(future(), -INF).clamp(min=LOWEST),
    "added by the score and by the place": lambda s: (
        s + torch.where(s > 0.5, 0, LOWEST) + future() * LOWEST
    ),
    "by the place in one branch": lambda s: torch.where(
        s > 0, s, (2 * s).masked_fill(future(), -INF)
    ),
    "filled with the score of another scale": lambda s: torch.where(future(), 0.1 * s, s),
    "filled with a position": lambda s: torch.where(future(), -1.0 * torch.arange(S), s),
    "filled with +5": lambda s: s.masked_fill(future(), 5.0),
    "biased and filled": lambda s: (s + torch.arange(S)).masked_fill(future(), -INF),
    "filled and biased": lambda s: s.masked_fill(future(), -INF) + torch.arange(S),
    "filled, biased by -inf": lambda s: s.masked_fill(future(), LOWEST) - INF * 0.0,
    "fills of two depths": lambda s: s.masked_fill(future(), -1e9).masked_fill(future().mT, -1e4),
    "fills of two depths, added": lambda s: s + future() * -1e9 + future().mT * -1e4,
    "half the lowest, twice": lambda s: s + future() * (LOWEST / 2) + future() * (LOWEST / 2),
    "everything hidden": lambda s: s.masked_fill(torch.ones(S, S).bool(), -INF),
    "everything lowest": lambda s: s + LOWEST,
    "nothing hidden": lambda s: s.masked_fill(torch.zeros(S, S).bool(), -INF),
    "one key left": lambda s: s.masked_fill(torch.arange(S) != 5, LOWEST),
    "scaled by zero": lambda s: s * 0,
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_order(order):
    check(lambda q, k, v: attend(order(scores_of(q, k)), v), *qkv())


# Of scores to which a mask of 0 and 1 is added as 0 and a fill.
FUNCTIONS_OF_MASKED = {
    "elu": F.elu,
    "relu": lambda s: F.relu(s) - 0.2 * s.clamp(min=-3),
    "maximum": lambda s: torch.maximum(s, 0.3 * s),
    "silu": F.silu,
}
MASKS_ADDED = {
    "beside a fill": lambda s, x, y: (
        s + torch.where(~future(), 0.0, -65504.0) + (1 - x) * LOWEST + 0.7
    ),
    "two": lambda s, x, y: s - (1 - x) * 1e38 + (y * 1e38 - 1e38),
    "two as one": lambda s, x, y: s + (x + y - 2) * (-LOWEST / 4) + 0.3,
    # Neither 0 nor 1: a bias.
    "a soft one": lambda s, x, y: s + (1 - (x * 0.75 + 0.125)) * -16,
}


@pytest.mark.parametrize("masked", MASKS_ADDED.values(), ids=MASKS_ADDED)
@pytest.mark.parametrize("function", FUNCTIONS_OF_MASKED.values(), ids=FUNCTIONS_OF_MASKED)
@pytest.mark.parametrize("normalised", [True, False], ids=["softmax", "plain"])
def test_function_of_masks_that_are_added(function, masked, normalised):
    # In float32 a fill absorbs the score, wherever the two are summed before the mask cancels it.
    def attention(q, k, v, x, y):
        s = function(masked(scores_of(q, k), x, y))
        return (s.softmax(-1) if normalised else s) @ v

    x = (torch.arange(S) < torch.tensor([[20], [13]])).float()[:, None, None, :]
    y = (torch.arange(S) % 3 != 1).float()
    # Sums of weights of that size are infinite, or NaN, in one order or another.
    hidden = function(masked(torch.zeros(S, S), torch.zeros(()), torch.ones(())))
    is_left = not normalised and bool((hidden.abs() > 1e30).any())
    [region] = check(attention, *qkv(), x, y, training=not is_left).regions
    assert region.fused != is_left


def test_silu_of_a_mask_made_finite():
    # silu(-inf) is NaN, whose gradient is NaN in eager.
    def attention(q, k, v):
        s = scores_of(q, k) + torch.zeros(S, S).masked_fill(future(), -INF)
        return attend(torch.nan_to_num(F.silu(s)), v)

    assert_expected_inline(
        specs(check(attention, *qkv(), training=False)),
        """attention(score=where(kv >= q + 1, 0, 0.25*s*sigmoid(0.25*s)))""",
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "score",
    [
        lambda s, x: torch.nan_to_num(s + x),
        lambda s, x: torch.nan_to_num(0.5 * x - s, neginf=-3.0),
        lambda s, x: torch.nan_to_num(F.silu(s + x)),
        lambda s, x: torch.nan_to_num(torch.exp(x) * s - x, posinf=2.0),
    ],
    ids=["added", "subtracted", "silu", "product"],
)
def test_infinite_bias_made_finite(score, training):
    # A query all of whose keys are at -inf among them.
    bias = torch.zeros(S, S).masked_fill(future().mT, -INF) + normal(S, S).detach()
    report = check(
        lambda q, k, v: attend(score(scores_of(q, k), bias), v), *qkv(), training=training
    )
    assert report.regions


@pytest.mark.parametrize(
    "name",
    [
        "multiplied, then filled",
        "multiplied, then lowest",
        "capped: -3",
        "divided afterwards",
        "fills of two depths, added",
    ],
)
def test_order_with_large_scores(name):
    check(lambda q, k, v: attend(ORDERS[name](q @ k.mT), v), *large())


@pytest.mark.parametrize(("low", "high"), [(-4.0, 4.0), (-1.0, None), (None, 1.0)])
def test_clamped_beside_a_scale_that_is_a_symbol(low, high):
    def attention(qkv):
        q, k, v = qkv.view(B, -1, 3, H, 8).permute(2, 0, 3, 1, 4).unbind(0)
        n = torch.arange(q.shape[2])
        s = q @ k.mT * q.shape[-1] ** -0.5 + (n[:, None] != n).float().log()
        return attend(s.clamp(low, high), v)

    report = check(attention, normal(B, 9, 3 * H * 8), dynamic=True)
    assert [r.fused for r in report.regions] == [True]


def test_fill_by_the_score_in_rows_set_to_zero():
    def attention(q, k, v):
        s = scores_of(q, k)
        s = s.masked_fill(s < 0.5, -INF).masked_fill(future(), -INF)
        return torch.nan_to_num(s.softmax(-1)) @ v

    assert_expected_inline(
        specs(check(attention, *qkv())),
        """attention(score=where(0.25*s < 0.5, -inf, 0.25*s), mask=kv <= q, dead=zero)""",
    )


def test_compared_positions_in_half_precision():
    def attention(q, k, v):
        at = torch.arange(300, dtype=torch.float32).bfloat16()
        return attend(scores_of(q, k).masked_fill(at[None, :] > at[:, None], -INF), v)

    check(attention, *qkv(1, 1, 300, D))


def test_random_mask_made_inside():
    def attention(q, k, v):
        return attend(scores_of(q, k).masked_fill(torch.rand(S, S) > 0.9, -INF), v)

    check(attention, *qkv())


def test_mask_made_of_the_inputs():
    def attention(q, k, v):
        hidden = (k[..., 0] > 1)[:, :, None, :]
        return attend(scores_of(q, k).masked_fill(hidden, LOWEST), v)

    assert_expected_inline(
        specs(check(attention, *qkv())),
        """attention(score=0.25*s, mask=load(0, b, h, kv) == 0, dead=score, fill=-3.4028234663852886e+38, aux=[bool])""",
    )


def test_keys_that_are_zero_are_padding():
    def attention(q, k, v):
        padded = (k == 0).all(-1)[:, :, None, :]
        return attend(scores_of(q, k).masked_fill(padded, -INF), v)

    q, k, v = qkv()
    k = k.detach()
    k[:, :, 20:] = 0
    assert_expected_inline(
        specs(check(attention, q, k.requires_grad_(), v)),
        """attention(score=0.25*s, mask=load(0, b, h, kv) == 0, dead=nan, aux=[bool])""",
    )


def test_query_broadcast_over_the_batch():
    q = normal(1, H, S, D)
    _, k, v = qkv()
    assert_expected_inline(
        specs(check(lambda q, k, v: attend(scores_of(q, k), v), q, k, v)),
        """attention(score=0.25*s)""",
    )
    learned = normal(S, D)
    assert_expected_inline(
        specs(check(lambda q, k, v: attend(scores_of(q, k), v), learned, k, v)),
        """attention(score=0.25*s)""",
    )


def test_softmax_in_double():
    def attention(q, k, v):
        return scores_of(q, k).double().softmax(-1).to(q.dtype) @ v

    check(attention, *qkv())


def test_heads_summed_by_the_product_with_the_values():
    def attention(q, k, v):
        return torch.einsum("bhqk,bhkd->bqd", scores_of(q, k).softmax(-1), v)

    check(attention, *qkv())


def test_temperature_inside_the_einsum():
    def attention(q, k, v, t):
        return attend(torch.einsum("bhqd,bhkd,h->bhqk", q, k, t), v)

    check(attention, *qkv(), normal(H))


def test_mask_of_which_each_batch_element_has_a_part():
    def attention(q, k, v, hidden):
        hidden = torch.cat([hidden[:1], hidden[1:].flip(-1)])
        return attend(scores_of(q, k).masked_fill(hidden, -1e9), v)

    check(attention, *qkv(), chance(0.5, B, 1, S, S))


def test_uniform_scores():
    check(lambda q, k, v: attend(scores_of(q * 0, k) + uniform(S, S), v), *qkv())


@pytest.mark.parametrize("finish", [lambda s: s.softmax(-1), F.relu], ids=["softmax", "relu"])
@pytest.mark.parametrize("large", [1e9, 1e31])
def test_union_of_two_masks(large, finish):
    at = torch.arange(S)
    near = ((at[:, None] - at).abs() <= 1).float()
    chosen = (at % 5 == 0).float() * (1 - near)

    def attention(q, k, v, near, chosen):
        return finish(scores_of(q, k) + (near + chosen - 1) * large) @ v

    check(attention, *qkv(), near, chosen)


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "together"])
@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e9])
def test_padded_sequence_under_two_masks(lowest, apart):
    def attention(q, k, v, kept, causal):
        hidden = (1 - kept) * lowest + (1 - causal) * lowest
        return attend(
            scores_of(q, k) + (hidden if apart else ((1 - kept) + (1 - causal)) * lowest), v
        )

    kept = torch.ones(B, 1, 1, S)
    kept[0, ..., S // 2 :], kept[1] = 0, 0
    check(attention, *qkv(), kept, torch.ones(S, S).tril())


def test_soft_mask_that_is_learned_from_one_on():
    def attention(q, k, v, gate):
        return attend(scores_of(q, k) + (1 - gate) * -10000.0, v)

    check(attention, *qkv(), torch.ones(B, 1, 1, S))


def test_constant_beside_a_product_mask():
    # 0.2 - 3.4e38 is -3.4e38: the mask's own constant must not take the other in.
    def attention(q, k, v, keep, sink):
        scores = scores_of(q, k) + 0.2 + (1.0 - keep[:, None, None, :]) * LOWEST
        scores = torch.cat((scores, sink[:, None, None].expand(B, H, S, 1)), -1)
        return scores.softmax(-1)[..., :-1] @ v

    keep = (torch.arange(S) >= torch.tensor([[0], [8]])).float()
    assert len(check(attention, *qkv(), keep, normal(H)).fused) == 1


def test_infinite_scores_times_zero():
    # Eager gives NaN wherever both masks hide a key.
    def attention(q, k, v):
        return attend(scores_of(q, k).masked_fill(future(), -INF) * triangle(), v)

    assert specs(check(attention, *qkv(), training=False)) == "lift: not-pointwise"
