"""What random programs and real models showed to be wrong or left alone, one program each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fa3_compile.testing import assert_matches_eager
from tests.graph.harness import check, rewrite_only, specs
from tests.graph.inputs import INF, LOWEST, B, D, H, S, attend, normal, qkv, scores_of, uniform

KEEP = torch.ones(B, S)
KEEP[1, :8] = 0


def beside(scores, sink):
    """The scores with a sink's column, which a shift of the scores alone does not move."""
    return torch.cat((scores, sink[:, None, None].expand(B, H, S, 1)), -1)


def causal():
    at = torch.arange(S)
    return at[None, :] <= at[:, None]


def test_constant_beside_a_product_mask():
    # 0.2 - 3.4e38 is -3.4e38: the mask's own constant must not take the other in.
    def attention(q, k, v, keep, sink):
        scores = scores_of(q, k) + 0.2 + (1.0 - keep[:, None, None, :]) * LOWEST
        return beside(scores, sink).softmax(-1)[..., :-1] @ v

    assert len(check(attention, *qkv(), KEEP, normal(H)).fused) == 1


def test_maximum_taken_off_the_scores_but_not_off_the_sink():
    def attention(q, k, v, sink):
        scores = scores_of(q, k)
        scores = scores - scores.amax(-1, keepdim=True)
        return beside(scores, sink).softmax(-1)[..., :-1] @ v

    assert not check(attention, *qkv(), normal(H)).fused


def test_maximum_times_a_number():
    # CogView: (x / c - max(x / c)) * c stays in half precision.
    def attention(q, k, v):
        scores = scores_of(q, k) / 32
        return attend((scores - scores.amax(-1, keepdim=True)) * 32, v)

    assert specs(check(attention, *qkv())).startswith("attention(score=0.25*s")


def test_infinite_scores_times_zero():
    # Eager gives NaN wherever both masks hide a key.
    def attention(q, k, v):
        scores = scores_of(q, k).masked_fill(~causal(), -INF) * causal()
        return attend(scores, v)

    assert specs(check(attention, *qkv(), training=False)) == "lift: not-pointwise"


@pytest.mark.parametrize("value", [LOWEST, -1e9])
def test_rows_of_fill_less_their_logsumexp(value):
    def attention(q, k, v, keep):
        scores = scores_of(q, k).masked_fill(keep[:, None, None, :] == 0, value)
        scores = scores.masked_fill(~causal(), value)
        return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v

    assert specs(check(attention, *qkv(), KEEP)) == "lift: rows-of-fill"


def test_exponentials_beside_a_sink_without_a_maximum():
    def attention(q, k, v, sink):
        e = beside(scores_of(q, k), sink).exp()
        return (e / e.sum(-1, keepdim=True))[..., :-1] @ v

    assert "sinks=[load(0, h)]" in specs(check(attention, *qkv(), normal(H)))


@pytest.mark.parametrize(
    "function", [F.silu, F.gelu, F.elu, F.mish, F.hardswish, F.softsign], ids=lambda f: f.__name__
)
def test_activation_of_the_scores(function):
    assert len(check(lambda q, k, v: attend(function(scores_of(q, k)), v), *qkv()).fused) == 1


def test_bias_scaled_in_place_before():
    # What the load would read is no more in memory: the scaled tensor is read instead.
    def attention(q, k, v, x):
        bias = x.sin()
        bias *= 3
        return attend(scores_of(q, k) + bias, v)

    report = check(attention, *qkv(), uniform(S, S))
    assert specs(report) == "attention(score=load(0, q, kv) + 0.25*s, aux=[float])"


FLOATS = {"scale": 0.3, "fill": -1e4}


def test_floats_of_a_dynamic_program():
    # Dynamo makes them symbols, which no spec has a word for: they are read as tensors.
    def attention(q, k, v):
        scores = (q @ k.mT * FLOATS["scale"]).masked_fill(~causal(), FLOATS["fill"])
        return attend(scores + torch.where(causal(), 0.0, max(FLOATS["fill"], LOWEST)), v)

    report = assert_matches_eager(
        attention, *qkv(), backend=rewrite_only, dynamic=True, training=True
    )
    assert len(report.fused) == 1, str(report)


def test_dynamic_batches_of_equal_size():
    # Duck shaping gives both batch dimensions one symbol: the flattened batch is its square.
    q, k, v = (normal(3, 3, H, n, D, seed=n) for n in (7, 12, 12))
    report = assert_matches_eager(
        lambda q, k, v: attend(scores_of(q, k), v), q, k, v, backend=rewrite_only, dynamic=True
    )
    assert len(report.fused) == 1, str(report)


@pytest.mark.parametrize(
    "options",
    [{"kdim": 24, "vdim": 40}, {"add_bias_kv": True}, {"add_zero_attn": True}],
    ids=lambda x: "-".join(x),
)
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(options, need_weights):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(32, 4, batch_first=True, **options)

        def forward(self, q, k, v, padding):
            return self.inner(q, k, v, padding, need_weights=need_weights)[0]

    torch.manual_seed(0)
    padding = torch.arange(11) >= torch.tensor([[11], [6]])
    k, v = normal(B, 11, options.get("kdim", 32)), normal(B, 11, options.get("vdim", 32))
    assert len(check(Attention(), normal(B, 9, 32), k, v, padding).fused) == 1


def test_booleans_among_the_outputs():
    def attention(q, k, v):
        scores = q @ k.mT
        return scores.softmax(-1) @ v, (q > 0).any(-1)

    [region] = check(attention, *qkv()).regions
    assert region.fused
