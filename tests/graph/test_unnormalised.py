"""Attention without a softmax: what is found, its numbers, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from fa3_compile.options import Options
from fa3_compile.pipeline import rewrite_attention
from fa3_compile.spec.attention import AttentionSpec
from tests.graph.harness import check, specs
from tests.graph.inputs import INF, LOWEST, B, D, H, S, chance, normal, qkv, queries_and_keys
from tests.graph.inputs import scores_of as scores


def causal(q_len: int = S, kv_len: int = S) -> Tensor:
    q, kv = queries_and_keys(q_len, kv_len)
    return kv <= q


def weighed(weights: Callable[[Tensor], Tensor], *more: Tensor, training: bool = True) -> str:
    """The specs of weights(s) @ v; its numbers and gradients are eager's."""
    return specs(check(lambda q, k, v, *x: weights(scores(q, k), *x) @ v, *qkv(), *more))


def decay() -> Tensor:
    q, kv = queries_and_keys()
    rates = 1 - torch.exp2(-5 - torch.arange(H).float())
    return torch.where(kv <= q, rates[:, None, None] ** (q - kv).clamp(0), 0.0)


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


class TestLinear:
    def test_causal(self):
        assert_expected_inline(
            weighed(lambda s: s.tril()),
            """attention(normalize=none, score=0.25*s, mask=kv <= q)""",
        )

    def test_retention(self):
        # Sun et al. 2023, equation 5.
        assert_expected_inline(
            specs(check(lambda q, k, v: (q @ k.mT * decay()) @ v, *qkv())),
            """attention(normalize=none, score=load(0, h, kv - q + 23)*s, mask=kv <= q, aux=[float])""",
        )

    def test_decay_that_is_an_exponential_is_computed(self):
        def attention(q, k, v, rates):
            i, j = queries_and_keys()
            decays = torch.exp(-rates.view(H, 1, 1).abs() * (i - j))
            return torch.where(causal(), q @ k.mT * decays, 0.0) @ v

        assert_expected_inline(
            specs(check(attention, *qkv(), normal(H))),
            """attention(normalize=none, score=exp((kv - q)*abs(load(0, h)))*s, mask=kv <= q, aux=[float])""",
        )

    def test_decay_that_is_given(self):
        assert_expected_inline(
            weighed(lambda s, x: s * x, normal(H, S, S)),
            """attention(normalize=none, score=0.25*load(0, h, q, kv)*s, aux=[float])""",
        )

    def test_without_a_mask_it_is_cheaper_by_associativity(self):
        report = check(lambda q, k, v: scores(q, k) @ v, *qkv())
        assert_expected_inline(specs(report), """lift: linear""")
        assert "q @ (k.mT @ v)" in report.regions[0].hint

    def test_factors_of_rows_and_keys_leave_it_linear(self):
        found = weighed(lambda s, x, y: s * x * y, normal(H, S, 1), normal(H, 1, S))
        assert_expected_inline(found, """lift: linear""")


