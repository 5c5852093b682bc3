"""Score modifiers: what is done to s before the softmax, whatever it is made of."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

from tests.graph.harness import check, modified, specs
from tests.graph.inputs import (
    INF,
    SCALE,
    B,
    D,
    H,
    S,
    attend,
    distance,
    large,
    normal,
    qkv,
    scores_of,
    slope_at_bound,
    uniform,
)


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
