"""Attention as well-known repositories write it, restated in our own words: all of it fused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.harness import check, specs
from tests.graph.inputs import INF, B, D, H, S, normal, qkv

WIDTH = H * D
LOWEST = -torch.finfo(torch.float32).max


def parameters(module: nn.Module) -> nn.Module:
    """Weights under which the scores are of size one, the same in every run."""
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(normal(*parameter.shape, seed=seed) * scale)
    return module


def tokens(*shape: int) -> Tensor:
    return normal(*(shape or (B, S, WIDTH)), seed=9)


def heads(x: Tensor, count: int = H) -> Tensor:
    """b n (h d) -> b h n d"""
    return x.reshape(*x.shape[:-1], count, -1).transpose(-2, -3)


def merged(x: Tensor) -> Tensor:
    """b h n d -> b n (h d)"""
    return x.transpose(-2, -3).flatten(-2)


def fused(function: Callable[..., object], *args: object, regions: int = 1) -> list[str]:
    """The specs, after the numbers and the gradients were compared with eager's."""
    report = check(function, *args)
    assert len(report.fused) == len(report.regions) == regions, specs(report)
    return specs(report).splitlines()


class NanoGPT(nn.Module):
    """karpathy/nanoGPT, the path without flash."""

    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.0), nn.Dropout(0.0)
        self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, x):
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(c, dim=2)
        k = k.view(b, t, H, c // H).transpose(1, 2)
        q = q.view(b, t, H, c // H).transpose(1, 2)
        v = v.view(b, t, H, c // H).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(b, t, c)
        return self.resid_dropout(self.c_proj(y))


class AnnotatedTransformer(nn.Module):
    """Harvard NLP's: the weights are returned by the function and kept on the module."""

    def __init__(self, keep: bool = False):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.keep = keep

    @staticmethod
    def attention(query, key, value, mask=None):
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.size(-1))
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        p_attn = scores.softmax(dim=-1)
        return torch.matmul(p_attn, value), p_attn

    def forward(self, query, key, value, mask=None):
        mask = None if mask is None else mask.unsqueeze(1)
        n = query.size(0)
        query, key, value = (
            linear(x).view(n, -1, H, D).transpose(1, 2)
            for linear, x in zip(self.linears, (query, key, value))
        )
        x, weights = self.attention(query, key, value, mask)
        return self.linears[-1](x.transpose(1, 2).contiguous().view(n, -1, H * D))


class TestTransformers:
    def test_nano_gpt(self):
        # The mask is a buffer, which may change: it is read, and its blocks mapped, at run time.
        (spec,) = fused(parameters(NanoGPT()), tokens())
        assert "mask=load(0, 0, 0, q, kv) != 0" in spec

    def test_annotated_transformer(self):
        module, x = parameters(AnnotatedTransformer()), tokens()
        source = torch.ones(B, 1, S, dtype=torch.long)
        source[1, :, 15:] = 0
        target = source & torch.ones(1, S, S, dtype=torch.long).tril()
        fused(module, x, x, x, source)
        fused(module, x, x, x, target)
        fused(module, x, tokens(B, 11, WIDTH), tokens(B, 11, WIDTH))


def x_attend(
    q,
    k,
    v,
    *,
    mask=None,
    bias=None,
    causal=False,
    zero_kv=False,
    clamp=None,
    sink=None,
    scale=D**-0.5,
):
    """x-transformers' Attend, its pieces in its order."""
    if zero_kv:
        k, v = (F.pad(x, (0, 0, 1, 0)) for x in (k, v))
        mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        bias = None if bias is None else F.pad(bias, (1, 0))
    inputs = "b j d" if k.dim() == 3 else "b h j d"
    sim = torch.einsum(f"b h i d, {inputs} -> b h i j", q, k) * scale
    similarities = sim.clone()
    if bias is not None:
        sim = sim + bias
    if clamp is not None:
        sim = (sim / clamp).tanh() * clamp
    i, j = sim.shape[-2:]
    if mask is not None:
        sim = sim.masked_fill(~mask, LOWEST)
    if causal:
        sim = sim.masked_fill(torch.ones(i, j, dtype=torch.bool).triu(j - i + 1), LOWEST)
    if sink is not None:
        sim = torch.cat((sink[None, :, None, None].expand(*sim.shape[:-1], 1), sim), dim=-1)
    before = sim
    attn = F.softmax(sim, dim=-1, dtype=torch.float32).type(sim.dtype)
    after = attn
    if sink is not None:
        attn = attn[..., 1:]
    out = torch.einsum(f"b h i j, {inputs} -> b h i d", attn, v)
    del similarities, before, after
    if mask is not None:
        out = out.masked_fill((~mask.any(dim=-1))[..., None], 0.0)
    return out


class TestXTransformers:
    def test_causal_with_padding(self):
        mask = torch.ones(B, 1, 1, S, dtype=torch.bool)
        mask[1, ..., 9:] = False
        fused(lambda q, k, v, m: x_attend(q, k, v, mask=m, causal=True), *qkv(), mask)

    def test_one_kv_head(self):
        q, k, v = qkv()
        (spec,) = fused(lambda q, k, v: x_attend(q, k, v, causal=True), q, k[:, 0], v[:, 0])
        assert spec == "attention(score=0.25*s, mask=kv <= q, dead=nan)"

    def test_soft_clamp_of_scores_with_alibi(self):
        def attention(q, k, v, slopes):
            distance = -(torch.arange(S)[None, None, :] - torch.arange(S)[None, :, None]).abs()
            return x_attend(q, k, v, bias=slopes[:, None, None] * distance, clamp=5.0, causal=True)

        fused(attention, *qkv(), 2.0 ** -torch.arange(1, H + 1))

    def test_learned_sink(self):
        fused(lambda q, k, v, sink: x_attend(q, k, v, sink=sink, causal=True), *qkv(), normal(H))

    def test_zero_key(self):
        fused(lambda q, k, v: x_attend(q, k, v, zero_kv=True, causal=True), *qkv())

    def test_memory_keys_before_the_others(self):
        def attention(q, k, v, memory):
            k, v = (torch.cat((m.expand(B, -1, -1, -1), x), -2) for m, x in zip(memory, (k, v)))
            return x_attend(q, k, v, mask=torch.ones(B, 1, 1, S + 3, dtype=torch.bool), causal=True)

        fused(attention, *qkv(), normal(2, H, 3, D))

    def test_cosine_similarity_with_a_learned_scale(self):
        def attention(q, k, v, scale):
            q, k = F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)
            return x_attend(q, k, v, causal=True, scale=10)

        fused(attention, *qkv(), normal(H, 1, 1))

    def test_laser(self):
        def attention(q, k, v):
            top = v.detach().amax(-2, keepdim=True)
            return torch.log(x_attend(q, k, (v - top).exp(), causal=True).clamp(min=1e-20)) + top

        fused(attention, *qkv())

    def test_positions_by_a_small_network(self):
        class DynamicPositions(nn.Module):
            def __init__(self):
                super().__init__()
                self.mlp = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, H))

            def forward(self, q, k, v):
                i, j = q.shape[-2], k.shape[-2]
                at = torch.arange(i)[:, None] - torch.arange(j)[None, :] + j - 1
                position = torch.arange(-j + 1, i).float()[:, None]
                return x_attend(q, k, v, bias=self.mlp(position)[at].permute(2, 0, 1), causal=True)

        fused(parameters(DynamicPositions()), *qkv())

    def test_values_gated_per_head(self):
        def attention(q, k, v, x, gate):
            return x_attend(q, k, v, causal=True) * (x @ gate).sigmoid().mT[..., None]

        fused(attention, *qkv(), tokens(), normal(WIDTH, H))


