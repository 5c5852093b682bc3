"""Softmaxes over a logsumexp by hand: exp(s - lse) of lse = m + log(exp(s - m).sum()), as
explanations of FlashAttention have it."""

from __future__ import annotations

import math

import pytest
import torch

from tests.graph.harness import check, specs
from tests.graph.inputs import LOWEST, S, future, normal, qkv, scores_of


def lse(s):
    m = s.amax(-1, keepdim=True)
    return m + (s - m).exp().sum(-1, keepdim=True).log()


def lse_of_a_constant_maximum(s):
    m = s.max(dim=-1, keepdim=True).values.detach()
    return torch.log(torch.sum(torch.exp(s - m), dim=-1, keepdim=True)) + m


def lse_without_keys_axis(s):
    m = s.amax(-1)
    return (m + torch.log((s - m[..., None]).exp().sum(-1))).unsqueeze(-1)


def lse_squeezed(s):
    m = s.amax(-1, keepdim=True)
    return (m.squeeze(-1) + (s - m).exp().sum(-1).log())[..., None]


@pytest.mark.parametrize(
    "of_row", [lse, lse_of_a_constant_maximum, lse_without_keys_axis, lse_squeezed]
)
def test_a_causal_softmax(of_row):
    def attention(q, k, v):
        s = scores_of(q, k).masked_fill(future(), -math.inf)
        return (s - of_row(s)).exp() @ v

    assert specs(check(attention, *qkv())).startswith("attention(score=0.25*s, mask=kv <= q")


def test_rows_of_a_finite_fill_are_not_normalised():
    """Their fill has no log(n) left in it."""

    def attention(q, k, v, keep):
        s = scores_of(q, k).masked_fill(keep[:, None, None, :] == 0, LOWEST)
        s = s.masked_fill(future(), LOWEST)
        return (s - lse(s)).exp() @ v

    keep = torch.arange(S) >= torch.tensor([[0], [8]])
    assert specs(check(attention, *qkv(), keep)) == "lift: rows-of-fill"


def of_other_scores(s, other):
    m = other.amax(-1, keepdim=True)
    return m + (other - m).exp().sum(-1, keepdim=True).log()


def of_another_maximum(s, other):
    return other.amax(-1, keepdim=True) + (s - s.amax(-1, keepdim=True)).exp().sum(-1, True).log()


def of_columns(s, other):
    m = s.amax(-2, keepdim=True)
    return m + (s - m).exp().sum(-2, keepdim=True).log()


def held_constant_once(s, other):
    m = s.amax(-1, keepdim=True)
    return m.detach() + (s - m).exp().sum(-1, keepdim=True).log()


@pytest.mark.parametrize(
    "of_row", [of_other_scores, of_another_maximum, of_columns, held_constant_once]
)
def test_what_is_no_logsumexp_of_the_scores(of_row):
    def attention(q, k, v, other):
        s = scores_of(q, k)
        return (s - of_row(s, scores_of(other, k))).exp() @ v

    q, k, v = qkv()
    report = check(attention, q, k, v, normal(*q.shape, seed=7))
    assert not any("attention(score=0.25*s" in str(x.spec) for x in report.fused)