class TestRowSums:
    """Weights divided by something of their own row's sum, which is the op's second output."""

    NORMALISED = {
        "before": lambda w, v: (w / w.sum(-1, keepdim=True)) @ v,
        "after": lambda w, v: (w @ v) / (w.sum(-1, keepdim=True) + 1e-2),
        "reciprocal": lambda w, v: (w * (1 / (w.sum(-1, keepdim=True) + 1e-2))) @ v,
        "clamped": lambda w, v: (w / w.sum(-1).clamp(min=1).unsqueeze(-1)) @ v,
        "sizes": lambda w, v: (w / (w.abs().sum(-1, keepdim=True) + 1).sqrt()) @ v,
        "and a factor": lambda w, v: (w / (w.sum(-1, keepdim=True) * (1 + v[..., :1] ** 2))) @ v,
    }

    @pytest.mark.parametrize("name", NORMALISED)
    def test_relu(self, name):
        def attention(q, k, v):
            return self.NORMALISED[name]((F.relu(scores(q, k)) + 0.1).tril(), v)

        [region] = check(attention, *qkv()).regions
        assert (
            region.spec.startswith("attention(normalize=sums, score=") and region.mask == "kv <= q"
        )

    SIZES = {
        "clamped": lambda w: w / w.sum(-1, keepdim=True).abs().clamp(min=1),
        "the larger": lambda w: w / torch.maximum(w.sum(-1, keepdim=True).abs(), torch.ones(S, 1)),
        "square root": lambda w: w / (w.sum(-1, keepdim=True) ** 2 + 1).sqrt(),
        "root of the square": lambda w: w / ((w.sum(-1, keepdim=True) ** 2).sqrt() + 1),
    }

    @pytest.mark.parametrize("name", SIZES)
    def test_sizes_of_sums_of_either_sign(self, name):
        """As mLSTM (Beck et al. 2024, equation 27) and retention are normalised."""
        report = check(lambda q, k, v: self.SIZES[name](scores(q, k).tril()) @ v, *qkv())
        assert len(report.fused) == 1

    HELD = {
        "before": lambda w: w / w.detach().sum(-1, keepdim=True).abs().clamp(min=1),
        "of sizes": lambda w: w / w.relu().detach().abs().sum(-1, keepdim=True).clamp(min=1),
        "sizes held": lambda w: w / w.abs().detach().sum(-1, keepdim=True).clamp(min=1),
    }

    @pytest.mark.parametrize("name", HELD)
    def test_sums_that_are_constant_to_the_gradient(self, name):
        """As torchscale's retention divides; sizes of weights of both signs are no sum of them."""
        report = check(lambda q, k, v: self.HELD[name](scores(q, k).tril()) @ v, *qkv())
        assert bool(report.fused) == (name == "before")

    def test_sizes_of_weights_of_one_sign_that_are_constant_to_the_gradient(self):
        def attention(q, k, v):
            w = F.relu(scores(q, k)) ** 2
            return (w / w.abs().detach().sum(-1, keepdim=True).clamp(min=1)) @ v

        assert len(check(attention, *qkv()).fused) == 1

    def test_rows_of_zeros(self):
        # 0 / 0 is NaN in both.
        def attention(q, k, v):
            w = F.relu(scores(q, k)).tril(-1)
            return (w / w.sum(-1, keepdim=True)) @ v

        assert len(check(attention, *qkv(), training=False).fused) == 1

    def test_sums_are_returned_too(self):
        def attention(q, k, v):
            w = scores(q, k).sigmoid()
            return w @ v, w.sum(-1)

        [region] = check(attention, *qkv()).regions
        assert region.fused and region.hint == ""

    def test_no_sum_is_made_that_nobody_reads(self):
        def attention(q, k, v):
            w = scores(q, k).sigmoid()
            return w @ v + 0 * w.sum(-1).shape[0]

        assert_expected_inline(
            specs(check(attention, *qkv())),
            """attention(normalize=none, score=sigmoid(0.25*s))""",
        )

    def test_half_precision_grouped(self):
        def attention(q, k, v):
            k, v = (x.repeat_interleave(2, 1) for x in (k, v))
            w = F.relu(q @ k.mT) ** 2
            return (w / (w.sum(-1, keepdim=True) + 1)) @ v

        shapes = ((B, H, S, D), (B, 2, S, D), (B, 2, S, D))
        given = [normal(*x, seed=i, dtype=torch.bfloat16) for i, x in enumerate(shapes)]
        assert len(check(attention, *given).fused) == 1


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


def silent(function: Callable, *args) -> None:
    """Nothing is fused, and nothing is said of it."""
    assert check(function, *args).regions == []


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(normal(*shape).detach())


class Layers(nn.Module):
    """A program with two parameters."""

    def __init__(self, function: Callable, a: tuple[int, ...], b: tuple[int, ...]):
        super().__init__()
        self.a, self.b, self.function = parameter(*a), parameter(*b), function

    def forward(self, x):
        return self.function(x, self.a, self.b)


