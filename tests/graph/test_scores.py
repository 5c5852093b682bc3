"""Score modifiers: what is done to s before the softmax, whatever it is made of."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

from tests.graph.harness import check, specs
from tests.graph.inputs import (
    INF,
    SCALE,
    B,
    D,
    H,
    S,
    attend,
    large,
    normal,
    qkv,
    queries_and_keys,
    scores_of,
    slope_at_bound,
    uniform,
)


def modified(function, *extra):
    """The spec of attention over function(scores, *extra)."""

    def attention(q, k, v, *rest):
        return attend(function(scores_of(q, k), *rest), v)

    return specs(check(attention, *qkv(), *extra))


def distance():
    rows, columns = queries_and_keys()
    return columns - rows


SLOPES = [2 ** (-8 * (h + 1) / H) for h in range(H)]


def test_softcap():
    def attention(q, k, v):
        s = torch.tanh(scores_of(q, k) / 20) * 20
        return attend(s.masked_fill(distance() > 0, -INF), v)

    assert_expected_inline(
        specs(check(attention, *qkv())),
        """attention(score=20*tanh(0.0125*s), mask=kv <= q, dead=nan)""",
    )


def test_softcap_makes_a_mask_of_any_low_fill():
    # A score above -20 cannot meet -10000, so that hidden keys can be skipped.
    def attention(q, k, v):
        s = 20.0 * (scores_of(q, k) / 20.0).tanh()
        return attend(torch.where(distance() <= 0, s, -10000.0), v)

    assert_expected_inline(
        specs(check(attention, *qkv())),
        """attention(score=20*tanh(0.0125*s), mask=kv <= q, dead=nan)""",
    )


CLAMPS = {
    "both": lambda s: s.clamp(-2, 0),
    "below": lambda s: s.clamp(min=0),
    "above": lambda s: torch.clip(s, max=0),
    "crossed": lambda s: s.clamp(1, 0),
    "masked": lambda s: s.masked_fill(distance() > 0, -INF).clamp(min=0),
    "maximum": lambda s: s.maximum(torch.tensor(0.0)),
    "minimum": lambda s: torch.tensor(0.0).minimum(s),
    "hardtanh": lambda s: F.hardtanh(s, 0.0, 1.0),
    "relu": F.relu,
}


@pytest.mark.parametrize("name", CLAMPS)
def test_clamps(name):
    # Their gradients at the bound itself differ, and from one version of torch to another.
    def attention(q, k, v):
        return attend(CLAMPS[name](scores_of(q, k)), v)

    q, k, v = qkv()
    nothing = torch.zeros_like(q, requires_grad=True)
    for queries in (q, nothing):
        region = check(attention, queries, k, v).regions[0]
        # Of crossed bounds nothing but that gradient is left, and not even it where it is 0.
        assert region.fused or (name, region.code, slope_at_bound()) == ("crossed", "no-product", 0)


def test_clamps_are_bounds():
    def attention(q, k, v):
        return attend(scores_of(q, k).clamp(-3, 3).masked_fill(distance() > 0, -1e9), v)

    assert "mask=kv <= q, dead=nan" in specs(check(attention, *qkv()))


def test_a_choice_by_the_score_is_no_bound():
    def attention(q, k, v):
        s = scores_of(q, k)
        s = torch.where(s < -3, -3.0, torch.where(s > 3, s, 3.0))
        return attend(s.masked_fill(distance() > 0, -1e9), v)

    assert "mask=" not in specs(check(attention, *qkv()))


def test_hardtanh():
    assert_expected_inline(
        modified(lambda s: F.hardtanh(s)), """attention(score=min(1, max(-1, 0.25*s)))"""
    )


def test_activations():
    assert_expected_inline(modified(lambda s: s.sigmoid()), """attention(score=sigmoid(0.25*s))""")
    assert_expected_inline(modified(lambda s: F.relu(s)), """attention(score=max(0, 0.25*s))""")
    assert_expected_inline(
        modified(lambda s: F.leaky_relu(s, 0.1)),
        """attention(score=where(0.25*s > 0, 0.25*s, 0.025*s))""",
    )
    assert_expected_inline(
        modified(lambda s: F.gelu(s)),
        """attention(score=(0.125*erf(0.1767766952966369*s) + 0.125)*s)""",
    )
    assert_expected_inline(
        modified(lambda s: s * torch.sigmoid(s)),
        """attention(score=0.25*s*sigmoid(0.25*s))""",
    )
    assert_expected_inline(
        modified(lambda s: torch.where(s > 0, s, 2 * s)),
        """attention(score=where(0.25*s > 0, 0.25*s, 0.5*s))""",
    )


@pytest.mark.parametrize(
    "function",
    [
        torch.sigmoid,
        F.silu,
        F.softplus,
        lambda s: s * torch.sigmoid(-s),
        lambda s: 9 * torch.tanh(s / 9),
        lambda s: 5 * torch.erf(s),
        lambda s: s.abs().log1p(),
        lambda s: (s.square() + 1).sqrt(),
        torch.atan,
    ],
    ids="sigmoid silu softplus swish- tanh erf log1p sqrt atan".split(),
)
def test_functions_of_large_scores(function):
    # Derivatives are written out too: exp(-s) overflows where sigmoid does not.
    def attention(q, k, v):
        return attend(function(q @ k.mT), v)

    check(attention, *large())


@pytest.mark.parametrize("name", ["asin", "acos", "atanh", "acosh"])
def test_inverse_functions(name):
    def attention(q, k, v):
        s = scores_of(q, k)
        return attend(getattr(torch, name)(s.abs() + 2 if name == "acosh" else 0.9 * s.tanh()), v)

    assert [region.fused for region in check(attention, *qkv()).regions] == [True]


def test_functions_that_are_undefined_where_they_are_masked():
    def square_root(s):
        return (s - (-distance()).sqrt()).masked_fill(distance() > 0, -INF)

    def logarithm(s):
        return torch.where(distance() <= 0, s - torch.log(1.0 - distance()), -INF)

    assert_expected_inline(
        modified(square_root),
        """attention(score=0.25*s - load(0, kv - q + 23), mask=kv <= q, dead=nan, aux=[float])""",
    )
    assert_expected_inline(
        modified(logarithm),
        """attention(score=0.25*s - load(0, kv - q + 23), mask=kv <= q, dead=nan, aux=[float])""",
    )


def test_powers():
    assert_expected_inline(modified(lambda s: s.square()), """attention(score=0.0625*pow(s, 2))""")
    assert_expected_inline(
        modified(lambda s: s**3 / 8), """attention(score=0.001953125*pow(s, 3))"""
    )
    assert_expected_inline(modified(lambda s: -s.abs()), """attention(score=-0.25*abs(s))""")
    assert_expected_inline(modified(lambda s: (s / 4).exp()), """attention(score=exp(0.0625*s))""")


def test_arithmetic():
    assert_expected_inline(
        modified(lambda s: s / 1.7), """attention(score=0.14705882352941177*s)"""
    )
    assert_expected_inline(modified(lambda s: 3 * s - 2), """attention(score=0.75*s - 2)""")
    assert_expected_inline(modified(lambda s: 1 - s), """attention(score=-0.25*s + 1)""")
    assert_expected_inline(
        modified(lambda s: torch.add(s, s, alpha=2)), """attention(score=0.75*s)"""
    )
    assert_expected_inline(
        modified(lambda s: torch.addcmul(s, s, s, value=0.1)),
        """attention(score=0.00625*pow(s, 2) + 0.25*s)""",
    )
    assert_expected_inline(
        modified(lambda s: torch.lerp(s, -s, 0.25)), """attention(score=0.125*s)"""
    )


def test_a_copy_into_other_strides():
    """PyTorch's own lerp of transposed scores ends in one."""

    def attention(q, k, v, between):
        s = (k @ q.mT).mT * SCALE
        return attend(torch.lerp(s, s + 4, between), v)

    assert_expected_inline(
        specs(check(attention, *qkv(), uniform(S, S) / 2)),
        """attention(score=4*load(0, q, kv) + 0.25*s, aux=[float])""",
    )


