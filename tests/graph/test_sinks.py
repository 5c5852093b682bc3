"""What joins the softmax without a value."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from tests.graph.harness import check, specs
from tests.graph.inputs import (
    INF,
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


def test_sinks_of_gpt_oss():
    def attention(q, k, v, sinks):
        s = scores_of(q, k)
        s = torch.cat([s, sinks.reshape(1, -1, 1, 1).expand(B, -1, S, -1)], dim=-1)
        s = s - s.max(dim=-1, keepdim=True).values
        return F.softmax(s, dim=-1, dtype=s.dtype)[..., :-1] @ v

    assert_expected_inline(
        specs(check(attention, *qkv(), normal(H))),
        """attention(score=0.25*s, sinks=[load(0, h)], aux=[float])""",
    )


def test_sink_in_the_first_column():
    def attention(q, k, v, sinks):
        s = torch.cat([sinks.view(1, H, 1, 1).expand(B, H, S, 1), scores_of(q, k)], dim=-1)
        return s.softmax(-1)[..., 1:] @ v

    assert_expected_inline(
        specs(check(attention, *qkv(), normal(H))),
        """attention(score=0.25*s, sinks=[load(0, h)], aux=[float])""",
    )


def test_two_sinks_and_a_mask():
    def attention(q, k, v, sinks):
        s = scores_of(q, k).masked_fill(future(0), -INF)
        s = torch.cat([s, sinks.view(1, H, 1, 2).expand(B, H, S, 2)], dim=-1)
        return s.softmax(-1)[..., :-2] @ v

    assert_expected_inline(
        specs(check(attention, *qkv(), normal(H, 2))),
        """attention(score=0.25*s, mask=kv <= q - 1, dead=nan, sinks=[load(0, h, 0), load(0, h, 1)], aux=[float])""",
    )


def test_sink_of_zero():
    # softmax1: exp(s) / (1 + sum exp(s)), by a column of zeros.
    def attention(q, k, v):
        return F.pad(scores_of(q, k), (0, 1)).softmax(-1)[..., :S] @ v

    assert_expected_inline(
        specs(check(attention, *qkv())), """attention(score=0.25*s, sinks=[0])"""
    )


def test_sink_for_each_query():
    def attention(q, k, v, sinks):
        s = torch.cat([scores_of(q, k), sinks], dim=-1)
        return s.softmax(-1)[..., :-1] @ v

    assert_expected_inline(
        specs(check(attention, *qkv(), normal(B, H, S, 1))),
        """attention(score=0.25*s, sinks=[load(0, b, h, q, 0)], aux=[float])""",
    )


def test_softmax_one_as_it_is_pasted():
    # The maximum is taken off first, so that the sink is the row's largest score and not 0.
    def attention(q, k, v):
        s = scores_of(q, k)
        e = (s - s.max(-1, keepdim=True).values).exp()
        return e / (1 + e.sum(-1, keepdim=True)) @ v

    assert_expected_inline(specs(check(attention, *qkv())), """detect: sink-of-the-row""")


def test_softmax_one_as_it_is_meant():
    def attention(q, k, v):
        e = scores_of(q, k).exp()
        return e / (e.sum(-1, keepdim=True) + 1) @ v

    assert_expected_inline(
        specs(check(attention, *qkv())), """attention(score=0.25*s, sinks=[0])"""
    )


def test_softmax_one_of_the_only_row():
    """Its maximum, at constant places, is no number."""

    def attention(q, k, v):
        s = scores_of(q, k).clamp(-3, 3)
        top = s.amax(-1, keepdim=True)
        e = (s - top).exp()
        return e / (e.sum(-1, keepdim=True) + torch.exp(-top)) @ v

    _, k, v = qkv(S, D)
    assert "sinks=[0]" in specs(check(attention, normal(1, D), k, v))


def test_gradient_beside_a_weight_of_nearly_one():
    """By hand the row's gradients sum to 0 exactly, as the maximum has one: dK of the key that has
    nearly all weight is a small difference that eager has every digit of."""
    q, _, v = qkv(B, H, 1, D)
    q, v = 40 * q.detach(), v.detach().expand(B, H, 8, D).clone().requires_grad_()
    logits = torch.tensor([13.0] + [-30.0] * 7)
    k = (q / q.square().sum(-1, keepdim=True) * logits[:, None]).requires_grad_()

    def attention(q, k, v):
        s = F.pad(q @ k.mT, (0, 1))
        e = (s - s.amax(-1, keepdim=True)).exp()
        return (e / e.sum(-1, keepdim=True))[..., :-1] @ v

    assert specs(check(attention, q, k, v)) == "attention(score=s, sinks=[0])"


def test_kept_column_has_a_value():
    # add_bias_kv: a key and value more, no sink.
    def attention(q, k, v, bias_k, bias_v):
        k = torch.cat([k, bias_k.expand(B, H, 1, D)], 2)
        v = torch.cat([v, bias_v.expand(B, H, 1, D)], 2)
        return attend(scores_of(q, k), v)

    report = check(attention, *qkv(), normal(1, H, 1, D), normal(1, H, 1, D, seed=7))
    assert_expected_inline(specs(report), """attention(score=0.25*s)""")


def test_a_sink_before_keys_of_which_one_is_hidden():
    # `torch.eye` of so many columns compares positions of uint16, of which the CPU has no arange.
    def attention(q, k, v):
        own = torch.eye(9, 260, dtype=torch.bool)
        s = F.pad((q @ k.mT).masked_fill(own, -1e30), (1, 0))
        e = (s - s.amax(-1, keepdim=True)).exp()
        return (e / e.sum(-1, keepdim=True))[..., 1:] @ v

    q, k, v = (normal(1, 2, n, 4, seed=i) for i, n in enumerate((9, 260, 260)))
    assert_expected_inline(
        specs(check(attention, q, k, v)),
        """attention(score=s, mask=q != kv, dead=nan, sinks=[0], out_order=bqhd)""",
    )
