"""Scores of more keys than are weighed: keys that are left out after their product."""

from __future__ import annotations

import pytest
import torch

from tests.graph.harness import check, specs
from tests.graph.inputs import D, H, S, attend, future, normal, qkv, scores_of


@pytest.mark.parametrize("kept", [slice(2, 7), slice(0, 7), slice(-5, None)])
def test_keys_that_a_slice_keeps(kept):
    def attention(q, k, v):
        return attend(scores_of(q, k)[..., kept], v[..., kept, :])

    assert specs(check(attention, *qkv())) == "attention(score=0.25*s)"


def test_a_mask_and_a_bias_of_all_keys():
    def attention(q, k, v, bias):
        scores = (scores_of(q, k) + bias).masked_fill(future(), -torch.inf)
        return attend(scores[..., 2:, :-2], v[..., :-2, :])

    assert "mask=kv <= q + 2" in specs(check(attention, *qkv(), normal(H, S, S)))


def test_other_values_than_the_keys():
    def attention(q, k, v):
        return attend(scores_of(q, k)[..., 2:], v[..., :-2, :])

    assert check(attention, *qkv()).fused


@pytest.mark.parametrize("kept", [slice(2, None), slice(0, 7)])
def test_powers_of_a_slice(kept):
    """No softmax by name: a product that leads to another by an axis of which a part is left."""

    def attention(q, k, v):
        e = 2 ** scores_of(q, k)[..., kept].abs()
        return e / e.sum(-1, keepdim=True) @ v[..., kept, :]

    assert check(attention, *qkv()).fused


@pytest.mark.parametrize("kept", [slice(2, None), slice(0, 7)])
def test_a_function_of_a_slice(kept):
    def attention(q, k, v):
        return torch.relu(scores_of(q, k)[..., kept]) @ v[..., kept, :]

    assert "normalize=none" in specs(check(attention, *qkv()))


def test_every_second_key_is_left():
    def attention(q, k, v):
        return attend(scores_of(q, k)[..., ::2], v[..., ::2, :])

    assert specs(check(attention, *qkv())) == "detect: product-axes"


def test_keys_of_zeros_before_the_first_are_left():
    def attention(q, k, v):
        return attend(torch.nn.functional.pad(scores_of(q, k), (2, 0)), v)

    q, k, v = qkv()
    assert not check(attention, q, k, normal(2, H, S + 2, D)).fused