def test_dot_product_of_unit_vectors():
    def attention(q, k, v):
        return attend(F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 10, v)

    assert_expected_inline(specs(check(attention, *qkv())), """attention(score=10*s)""")


def test_learned_temperature():
    def per_head(s, t):
        return s * t.exp().view(1, H, 1, 1)

    assert_expected_inline(
        modified(per_head, normal(H)), """attention(score=0.25*load(0, h)*s, aux=[float])"""
    )
    assert_expected_inline(
        modified(lambda s, t: s * t, normal()), """attention(score=0.25*load(0)*s, aux=[float])"""
    )
    spec = modified(lambda s, t: s / t.clamp(min=0.1), normal(1))
    if slope_at_bound():
        assert_expected_inline(
            spec,
            """attention(score=0.25*pow(where(load(0, 0) < 0.1, 0.1, load(0, 0)), -1)*s, aux=[float])""",
        )


def test_learned_temperature_on_q():
    def attention(q, k, v, t):
        return attend((q * t) @ k.mT, v)

    assert_expected_inline(
        specs(check(attention, *qkv(), normal())), """attention(score=load(0)*s, aux=[float])"""
    )
    assert_expected_inline(
        specs(check(attention, *qkv(), normal(H, 1, 1))),
        """attention(score=load(0, h, 0, 0)*s, aux=[float])""",
    )
    assert_expected_inline(
        specs(check(attention, *qkv(), normal(B, 1, S, 1))), """attention(score=s)"""
    )


