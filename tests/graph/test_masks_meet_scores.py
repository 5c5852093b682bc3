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
    SCALE,
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
    uniform,
)
from tests.graph.test_masks import PASSED_IN


def ones():
    return torch.tril(torch.ones(S, S))


def _hidden_where_small(s):
    s = s.clone()
    s[s.abs() < 0.5] = -INF
    return s


# Each is applied to s; what a hidden key ends up with is in the name.
ORDERS = {
    "capped: -3": lambda s: 3 * torch.tanh(s.masked_fill(future(), -INF) / 3),
    "capped: -3, of finfo.min": lambda s: 3 * torch.tanh((s + (1 - ones()) * LOWEST) / 3),
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
    "added twice, made finite": lambda s: torch.nan_to_num(s + ones().log() + ones().mT.log()),
    "made finite: 7": lambda s: torch.nan_to_num(
        s + ones().log() - ones().mT.log(), nan=7.0, posinf=1.0, neginf=-2.0
    ),
    "scaled afterwards": lambda s: s.masked_fill(future(), LOWEST) * 0.125,
    "scaled up afterwards": lambda s: s.masked_fill(future(), -1e30) * 8,
    "divided afterwards": lambda s: (s + (1 - ones()) * -1e9) / 1e9,
    "negated: the hidden attract": lambda s: -s.masked_fill(future(), -1e9),
    "negated twice": lambda s: -(-s).masked_fill(future(), INF),
    "subtracted": lambda s: s - future() * 1e9,
    "subtracted, infinity": lambda s: s - torch.full((S, S), INF).triu(1),
    "multiplied, then filled": lambda s: s * ones() - 1e4 * (1 - ones()),
    "multiplied, then lowest": lambda s: s * ones() + LOWEST * (1 - ones()),
    "logarithm of almost zero": lambda s: s + (ones() + 1e-45).log(),
    "logarithm of 1e-9": lambda s: s + (ones() + 1e-9).log(),
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


def masked_by(function, *masks, grad=False):
    """Specs, for a padding mask of 0 and 1 in each of several types."""
    found = set()
    for mask in masks:
        report = check(lambda q, k, v, m: attend(function(scores_of(q, k), m), v), *qkv(), mask)
        found.add(specs(report).replace("aux=[float]", "aux=[..]").replace("aux=[int]", "aux=[..]"))
    return "\n".join(sorted(found))


def padding():
    return (torch.arange(S) >= torch.tensor([[0], [6]])).view(B, 1, 1, S)


NUMBERS = (torch.int64, torch.int32, torch.float32, torch.bfloat16)


def test_masks_of_every_type():
    masks = [padding().to(dtype) for dtype in NUMBERS]
    assert_expected_inline(
        masked_by(lambda s, m: s.masked_fill(m == 0, -INF), *masks),
        """attention(score=0.25*s, mask=load(0, b, 0, 0, kv) != 0, dead=nan, aux=[..])""",
    )
    assert_expected_inline(
        masked_by(lambda s, m: s.masked_fill(m < 0.5, -INF), *masks[:2]),
        """attention(score=0.25*s, mask=load(0, b, 0, 0, kv) >= 0.5, dead=nan, aux=[..])""",
    )
    assert_expected_inline(
        masked_by(lambda s, m: torch.where(m.bool(), s, LOWEST), *masks),
        """attention(score=0.25*s, mask=load(0, b, 0, 0, kv) != 0, dead=score, fill=-3.4028234663852886e+38, aux=[..])""",
    )
    assert_expected_inline(
        masked_by(lambda s, m: s + (1.0 - m.to(s.dtype)) * LOWEST, *masks),
        """attention(score=0.25*s + where(load(0, b, 0, 0, kv) == 1, 0, 3.4028234663852886e+38*load(0, b, 0, 0, kv) - 3.4028234663852886e+38), mask=load(0, b, 0, 0, kv) > 0, dead=score, fill=0.25*s + where(load(0, b, 0, 0, kv) == 1, 0, 3.4028234663852886e+38*load(0, b, 0, 0, kv) - 3.4028234663852886e+38), aux=[..])""",
    )
    assert_expected_inline(
        masked_by(lambda s, m: s + (m.to(s.dtype) - 1.0) * 1e9, *masks),
        """attention(score=0.25*s + where(load(0, b, 0, 0, kv) == 1, 0, 1000000000.0*load(0, b, 0, 0, kv) - 1000000000.0), aux=[..])""",
    )
    assert_expected_inline(
        masked_by(lambda s, m: s * m + (1 - m.to(s.dtype)) * -1e9, *masks),
        """attention(score=0.25*load(0, b, 0, 0, kv)*s + where(load(0, b, 0, 0, kv) == 1, 0, 1000000000.0*load(0, b, 0, 0, kv) - 1000000000.0), aux=[..])""",
    )
    assert_expected_inline(
        masked_by(lambda s, m: s + torch.log(m.to(s.dtype)), *masks[:2]),
        """attention(score=load(0, b, 0, 0, kv) + 0.25*s, aux=[..])""",
    )


def test_mask_of_bytes():
    def attention(q, k, v, mask):
        return attend(scores_of(q, k) + (mask.to(q.dtype) - 1.0) * 1e9, v)

    check(attention, *qkv(), padding().to(torch.uint8))


MASKS_OF_NUMBERS = {
    "multiplied by a triangle": lambda s, m: s + (1 - ones() * m) * -1e9,
    "of keys and of queries": lambda s, m: s + (1.0 - (m * m.mT).float()) * LOWEST,
    "the smaller of two": lambda s, m: (
        s + torch.minimum((ones() - 1) * -LOWEST, (1 - m.float()) * LOWEST)
    ),
    "with a floor, as OPT has it": lambda s, m: torch.max(
        s + (1 - m.float()) * LOWEST, torch.tensor(LOWEST)
    ),
    "clamped, as GPT-J had it": lambda s, m: (s + (1 - m.float()) * LOWEST).clamp(min=LOWEST),
}


@pytest.mark.parametrize("rows", ["some keys", "no key"])
@pytest.mark.parametrize("name", MASKS_OF_NUMBERS)
def test_mask_of_integers(name, rows):
    mask = padding().long() * (rows == "some keys")
    mask[0] = 1
    report = check(
        lambda q, k, v, m: attend(MASKS_OF_NUMBERS[name](scores_of(q, k), m), v), *qkv(), mask
    )
    assert [region.fused for region in report.regions] == [True]


def test_boolean_masks():
    for function in (
        lambda s, m: s + (1.0 - m.float()) * LOWEST,
        lambda s, m: s.masked_fill(~m, LOWEST),
        lambda s, m: s + torch.where(m, 0.0, LOWEST),
        lambda s, m: s + torch.zeros(m.shape).masked_fill(~m, LOWEST),
        lambda s, m: s + (~m) * LOWEST,
        lambda s, m: s.masked_fill(m.logical_not(), LOWEST),
        lambda s, m: s.masked_fill(m == False, LOWEST),  # noqa: E712
        lambda s, m: s.masked_fill(m ^ True, LOWEST),
        lambda s, m: s.masked_fill(m.long() < 1, LOWEST),
        lambda s, m: s.masked_fill((1 - m.int()).bool(), LOWEST),
    ):
        assert "mask=load(0, b, 0, 0, kv) != 0, dead=score" in masked_by(function, padding())


@pytest.mark.parametrize(("shape", "index"), PASSED_IN.values(), ids=PASSED_IN)
def test_bias_that_is_learned(shape, index):
    # Its gradient is summed over what it was broadcast along.
    def attention(q, k, v, bias):
        return attend(scores_of(q, k).masked_fill(future(), -INF) + bias, v)

    assert f"load(0, {index})" in specs(check(attention, *qkv(), normal(*shape)))


def test_one_bias_in_two_places():
    def attention(q, k, v, bias):
        return attend(scores_of(q, k) + bias + bias.mT, v)

    def of_keys_and_queries(q, k, v, bias):
        return attend(scores_of(q, k) + bias[:, None] * bias[None, :], v)

    assert_expected_inline(
        specs(check(attention, *qkv(), normal(S, S))),
        """attention(score=load(0, kv, q) + load(0, q, kv) + 0.25*s, aux=[float])""",
    )
    assert_expected_inline(
        specs(check(of_keys_and_queries, *qkv(), normal(S))),
        """attention(score=load(0, kv)*load(0, q) + 0.25*s, aux=[float])""",
    )


def test_bias_made_of_the_queries():
    # k's norm as a bias, q's as a temperature: gradients flow through the captured tensors too.
    def attention(q, k, v):
        s = scores_of(q, k) - k.square().sum(-1)[:, :, None, :] / 8
        return attend(s / q.norm(dim=-1, keepdim=True), v)

    assert_expected_inline(
        specs(check(attention, *qkv())),
        """attention(score=(0.25*s - 0.125*load(0, b, h, kv))*pow(load(1, b, h, q, 0), -1), aux=[float, float])""",
    )


@pytest.mark.parametrize("heads", [(), (H,)], ids=["shared", "of each head"])
def test_bias_that_is_a_product_of_positions(heads):
    # The larger product is that of queries and keys, wherever the bias stands.
    def attention(q, k, v, table):
        return attend(table @ table.mT + scores_of(q, k), v)

    report = check(attention, *qkv(), normal(*heads, S, 3))
    index = "h, q, kv" if heads else "q, kv"
    assert specs(report) == f"attention(score=load(0, {index}) + 0.25*s, aux=[float])"


def test_distances_by_products():
    # -|q - k|^2, expanded as everyone writes it.
    def attention(q, k, v):
        d = q.square().sum(-1, True) + k.square().sum(-1)[..., None, :] - 2 * (q @ k.mT)
        return attend(-d / 4, v)

    assert_expected_inline(
        specs(check(attention, *qkv())),
        """attention(score=0.5*s - 0.25*load(0, b, h, q, 0) - 0.25*load(1, b, h, kv), aux=[float, float])""",
    )


def test_gate_for_each_key_in_the_exponent():
    # Forgetting attention: differences of a cumulative sum of log gates.
    def attention(q, k, v, gates):
        total = F.logsigmoid(gates).cumsum(-1)
        decay = total[..., :, None] - total[..., None, :]
        return attend((scores_of(q, k) + decay).masked_fill(future(), -INF), v)

    assert_expected_inline(
        specs(check(attention, *qkv(), normal(B, H, S))),
        """attention(score=load(0, b, h, q) + 0.25*s - load(0, b, h, kv), mask=kv <= q, dead=nan, aux=[float])""",
    )


def test_bias_of_another_type():
    def attention(q, k, v, bias):
        return attend(scores_of(q, k) + bias, v)

    for dtype in (torch.bfloat16, torch.float16):
        check(attention, *qkv(), normal(H, S, S).detach().to(dtype))


def test_half_precision_bias_is_rounded_as_eager_rounds_it():
    def attention(q, k, v, bias):
        s = scores_of(q, k) + 3 * bias.to(q.dtype)
        return F.softmax(s, -1, dtype=torch.float32).to(q.dtype) @ v

    check(attention, *qkv(dtype=torch.bfloat16), normal(H, S, S))


def test_positions_in_half_precision():
    # bfloat16 holds integers up to 256.
    def attention(q, k, v):
        at = torch.arange(300, dtype=torch.bfloat16)
        s = q @ k.mT * SCALE - (at[:, None] - at[None, :]).abs()
        return F.softmax(s.float(), -1).to(q.dtype) @ v

    check(attention, *qkv(1, 1, 300, D, dtype=torch.bfloat16))


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


def test_gated_weights_of_another_attention():
    # The second attention is biased by the first one's weights.
    def attention(q, k, v):
        p = scores_of(k, q).softmax(-1)
        return attend(scores_of(q, k) + p, v)

    check(attention, *qkv())


def test_output_of_one_attention_as_bias_of_the_next():
    def attention(q, k, v):
        y = attend(scores_of(q, k), v)
        return attend(scores_of(q, k) + y.sum(-1)[..., None, :], y)

    check(attention, *qkv())


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


def test_bias_of_nan_and_infinities_made_finite():
    bias = normal(B, H, S, S, seed=9).detach()
    bias[0, 0, :3, 0] = torch.tensor([float("nan"), INF, -INF])

    def attention(q, k, v, bias):
        return torch.nan_to_num(scores_of(q, k) + bias, nan=1.5, neginf=-100.0).softmax(-1) @ v

    check(attention, *qkv(), bias, training=False)


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
        return attend(scores_of(q, k).masked_fill(future(), -INF) * ones(), v)

    assert specs(check(attention, *qkv(), training=False)) == "lift: not-pointwise"
