"""Biases that are learned, given or computed, and how their types round."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from tests.graph.harness import check, specs
from tests.graph.inputs import (
    INF,
    PASSED_IN,
    SCALE,
    B,
    D,
    H,
    S,
    attend,
    future,
    normal,
    qkv,
    scores_of,
)


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


def test_bias_of_nan_and_infinities_made_finite():
    bias = normal(B, H, S, S, seed=9).detach()
    bias[0, 0, :3, 0] = torch.tensor([float("nan"), INF, -INF])

    def attention(q, k, v, bias):
        return torch.nan_to_num(scores_of(q, k) + bias, nan=1.5, neginf=-100.0).softmax(-1) @ v

    check(attention, *qkv(), bias, training=False)