class TestNoAttention:
    MLPS = {
        "linear": (lambda x, a, b: F.linear(F.gelu(F.linear(x, a)), b), (32, D), (D, 32)),
        "matmul": (lambda x, a, b: torch.relu(x @ a) @ b, (D, 32), (32, D)),
        "squared": (lambda x, a, b: torch.relu(x @ a.mT).square() @ b, (32, D), (32, D)),
        "gated": (lambda x, a, b: F.silu(x @ a) * (x @ a) @ b, (D, 32), (32, D)),
        "experts": (lambda x, a, b: torch.bmm(F.relu(torch.bmm(x, a)), b), (B, D, 9), (B, 9, D)),
        "experts, einsum": (
            lambda x, a, b: torch.einsum(
                "bsf,bfd->bsd", torch.einsum("bsd,bdf->bsf", x, a).relu(), b
            ),
            (B, D, 9),
            (B, 9, D),
        ),
        "cast weights": (lambda x, a, b: torch.relu(x @ (a * 2)) @ (b + 1), (D, 32), (32, D)),
        "low rank": (lambda x, a, b: (x @ a * 0.5) @ b, (D, 4), (4, D)),
        "low rank, batched": (lambda x, a, b: torch.bmm(torch.bmm(x, a) * 2, b), (B, D, 4), (B, 4, D)),
        "bilinear": (lambda x, a, b: torch.tanh(x @ a) @ x.mT, (D, D), (1,)),
        "table of values": (lambda x, a, b: torch.relu(x @ x.mT) @ a, (S, D), (1,)),
    }  # fmt: skip

    @pytest.mark.parametrize("name", MLPS)
    def test_parameters(self, name):
        silent(Layers(*self.MLPS[name]), normal(B, S, D))

    def test_weights_as_buffers(self):
        class Quantised(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("a", normal(D, 32).detach())
                self.register_buffer("b", normal(32, D).detach())

            def forward(self, x):
                return torch.relu(x @ (self.a * 0.1)) @ (self.b * 0.1)

        silent(Quantised(), normal(S, D))

    def test_given_matrices(self):
        silent(lambda x, a, b: torch.relu(x @ a) @ b, normal(B, S, D), normal(D, 32), normal(32, D))
        silent(lambda x, a, b: torch.relu(x @ a) @ b, normal(S, D), normal(D, 32), normal(32, D))

    CHAINS = {
        "plain": lambda q, k, v: (q @ k.mT) @ v,
        "moved": lambda q, k, v: (q @ k.mT).contiguous().view(B, H, S, S) @ v,
        "state": lambda q, k, v: F.elu(q) @ ((F.elu(k).mT @ v) / S),
        "gram": lambda q, k, v: ((q.mT @ q / S - k.mT @ k / S) ** 2).sum(),
        "covariance": lambda q, k, v: (q - q.mean(-2, keepdim=True)) @ (q.mT @ q / S),
        "outer": lambda q, k, v: torch.relu(q[..., :1] * k[..., :1].mT).sum(-1),
        "Newton-Schulz": lambda q, k, v: (2 * (a := q @ q.mT) - a @ a) @ q,
        "rows of the weights": lambda q, k, v: torch.relu(q @ k.mT).mT.sum(-1),
    }

    @pytest.mark.parametrize("function", CHAINS.values(), ids=CHAINS)
    def test_chains(self, function):
        assert check(function, *qkv()).fused == []

    def test_rotary_frequencies(self):
        def rotated(q, k, v, inverse, positions):
            angles = (inverse[None, :, None].expand(B, -1, 1) @ positions[:, None, :]).mT
            cos = torch.cat((angles, angles), -1).cos()[:, None]
            return (q * cos) @ (k * cos).mT

        given = (torch.rand(D // 2), torch.arange(S).float().expand(B, S))
        silent(rotated, *qkv(), *given)

    MIXED = {
        "cumulative": lambda s: s.sigmoid().cumsum(-1),
        "sorted": lambda s: s.sigmoid().sort(-1).values,
        "rolled": lambda s: s.sigmoid().roll(1, -1),
        "flipped": lambda s: s.sigmoid().flip(-1),
        "sums of sizes": lambda s: s.tanh() / (s.tanh().abs().sum(-1, keepdim=True) + 1),
        "sums of other weights": lambda s: F.relu(s) / (s.sigmoid().sum(-1, keepdim=True) + 1),
        "sums and factors": lambda s: (
            F.relu(s) / (F.relu(s).sum(-1, keepdim=True) + torch.arange(S))
        ),
        "sums times factors": lambda s: (
            F.relu(s) / (F.relu(s).sum(-1, keepdim=True) * torch.arange(1, S + 1))
        ),
        "sums of other rows": lambda s: F.relu(s) / (F.relu(s).sum(-1)[:, :, None] + 1),
        "sums of all": lambda s: F.relu(s) / (F.relu(s).sum((-1, -2), keepdim=True) + 1),
        "column sums off": lambda s: F.relu(s) / (F.relu(s).sum(-2, keepdim=True) + 1),
        "row maximum off": lambda s: (s - s.amax(-1, keepdim=True)).sigmoid(),
        "normalised": lambda s: F.normalize(F.relu(s), dim=-1),
        "heads mixed": lambda s: s.sigmoid() + s.mean(1, keepdim=True),
        "detached": lambda s: s.sigmoid().detach(),
    }

    @pytest.mark.parametrize("name", MIXED)
    def test_keys_mixed(self, name):
        weights = self.MIXED[name]
        report = check(lambda q, k, v: weights(scores(q, k)) @ v, *qkv())
        assert report.fused == []

    def test_what_is_left_says_why(self):
        report = check(lambda q, k, v: scores(q, k).sigmoid().cumsum(-1) @ v, *qkv())
        [region] = report.regions
        assert region.code == "not-pointwise" and "cumsum" in region.reason

    def test_weights_of_the_other_axis(self):
        report = check(lambda q, k, v: scores(q, k).sigmoid().mT @ v, *qkv())
        # The keys weigh the queries: attention with q and k exchanged.
        assert_expected_inline(
            specs(report), """attention(normalize=none, score=sigmoid(0.25*s))"""
        )

    def test_values_of_another_batch(self):
        report = check(lambda q, k, v: scores(q, k).sigmoid() @ v.flip(0), *qkv())
        assert len(report.fused) == 1  # v.flip(0) is a tensor of the program
        mixed = check(lambda q, k, v: scores(q, k).sigmoid().flip(0) @ v, *qkv())
        assert mixed.fused == []

    @pytest.mark.parametrize("parts", ["chunk", "unbind"])
    def test_weights_that_are_given(self, parts):
        def shared(x, w, weights):
            y = x @ w
            v = y.chunk(3, -1)[2] if parts == "chunk" else y.unflatten(-1, (3, D)).unbind(-2)[2]
            return weights.softmax(-1) @ v

        assert specs(check(shared, normal(S, D), normal(D, 3 * D), normal(S, S))) == ""

    def test_values_made_of_the_weights(self):
        def attention(q, k, v):
            w = scores(q, k).sigmoid()
            return w @ (w @ v)

        # The second's values are made of its weights, as the first's output is.
        assert len(check(attention, *qkv()).fused) == 1


def test_sums_of_other_weights_are_told():
    def softpick(s):
        e = s.exp() - 1
        return e.relu() / (e.abs().sum(-1, keepdim=True) + 1e-6)

    assert weighed(softpick) == "lift: not-pointwise"


def test_sums_over_experts_are_not():
    def mixture(x, up, down, gate):
        h = torch.einsum("td,edf->etf", x, up).relu() * gate.mT[..., None]
        return torch.einsum("etf,efd->etd", h, down).sum(0)

    tensors = normal(S, D), normal(3, D, 8), normal(3, 8, D), normal(S, 3)
    assert not check(mixture, *tensors).regions