class TestLucidrains:
    def test_vit_pytorch(self):
        class Attention(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.to_qkv = (
                    nn.LayerNorm(WIDTH),
                    nn.Linear(WIDTH, 3 * WIDTH, bias=False),
                )
                self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0))
                self.attend, self.dropout = nn.Softmax(dim=-1), nn.Dropout(0.0)

            def forward(self, x):
                q, k, v = map(heads, self.to_qkv(self.norm(x)).chunk(3, dim=-1))
                dots = torch.matmul(q, k.transpose(-1, -2)) * D**-0.5
                return self.to_out(merged(torch.matmul(self.dropout(self.attend(dots)), v)))

        fused(parameters(Attention()), tokens())

    def test_vit_for_small_data(self):
        # Locality self-attention: a learned temperature, and no token sees itself.
        def attention(q, k, v, temperature):
            dots = torch.matmul(q, k.transpose(-1, -2)) * temperature.exp()
            own = torch.eye(dots.shape[-1], dtype=torch.bool)
            return F.softmax(dots.masked_fill(own, LOWEST), -1) @ v

        (spec,) = fused(attention, *qkv(), normal(1))
        assert "mask=q != kv" in spec

    def test_perceiver(self):
        # Heads in the batch, a mask of the context's tokens.
        def attention(x, context, to_q, to_kv, mask):
            q, (k, v) = x @ to_q, (context @ to_kv).chunk(2, dim=-1)
            q, k, v = (heads(y).reshape(B * H, -1, D) for y in (q, k, v))
            sim = torch.einsum("b i d, b j d -> b i j", q, k) * D**-0.5
            mask = mask[:, None, None].expand(B, H, 1, S).reshape(B * H, 1, S)
            sim.masked_fill_(~mask, LOWEST)
            out = torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)
            return merged(out.view(B, H, -1, D))

        mask = torch.arange(S) < torch.tensor([[S], [7]])
        weights = normal(WIDTH, WIDTH) / 8, normal(WIDTH, 2 * WIDTH, seed=1) / 8
        fused(attention, tokens(B, 6, WIDTH), tokens(), *(w.detach() for w in weights), mask)

    def test_palm(self):
        # One KV head, ALiBi sliced from a buffer, the maximum taken off by hand.
        def attention(q, k, v, alibi):
            sim = torch.einsum("b h i d, b j d -> b h i j", q * D**-0.5, k)
            i, j = sim.shape[-2:]
            sim = sim + alibi[:, :i, :j]
            sim = sim.masked_fill(torch.ones((i, j), dtype=torch.bool).triu(j - i + 1), LOWEST)
            sim = sim - sim.amax(dim=-1, keepdim=True).detach()
            return merged(torch.einsum("b h i j, b j d -> b h i d", sim.softmax(dim=-1), v))

        q, k, v = qkv()
        alibi = torch.rand(H, 64, 64)
        fused(attention, q, k[:, 0], v[:, 0], alibi)

    def test_imagen(self):
        # A learned null key beside the context, one KV head, cosine similarity.
        def attention(q, k, v, null):
            k, v = (torch.cat((n.expand(B, 1, D), x), -2) for n, x in zip(null, (k, v)))
            q, k = F.normalize(q, dim=-1) * 4, F.normalize(k, dim=-1) * 4
            sim = torch.einsum("b h i d, b j d -> b h i j", q, k)
            return torch.einsum("b h i j, b j d -> b h i d", sim.softmax(dim=-1), v)

        q, k, v = qkv()
        fused(attention, q, k[:, 0], v[:, 0], normal(2, D))

    def test_local_attention(self):
        # Windows look at themselves and the one before; padding is known by its position -1.
        def attention(q, k, v, window=8):
            q, k, v = (x.reshape(B * H, S // window, window, D) for x in (q, k, v))
            position = torch.arange(S).view(1, S // window, window)

            def look_around(x, value):
                before = F.pad(x, (*([0, 0] * (x.dim() - 2)), 1, 0), value=value)[:, : S // window]
                return torch.cat((before, x), 2)

            keys = look_around(position, -1)
            k, v = look_around(k, 0.0), look_around(v, 0.0)
            sim = torch.einsum("b h i e, b h j e -> b h i j", q * D**-0.5, k)
            late = position[..., :, None] < keys[..., None, :]
            sim = sim.masked_fill(late, LOWEST).masked_fill(keys[..., None, :] == -1, LOWEST)
            return torch.einsum("b h i j, b h j e -> b h i e", sim.softmax(-1), v).reshape(
                B, H, S, D
            )

        fused(attention, *qkv())


class TestProteins:
    """OpenFold: operands of any rank, a list of biases that broadcast, a gate after."""

    @staticmethod
    def attention(q, k, v, biases):
        scores = torch.matmul(q / math.sqrt(q.shape[-1]), k.transpose(-1, -2))
        for bias in biases:
            scores += bias
        return torch.matmul(F.softmax(scores, dim=-1), v)

    def test_triangle_attention_around_the_starting_node(self):
        rows, columns = 5, 7

        class Triangle(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.LayerNorm(WIDTH)
                self.q, self.k, self.v, self.g, self.o = (
                    nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(5)
                )
                self.to_bias = nn.Linear(WIDTH, H, bias=False)

            def forward(self, x, mask):
                x = self.norm(x)
                mask_bias = (1e9 * (mask - 1))[..., :, None, None, :]
                triangle = self.to_bias(x).permute(0, 3, 1, 2).unsqueeze(-4)
                q, k, v = (heads(linear(x)) for linear in (self.q, self.k, self.v))
                out = TestProteins.attention(q, k, v, [mask_bias, triangle]).transpose(-2, -3)
                out = out * heads(self.g(x)).transpose(-2, -3).sigmoid()
                return self.o(out.reshape(*out.shape[:-2], -1))

        mask = torch.ones(B, rows, columns)
        mask[1, :, 5:] = 0
        fused(parameters(Triangle()), tokens(B, columns, columns, WIDTH), mask[:, :1])

    def test_triangle_attention_around_the_ending_node(self):
        def attention(x, bias):
            x = x.transpose(-2, -3)
            q, k, v = (heads(x * scale) for scale in (0.5, 0.7, 1.0))
            triangle = bias.transpose(-1, -2).unsqueeze(-4)
            out = self.attention(q, k, v, [triangle])
            return merged(out).transpose(-2, -3)

        fused(attention, tokens(B, 6, 6, WIDTH), normal(B, H, 6, 6))

    def test_columns_of_an_alignment(self):
        def attention(m, mask):
            m = m.transpose(-2, -3)
            q, k, v = (heads(m * scale) for scale in (0.5, 0.7, 1.0))
            bias = (1e9 * (mask.transpose(-1, -2) - 1))[..., :, None, None, :]
            return merged(self.attention(q, k, v, [bias])).transpose(-2, -3)

        mask = torch.ones(B, 5, 7)
        mask[1, 3:] = 0
        fused(attention, tokens(B, 5, 7, WIDTH), mask)


def evoformer(q, k, v, mask_bias, pair_bias):
    """[b, n, s, h, d] operands; biases [b, n, 1, 1, s] and [b, 1, h, s, s]."""
    q, k, v = (x.transpose(-2, -3) for x in (q, k, v))
    scores = (q * D**-0.5) @ k.transpose(-1, -2) + mask_bias + pair_bias
    return (scores.softmax(-1) @ v).transpose(-2, -3)


def differential(q, k, v, lam):
    """Two softmaxes of half the width each, weighed before one product with V."""
    mask = torch.triu(torch.zeros(S, S).fill_(-INF), 1)
    weights = q @ k.transpose(-1, -2) * D**-0.5
    weights = F.softmax(torch.nan_to_num(weights) + mask, dim=-1, dtype=torch.float32)
    weights = weights.view(B, H // 2, 2, S, S)
    return (weights[:, :, 0] - lam * weights[:, :, 1]) @ v


def by_mask(mod: Callable[[Tensor, Tensor], Tensor]):
    def attention(q, k, v):
        at = mod(torch.arange(S)[:, None], torch.arange(S)[None, :])
        return (q @ k.mT * D**-0.5).masked_fill(~at, -INF).softmax(-1) @ v

    return attention


FLASHLIGHT = {
    "causal": by_mask(lambda q, kv: q >= kv),
    "sliding window": by_mask(lambda q, kv: (q >= kv) & (q - kv <= 6)),
    "prefix": by_mask(lambda q, kv: (kv < 5) | (q >= kv)),
    "document": by_mask(lambda q, kv: (q // 7 == kv // 7) & (q >= kv)),
    "softcap": lambda q, k, v: (20 * torch.tanh(q @ k.mT * D**-0.5 / 20)).softmax(-1) @ v,
    "alibi": lambda q, k, v: (
        (
            q @ k.mT * D**-0.5
            + (torch.arange(S)[None, :] - torch.arange(S)[:, None])
            * torch.exp2(-8.0 * torch.arange(1, H + 1) / H)[:, None, None]
        ).softmax(-1)
        @ v
    ),
    "gqa": lambda q, k, v: (
        (q @ k[:, :2].repeat_interleave(2, 1).mT * D**-0.5).softmax(-1)
        @ v[:, :2].repeat_interleave(2, 1)
    ),
}


class TestFlashlight:
    @pytest.mark.parametrize("name", FLASHLIGHT)
    def test_variant(self, name):
        fused(FLASHLIGHT[name], *qkv())

    def test_evoformer(self):
        biases = normal(B, 3, 1, 1, S, seed=4), normal(B, 1, H, S, S, seed=5)
        fused(evoformer, *qkv(B, 3, S, H, D), *biases)

    def test_differential(self):
        q, k, v = qkv()
        fused(differential, q, k, v[:, :2], normal(1), regions=2)


def test_tensor_product_attention():
    """Zhang et al. (2025): Q, K and V are products of factors, which are no attention beside it."""

    def attention(*factors):
        pairs = zip(factors[::2], factors[1::2])
        q, k, v = (torch.einsum("bsrh,bsrd->bhsd", a, b) / a.size(2) for a, b in pairs)
        weights = (q @ k.mT * D**-0.5).masked_fill(~torch.ones(S, S).tril().bool(), -INF)
        return weights.softmax(-1) @ v

    shapes = [(B, S, rank, n) for rank in (6, 2, 2) for n in (H, D)]
    report = check(attention, *(normal(*shape, seed=i) for i, shape in enumerate(shapes)))
    assert [region.form for region in report.regions] == ["causal"]
