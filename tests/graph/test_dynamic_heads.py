"""Batches and heads whose numbers change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

from tests.graph.harness import check, runs
from tests.graph.inputs import (
    SCALE,
    B,
    D,
    H,
    attend,
    causal,
    normal,
    of_lengths,
    qkv,
    scores_of,
)


def test_batch():
    inputs = [of_lengths(24, batch=n)[0] for n in (2, 3, 5)]
    assert_expected_inline(
        runs(causal, inputs), """attention(score=load(0)*s, mask=kv <= q, dead=nan, aux=[float])"""
    )


def test_heads_split_and_merged():
    def attention(x):
        b, n, _ = x.shape
        q, k, v = x.view(b, n, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        return attend(scores_of(q, k), v).transpose(1, 2).reshape(b, n, H * D)

    inputs = [(normal(b, n, 3 * H * D),) for b, n in ((2, 24), (3, 7), (1, 40))]
    assert_expected_inline(
        runs(attention, inputs),
        """\
attention(score=load(0)*s, aux=[float], out_order=bqhd)
attention(score=load(0)*s, aux=[float], out_order=qbhd)""",
    )


def test_heads_folded_into_the_batch():
    def attention(q, k, v):
        b, h, n, d = q.shape
        q, k, v = (x.reshape(b * h, n, d) for x in (q, k, v))
        s = torch.bmm(q, k.transpose(1, 2)) * SCALE
        return torch.bmm(s.softmax(-1), v).view(b, h, n, d)

    assert_expected_inline(
        runs(attention, of_lengths(24, 7, 40)), """attention(score=load(0)*s, aux=[float])"""
    )


def test_grouped_heads():
    def attention(q, k, v):
        b, h, n, d = k.shape
        k, v = (x[:, :, None].expand(b, h, 2, n, d).reshape(b, 2 * h, n, d) for x in (k, v))
        return attend(scores_of(q, k), v)

    inputs = [
        (normal(B, 4, n, D), normal(B, 2, n, D, seed=1), normal(B, 2, n, D, seed=2))
        for n in (24, 7, 40)
    ]
    assert_expected_inline(
        runs(attention, inputs, dynamic=None),
        """\
attention(score=0.25*s)
attention(score=0.25*s)""",
    )


def test_grouped_heads_of_both_numbers():
    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def of(batch, heads, n):
        return (
            normal(batch, 4 * heads, n, D),
            normal(batch, heads, n, D),
            normal(batch, heads, n, 9),
        )

    # One compilation for as many query heads to a KV head, whatever their number.
    assert runs(attention, [of(3, 2, 24), of(4, 3, 7)]) == "attention(score=0.25*s)"
    # With three to one there is another, and its numbers are right.
    two = (normal(3, 6, 24, D), normal(3, 2, 24, D, seed=1), normal(3, 2, 24, D, seed=2))
    assert runs(attention, [two]) == "attention(score=0.25*s)"


def test_repeated_heads_of_dynamic_number():
    # Two of a size share a symbol, so that the heads are 2 * b**2 / b.
    def repeated(x):
        b, h, n, d = x.shape
        return x[:, :, None].expand(b, h, 2, n, d).reshape(b, 2 * h, n, d)

    def attention(q, k, v):
        return attend(scores_of(q, repeated(k)), repeated(v))

    report = check(attention, normal(2, 4, 9, 16), *(x[:, :2] for x in qkv()[1:]), dynamic=True)
    assert [r.fused for r in report.regions] == [True]


@pytest.mark.filterwarnings("error:Raw SymInt")
@pytest.mark.parametrize("training", [False, True])
def test_multi_head_attention(training):
    layer = nn.MultiheadAttention(32, H, dropout=0.0, batch_first=True).train(training)

    def attention(x):
        return layer(x, x, x, need_weights=False)[0]

    assert_expected_inline(
        runs(attention, [(normal(n, m, 32),) for n, m in ((2, 8), (3, 9))]),
        """attention(score=0.35355339059327373*s, out_order=qbhd)""",
    )


def test_dynamic_batches_of_equal_size():
    # Duck shaping gives both batch dimensions one symbol: the flattened batch is its square.
    q, k, v = (normal(3, 3, H, n, D, seed=n) for n in (7, 12, 12))
    report = check(lambda q, k, v: attend(scores_of(q, k), v), q, k, v, dynamic=True)
    assert len(report.fused) == 1, str(report)