def test_scale_for_each_element_of_the_head_stays_in_q():
    def attention(q, k, v, t):
        return attend((q * t) @ k.mT, v)

    assert_expected_inline(specs(check(attention, *qkv(), normal(D))), """attention(score=s)""")


def test_swin_2_clamps_its_temperature():
    def attention(q, k, v, t):
        s = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return attend(s * torch.clamp(t, max=math.log(1.0 / 0.01)).exp(), v)

    assert_expected_inline(
        specs(check(attention, *qkv(), normal(H, 1, 1))),
        """attention(score=load(0, h, 0, 0)*s, aux=[float])""",
    )


def test_scale_that_grows_with_the_position():
    def logarithmic(s):
        rows = torch.arange(1, S + 1).view(S, 1)
        return s * rows.log() / math.log(16)

    assert_expected_inline(
        modified(logarithmic),
        """attention(score=0.09016844005556021*load(0, q, 0)*s, aux=[float])""",
    )


def test_alibi():
    def by_distance(s):
        return s + torch.tensor(SLOPES).view(H, 1, 1) * distance()

    def by_key(s):
        return s + torch.tensor(SLOPES)[:, None, None] * torch.arange(S)[None, None, :]

    def symmetric(s):
        return s - torch.tensor(SLOPES).view(1, H, 1, 1) * distance().abs()

    def computed_slopes(s):
        slopes = torch.pow(2.0, -8.0 * torch.arange(1, H + 1) / H)
        return s + slopes[:, None, None] * distance()

    assert_expected_inline(
        modified(by_distance), """attention(score=(kv - q)*load(0, h) + 0.25*s, aux=[float])"""
    )
    assert_expected_inline(
        modified(by_key), """attention(score=kv*load(0, h) + 0.25*s, aux=[float])"""
    )
    assert_expected_inline(
        modified(symmetric), """attention(score=0.25*s - abs(kv - q)*load(0, h), aux=[float])"""
    )
    assert_expected_inline(
        modified(computed_slopes), """attention(score=(kv - q)*load(0, h) + 0.25*s, aux=[float])"""
    )


def test_alibi_passed_in_as_bloom_does():
    def attention(q, k, v, alibi):
        flat = alibi.view(B * H, 1, S).baddbmm(
            q.reshape(B * H, S, D), k.reshape(B * H, S, D).transpose(1, 2), beta=1.0, alpha=SCALE
        )
        s = flat.view(B, H, S, S).masked_fill(distance() > 0, torch.finfo(q.dtype).min)
        weights = F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.bmm(weights.view(B * H, S, S), v.reshape(B * H, S, D)).view(B, H, S, D)

    report = check(attention, *qkv(), uniform(B, H, 1, S))
    assert_expected_inline(
        specs(report),
        """attention(score=where(kv >= q + 1, -3.4028234663852886e+38, load(0, b, h, 0, kv) + 0.25*s), aux=[float])""",
    )


def test_alibi_and_scale_together_as_falcon_does():
    def attention(q, k, v, alibi):
        s = q @ k.mT
        s += alibi
        s *= SCALE
        return attend(s, v)

    assert_expected_inline(
        specs(check(attention, *qkv(), uniform(B, H, 1, S))),
        """attention(score=0.25*load(0, b, h, 0, kv) + 0.25*s, aux=[float])""",
    )


def test_relative_positions_from_a_table():
    def gathered(s, table):
        rows, columns = queries_and_keys()
        return s + table[rows - columns + S - 1].permute(2, 0, 1)

    def embedded(s, table):
        return s + F.embedding(distance() + S - 1, table).permute(2, 0, 1).unsqueeze(0)

    def clipped(s, table):
        return s + table[distance().clamp(-4, 4) + 4].permute(2, 0, 1)

    def of_one_head(s, table):
        return s + table[distance().abs()]

    assert_expected_inline(
        modified(gathered, normal(2 * S - 1, H)),
        """attention(score=load(0, q - kv + 23, h) + 0.25*s, aux=[float])""",
    )
    assert_expected_inline(
        modified(embedded, normal(2 * S - 1, H)),
        """attention(score=load(0, kv - q + 23, h) + 0.25*s, aux=[float])""",
    )
    assert_expected_inline(
        modified(clipped, normal(9, H)),
        """attention(score=load(0, min(4, max(-4, kv - q)) + 4, h) + 0.25*s, aux=[float])""",
    )
    assert_expected_inline(
        modified(of_one_head, normal(S)),
        """attention(score=load(0, abs(kv - q)) + 0.25*s, aux=[float])""",
    )


