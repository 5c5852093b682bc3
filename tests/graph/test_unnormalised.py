"""Attention without a softmax: what is found, its numbers, and what only looks like it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from fa3_compile.options import Options
from fa3_compile.pipeline import rewrite_attention
from fa3_compile.spec.attention import AttentionSpec
from tests.graph.harness import check, specs, weighed
from tests.graph.inputs import (
    INF,
    LOWEST,
    B,
    D,
    H,
    S,
    chance,
    normal,
    qkv,
    queries_and_keys,
)
from tests.graph.inputs import scores_of as scores


def causal() -> Tensor:
    q, kv = queries_and_keys()
    return kv <= q


class TestFunctions:
    def test_sigmoid(self):
        assert_expected_inline(
            weighed(lambda s: (s - 3).sigmoid()),
            """attention(normalize=none, score=sigmoid(0.25*s - 3))""",
        )

    def test_relu(self):
        assert_expected_inline(
            weighed(torch.relu), """attention(normalize=none, score=max(0, 0.25*s))"""
        )

    def test_squared_relu(self):
        assert_expected_inline(
            weighed(lambda s: F.relu(s).square() / S),
            """attention(normalize=none, score=0.041666666666666664*pow(max(0, 0.25*s), 2))""",
        )

    def test_silu(self):
        assert_expected_inline(
            weighed(lambda s: F.silu(s) / S),
            """attention(normalize=none, score=0.010416666666666666*s*sigmoid(0.25*s))""",
        )

    def test_exponential(self):
        assert_expected_inline(
            weighed(lambda s: (s - 2).exp()), """attention(normalize=none, score=exp(0.25*s - 2))"""
        )

    @pytest.mark.parametrize(
        "function",
        [
            lambda s: F.elu(s) + 1,
            F.softplus,
            F.gelu,
            torch.tanh,
            lambda s: s.square(),
            lambda s: s.abs().clamp(max=2.0),
            lambda s: 1 / (1 + torch.exp(-s)),
            lambda s: torch.where(s > 0.5, s, 0.0),
        ],
        ids="elu softplus gelu tanh square clamp byhand threshold".split(),
    )
    def test_others(self, function):
        assert weighed(function).startswith("attention(normalize=none, score=")

    def test_cosine_similarity(self):
        def attention(q, k, v, scale):
            s = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
            return ((s * scale.view(H, 1, 1)).clamp(min=0)) @ v

        spec = specs(check(attention, *qkv(), normal(H)))
        assert spec.startswith("attention(normalize=none, score=") and "mask=" not in spec

    def test_clamped_and_divided_by_its_size(self):
        def attention(q, k, v):
            return F.normalize((q @ k.mT).clamp(min=0), p=1, dim=-1) @ v

        assert specs(check(attention, *qkv())).startswith("attention(normalize=sums")


class TestMasks:
    """Each of these is 0 for keys after the query; all say so by a mask."""

    SPELLINGS = {
        "-inf before": lambda s: s.masked_fill(~causal(), -INF).sigmoid(),
        "added -inf": lambda s: (s + torch.zeros(S, S).masked_fill(~causal(), -INF)).sigmoid(),
        "least before": lambda s: s.masked_fill(~causal(), LOWEST).sigmoid(),
        "added least": lambda s: (s + torch.where(causal(), 0.0, LOWEST)).sigmoid(),
        "-1e9 before": lambda s: s.masked_fill(~causal(), -1e9).sigmoid(),
        "0 after": lambda s: s.sigmoid().masked_fill(~causal(), 0.0),
        "where": lambda s: torch.where(causal(), s.sigmoid(), 0.0),
        "product": lambda s: s.sigmoid() * causal(),
        "tril of ones": lambda s: s.sigmoid() * torch.ones(S, S).tril(),
        "tril": lambda s: s.sigmoid().tril(),
    }

    @pytest.mark.parametrize("weights", SPELLINGS.values(), ids=SPELLINGS)
    def test_causal(self, weights):
        expected = "attention(normalize=none, score=sigmoid(0.25*s), mask=kv <= q)"
        assert weighed(weights) == expected

    @pytest.mark.parametrize("function", [lambda s: F.elu(s) + 1, F.softplus, torch.exp])
    def test_functions_that_are_zero_at_minus_infinity(self, function):
        found = weighed(lambda s: function(s.masked_fill(~causal(), -INF)))
        assert found.endswith("mask=kv <= q)") and "inf" not in found

    def test_a_mask_of_numbers_cancels_exactly(self):
        # In float32 3e38 + s - 3e38 is 0, so that s may not be added before they cancel.
        def weights(s, keep):
            return F.elu(s + (1.0 - keep[:, None, None, :]) * LOWEST) + 1

        keep = torch.ones(B, S)
        keep[1, : S // 3] = 0
        assert weighed(weights, keep).startswith("attention(normalize=none")

    def test_two_masks(self):
        padding = chance(0.7, B, 1, 1, S)

        def weights(s, padding):
            return F.relu(s.masked_fill(~padding, -INF)) * causal()

        assert_expected_inline(
            weighed(weights, padding),
            """attention(normalize=none, score=max(0, 0.25*s), mask=(kv <= q) & (load(0, b, 0, 0, kv) != 0), aux=[bool])""",
        )

    @pytest.mark.parametrize(
        ("function", "is_left"), [(lambda s: F.elu(s) + 1, False), (F.silu, True)]
    )
    def test_two_fills(self, function, is_left):
        def attention(query, key, v):
            q, kv = queries_and_keys()
            s = scores(query, key).masked_fill((q - kv).abs() > 3, -INF)
            return function(s.masked_fill(kv > q, -INF)) @ v

        found = specs(check(attention, *qkv(), training=not is_left))
        mask = "mask=(kv <= q + 3) & (kv <= q) & (kv >= q - 3))"
        assert found == "lift: infinite-weight" if is_left else found.endswith(mask)

    @pytest.mark.parametrize("function", [F.relu, lambda s: F.elu(s) + 1])
    def test_a_mask_of_positions_as_a_number(self, function):
        found = weighed(lambda s: function(s + (1.0 - torch.arange(S) % 2) * LOWEST))
        assert found.endswith("mask=mod(kv, 2) > 0)")

    def test_a_product_of_masks_as_a_number(self):
        some, more = chance(0.7, S).float(), chance(0.7, S).float()
        found = weighed(lambda s, x, y: F.elu(s + (1.0 - x * y) * LOWEST) + 1, some, more)
        assert found.endswith("mask=load(0, kv)*load(1, kv) > 0, aux=[float, float])")

    def test_a_fill_within_reach_is_no_mask(self):
        assert "mask" not in weighed(lambda s: s.masked_fill(~causal(), -3.0).sigmoid())

    def test_rows_without_keys_are_zero(self):
        nothing = torch.zeros(B, 1, 1, S, dtype=torch.bool)
        assert "dead" not in weighed(lambda s, m: s.masked_fill(~m, -INF).sigmoid(), nothing)

    def test_infinite_weights_are_left(self):
        # silu(-inf) is NaN.
        found = specs(
            check(
                lambda q, k, v: F.silu(scores(q, k).masked_fill(~causal(), -INF)) @ v,
                *qkv(),
                training=False,
            )
        )
        assert_expected_inline(found, """lift: infinite-weight""")

    @pytest.mark.parametrize("is_number", [False, True])
    @pytest.mark.parametrize(("function", "is_left"), [(torch.sigmoid, False), (F.silu, True)])
    def test_sums_of_two_fills_are_infinite(self, function, is_left, is_number):
        # finfo.min twice is -inf: of silu NaN, though one finfo.min is 0.
        def attention(q, k, v, keep):
            padded = torch.where(keep > 0, 0.0, LOWEST) if not is_number else (1.0 - keep) * LOWEST
            s = 5 * torch.tanh(scores(q, k)) + padded
            return 0.25 * function(s + torch.where(causal(), 0.0, LOWEST)) @ v

        keep = torch.ones(B, 1, 1, S)
        keep[1, ..., : S // 3] = 0
        report = check(attention, *qkv(), keep, training=False)
        assert (specs(report) == "lift: infinite-weight") == is_left

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        ("function", "is_left"), [(torch.abs, True), (lambda s: s**3, True), (F.relu, False)]
    )
    def test_sums_of_fills_are_left(self, function, is_left, dtype):
        # Whether eager's are infinite or NaN is a matter of their order.
        def attention(q, k, v):
            lowest = torch.finfo(torch.bfloat16).min
            return function(scores(q, k).masked_fill(~causal(), lowest)) @ v

        report = check(attention, *qkv(), training=False, dtype=dtype)
        assert (specs(report) == "lift: infinite-weight") == is_left

    @pytest.mark.parametrize(("fill", "is_left"), [(LOWEST, True), (-1e4, True), (-5.0, False)])
    def test_sums_of_fills_beyond_float16_are_left(self, fill, is_left):
        def attention(q, k, v):
            q_at, kv_at = queries_and_keys()
            decayed = scores(q, k) * torch.exp(-0.1 * (q_at - kv_at).abs()).to(q.dtype)
            lowest = torch.finfo(q.dtype).min
            return decayed.masked_fill(~causal(), max(fill, lowest)) @ v

        report = check(attention, *qkv(), training=False, dtype=torch.float16)
        assert (specs(report) == "lift: infinite-weight") == is_left


class TestUses:
    def test_grouped_heads(self):
        def attention(q, k, v):
            k, v = (x.repeat_interleave(2, 1) for x in (k, v))
            return scores(q, k).sigmoid().tril() @ v

        report = check(attention, *qkv()[:1], normal(B, 2, S, D), normal(B, 2, S, D, seed=3))
        assert specs(report) == "attention(normalize=none, score=sigmoid(0.25*s), mask=kv <= q)"

    def test_no_batch(self):
        report = check(lambda x: (x @ x.mT).sigmoid() @ x, normal(S, D))
        assert_expected_inline(
            specs(report), """attention(normalize=none, score=sigmoid(s), out_order=qbhd)"""
        )

    def test_heads_last(self):
        def attention(q, k, v):
            s = torch.einsum("bqhd,bkhd->bhqk", q, k)
            return torch.einsum("bhqk,bkhd->bqhd", F.relu(s), v)

        assert_expected_inline(
            specs(check(attention, *qkv(B, S, H, D))),
            """attention(normalize=none, score=max(0, s))""",
        )

    def test_bias_and_temperature_have_gradients(self):
        found = weighed(
            lambda s, bias, t: (s * t.view(H, 1, 1) + bias).sigmoid(), normal(H, S, S), normal(H)
        )
        assert_expected_inline(
            found,
            """attention(normalize=none, score=sigmoid(0.25*load(0, h)*s + load(1, h, q, kv)), aux=[float, float])""",
        )

    def test_dropout(self):
        def attention(q, k, v):
            return F.dropout(scores(q, k).sigmoid(), 0.25, training=True) @ v

        torch._dynamo.reset()
        found: list[str] = []

        def backend(gm, example_inputs):
            rewrite_attention(gm, Options(kernels=("reference",), strict=True), "graph")
            calls = [n for n in gm.graph.nodes if n.target is torch.ops.fa3.attention.default]
            found.extend(str(AttentionSpec.parse(n.args[5].split(" #")[0])) for n in calls)
            return gm

        q, k, v = qkv()
        run = torch.compile(attention, backend=backend)
        mean = torch.stack([run(q, k, v) for _ in range(400)]).mean(0)
        assert_expected_inline(
            "\n".join(found),
            """attention(normalize=none, score=sigmoid(0.25*s)*where(uniform(load(0, 0), b, h, q, kv) < 0.25, 0, 1.3333333333333333), aux=[int])""",
        )
        assert (mean - scores(q, k).sigmoid() @ v).abs().max() < 1.0

    def test_divided_afterwards(self):
        report = check(lambda q, k, v: (F.relu(scores(q, k)) @ v) / S, *qkv())
        assert_expected_inline(specs(report), """attention(normalize=none, score=max(0, 0.25*s))""")

    def test_half_precision_and_autocast(self):
        def attention(q, k, v):
            with torch.autocast("cpu", torch.bfloat16):
                return scores(q, k).masked_fill(~causal(), -INF).sigmoid() @ v

        assert len(check(attention, *qkv()).fused) == 1
        report = check(lambda q, k, v: scores(q, k).sigmoid().tril() @ v, *qkv(dtype=torch.float16))
        assert len(report.fused) == 1

    def test_dynamic_lengths(self):
        def attention(q, k, v):
            n = q.shape[-2]
            s = scores(q, k) - torch.log(torch.tensor(float(n)))
            return s.masked_fill(torch.ones(n, n).triu(1) != 0, -INF).sigmoid() @ v

        assert len(check(attention, *qkv(), dynamic=True).fused) == 1

    def test_weights_returned(self):
        def attention(q, k, v):
            w = scores(q, k).sigmoid()
            return w @ v, w

        report = check(attention, *qkv())
        assert len(report.fused) == 1 and "computed once more" in report.regions[0].hint

    def test_beside_a_softmax(self):
        def attention(q, k, v):
            s = scores(q, k)
            return s.softmax(-1) @ v + s.sigmoid() @ v

        assert len(check(attention, *qkv()).fused) == 2

    def test_a_cache_that_is_written(self):
        class Cached(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("k", normal(B, H, S, D).detach())
                self.register_buffer("v", normal(B, H, S, D, seed=3).detach())

            def forward(self, q, k, v):
                keys, values = self.k.clone(), self.v.clone()
                keys[:, :, 5:6], values[:, :, 5:6] = k, v
                return scores(q, keys).sigmoid() @ values

        one = [normal(B, H, 1, D, seed=x).detach() for x in (1, 2, 3)]
        assert len(check(Cached(), *one, training=False).fused) == 1
