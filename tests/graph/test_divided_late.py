"""Softmaxes that are normalised after the product with V, as online softmaxes are."""

from __future__ import annotations

import pytest
import torch

from tests.graph.harness import check, specs
from tests.graph.inputs import D, S, normal, qkv, scores_of

PLAIN = "attention(score=0.25*s)"


def exponentials(q, k, mask=None):
    s = scores_of(q, k)
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    return torch.exp(s - s.amax(-1, keepdim=True))


def causal():
    return torch.ones(S, S, dtype=torch.bool).tril()


def plain(q, k, v):
    e = exponentials(q, k)
    return (e @ v) / e.sum(-1, keepdim=True)


def unshifted(q, k, v):
    e = scores_of(q, k).exp()
    return torch.div(e @ v, e.sum(-1).unsqueeze(-1))


def by_reciprocal(q, k, v):
    e = exponentials(q, k)
    return e.sum(-1, keepdim=True).reciprocal() * (e @ v)


@pytest.mark.parametrize("function", [plain, unshifted, by_reciprocal])
def test_spellings(function):
    assert specs(check(function, *qkv())) == PLAIN


def test_mask_and_heads_last():
    def attention(q, k, v):
        e = exponentials(q, k, causal())
        o = torch.einsum("bhij,bhjd->bihd", e, v)
        return (o / e.sum(-1).transpose(1, 2)[..., None]).flatten(2)

    expected = "attention(score=0.25*s, mask=kv <= q, dead=nan, out_order=bqhd)"
    assert specs(check(attention, *qkv())) == expected


def test_sink_in_the_sum():
    def attention(q, k, v):
        s = scores_of(q, k)
        m = s.amax(-1, keepdim=True)
        e = torch.exp(s - m)
        return (e @ v) / (e.sum(-1, keepdim=True) + torch.exp(-m))

    assert specs(check(attention, *qkv())) == "attention(score=0.25*s, sinks=[0])"


def test_two_in_a_row():
    def attention(q, k, v):
        return plain(plain(q, k, v), k, v)

    assert specs(check(attention, *qkv())) == f"{PLAIN}\n{PLAIN}"


def test_the_product_is_used_too():
    def attention(q, k, v):
        e = exponentials(q, k)
        o = e @ v
        return o / e.sum(-1, keepdim=True), o

    assert specs(check(attention, *qkv())) == PLAIN


class TestNearMisses:
    def test_sum_over_queries(self):
        def attention(q, k, v):
            e = exponentials(q, k)
            return (e @ v) / e.sum(-2).unsqueeze(-1)

        assert not any(r.fused for r in check(attention, *qkv()).regions)

    def test_sum_of_another_row(self):
        def attention(q, k, v):
            e = exponentials(q, k)
            return (e @ v) / e.sum(-1, keepdim=True).roll(1, 2)

        assert not any(r.fused for r in check(attention, *qkv()).regions)

    def test_sum_of_other_exponentials(self):
        def attention(q, k, v):
            e, other = exponentials(q, k), exponentials(q, k, causal())
            return (e @ v) / other.sum(-1, keepdim=True)

        assert not any(r.fused for r in check(attention, *qkv()).regions)

    def test_values_are_changed_before_the_division(self):
        def attention(q, k, v, w):
            e = exponentials(q, k)
            return (e @ v + w) / e.sum(-1, keepdim=True)

        assert not any(r.fused for r in check(attention, *qkv(), normal(D)).regions)

    def test_sum_of_some_of_the_keys(self):
        def attention(q, k, v):
            e = exponentials(q, k)
            return (e @ v) / e[..., 1:].sum(-1, keepdim=True)

        assert not any(r.fused for r in check(attention, *qkv()).regions)