def t5_bucket(relative):
    """T5's buckets: exact for near keys, logarithmic for far ones."""
    relative = -torch.min(relative, torch.zeros_like(relative))
    near = relative < 4
    far = 4 + (torch.log(relative.float() / 4) / math.log(16 / 4) * 4).to(torch.long)
    return torch.where(near, relative, torch.min(far, torch.full_like(far, 7)))


def test_t5():
    def attention(q, k, v, weight):
        bias = F.embedding(t5_bucket(distance()), weight).permute(2, 0, 1).unsqueeze(0)
        s = q @ k.mT
        s += bias
        return attend(s.float(), v)

    assert_expected_inline(
        specs(check(attention, *qkv(), normal(8, H))),
        """attention(score=load(0, h, kv - q + 23) + s, aux=[float])""",
    )


def test_swin():
    def attention(x, table, shifted):
        c = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")).flatten(1)
        relative = (c[:, :, None] - c[:, None, :]).permute(1, 2, 0).contiguous() + 2
        place = (relative * torch.tensor([5, 1])).sum(-1)
        q, k, v = x.reshape(8, 9, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        s = q * SCALE @ k.transpose(-2, -1)
        s = s + table[place.view(-1)].view(9, 9, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        s = (s.view(2, 4, 2, 9, 9) + shifted.unsqueeze(1).unsqueeze(0)).view(-1, 2, 9, 9)
        return attend(s, v).transpose(1, 2).reshape(8, 9, 32)

    shifted = torch.where(uniform(4, 9, 9) > 0.8, -100.0, 0.0)
    report = check(attention, normal(8, 9, 96), normal(25, 2, seed=1), shifted)
    assert_expected_inline(
        specs(report),
        """attention(score=load(0, kv + 9*q, h) + load(1, mod(b, 4), q, kv) + 0.25*s, aux=[float, float], out_order=bqhd)""",
    )


def test_swin_2_adds_its_mask_twice():
    def attention(q, k, v, mask):
        s = scores_of(q, k)
        s = s.view(1, B, H, S, S) + mask.unsqueeze(1).unsqueeze(0)
        s = s + mask.unsqueeze(1).unsqueeze(0)
        return attend(s.view(-1, H, S, S), v)

    mask = torch.where(uniform(B, S, S) > 0.8, -1.0, 0.0)
    assert_expected_inline(
        specs(check(attention, *qkv(), mask)),
        """attention(score=2*load(0, b, q, kv) + 0.25*s, aux=[float])""",
    )


def test_relative_shift_of_transformer_xl():
    # The position term is a product with q of its own, shifted by padding and reshaping.
    def attention(q, k, v, r):
        position = q @ r.mT
        position = F.pad(position, (1, 0)).view(B, H, -1, S)[:, :, 1:].reshape(B, H, S, -1)
        s = (q @ k.mT + position[..., :S]) * SCALE
        return attend(s.masked_fill(distance() > 0, -INF), v)

    assert_expected_inline(
        specs(check(attention, *qkv(), normal(H, S, D))),
        """attention(score=0.25*load(0, b, h, floordiv(kv + 24*q + 24, 25), mod(kv + 24*q + 24, 25)) + 0.25*s, mask=kv <= q, dead=nan, aux=[float])""",
    )


def test_decomposed_positions_of_sam():
    def attention(q, k, v, rows, columns):
        of_q = q.view(B, H, 6, 4, D)
        by_row = torch.einsum("bhxyd,xkd->bhxyk", of_q, rows)
        by_column = torch.einsum("bhxyd,ykd->bhxyk", of_q, columns)
        s = scores_of(q, k).view(B, H, 6, 4, 6, 4)
        s = (s + by_row[..., :, None] + by_column[..., None, :]).view(B, H, S, S)
        return attend(s, v)

    report = check(attention, *qkv(), normal(6, 6, D, seed=5), normal(4, 4, D, seed=6))
    assert_expected_inline(
        specs(report),
        """attention(score=load(0, b, h, floordiv(q, 4), mod(q, 4), floordiv(kv, 4)) + load(1, b, h, floordiv(q, 4), mod(q, 4), mod(kv, 4)) + 0.25*s, aux=[float, float])""",
    )


def test_positions_of_all_but_the_first_token():
    """As MViT's, whose first token has no place in the image: added to a part of the scores."""

    def attention(q, k, v, bias):
        scores = scores_of(q, k)
        scores[..., 1:, 1:] += bias
        return attend(scores, v)

    def moved(q, k, v, bias):
        scores = scores_of(q, k)
        scores[..., 1:, 1:] = scores[..., :-1, :-1] + bias
        return attend(scores, v)

    bias = normal(H, S - 1, S - 1).requires_grad_()
    assert_expected_inline(
        specs(check(attention, *qkv(), bias)),
        """attention(score=where(q >= 1, where(kv >= 1, load(0, h, mod(q - 1, 23), mod(kv - 1, 23)) + 0.25*s, 0.25*s), 0.25*s), aux=[float])""",
    )
    assert specs(check(moved, *qkv(), bias)) == "detect: product-read-twice"


def test_disentangled_terms_of_deberta():
    def attention(q, k, v, position_k, position_q):
        place = (distance() + S - 1).expand(B, H, S, S)
        c2p = torch.gather(q @ position_k.mT, -1, place)
        p2c = torch.gather(k @ position_q.mT, -1, place).mT
        return attend((q @ k.mT + c2p + p2c) * SCALE, v)

    report = check(attention, *qkv(), normal(2 * S - 1, D, seed=5), normal(2 * S - 1, D, seed=6))
    assert_expected_inline(
        specs(report),
        """attention(score=0.25*load(0, b, h, q, kv - q + 23) + 0.25*load(1, b, h, kv, q - kv + 23) + 0.25*s, aux=[float, float])""",
    )


def test_evoformer():
    def attention(q, k, v, pair, mask):
        q, k, v = (t.transpose(-2, -3) for t in (q, k, v))
        s = torch.matmul(q * SCALE, k.transpose(-1, -2)) + mask
        s = s + pair
        return attend(s, v).transpose(-2, -3)

    report = check(
        attention,
        *qkv(2, 3, S, H, D),
        normal(2, 1, H, S, S, seed=5),
        normal(2, 3, 1, 1, S, seed=6),
    )
    assert_expected_inline(
        specs(report),
        """attention(score=load(0, floordiv(b, 3), mod(b, 3), 0, 0, kv) + load(1, floordiv(b, 3), 0, h, q, kv) + 0.25*s, aux=[float, float])""",
    )


def test_bias_of_two_batch_elements_alike():
    def attention(q, k, v, bias):
        return attend(scores_of(q, k) + bias.repeat(2, 1, 1, 1), v)

    assert_expected_inline(
        specs(check(attention, *qkv(), normal(1, H, S, S))),
        """attention(score=load(0, 0, h, q, kv) + 0.25*s, aux=[float])""",
    )


def test_bias_times_gate():
    # MSA with a gate on the bias for each head; both need gradients.
    def attention(q, k, v, bias, gate):
        return attend(scores_of(q, k) + gate.sigmoid().view(H, 1, 1) * bias, v)

    report = check(attention, *qkv(), normal(S, S), normal(H, seed=8))
    assert_expected_inline(
        specs(report), """attention(score=load(0, h)*load(1, q, kv) + 0.25*s, aux=[float, float])"""
    )


def test_factor_for_each_query_and_key():
    def attention(q, k, v, factor):
        return attend(scores_of(q, k) * factor, v)

    assert_expected_inline(
        specs(check(attention, *qkv(), normal(B, 1, S, S))),
        """attention(score=0.25*load(0, b, 0, q, kv)*s, aux=[float])""",
    )


class Layers(nn.Module):
    """GPT-2 divides by the number of the layer too; every layer is another scale."""

    def forward(self, q, k, v):
        for layer in range(3):
            s = q @ k.mT / torch.full([], D**0.5) / float(layer + 1)
            q = attend(s, v)
        return q


def test_each_layer_its_scale():
    assert_expected_inline(
        specs(check(Layers(), *qkv())),
        """\
attention(score=0.25*s)
attention(score=0.125*s)
attention(score=0.08333333333333333*s)""",
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_softcap_in_half_precision(dtype):
    def attention(q, k, v):
        s = torch.tanh(scores_of(q, k) / 20) * 20
        return F.softmax(s, -1, dtype=torch.float32).to(q.dtype) @ v

    report = check(attention, *qkv(dtype=dtype))
    assert specs(report) == "attention(score=20*tanh(0.0125*s))"
