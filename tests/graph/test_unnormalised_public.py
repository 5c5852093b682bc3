"""Attention without a softmax as published, in our own words: all of it is found."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tests.graph.harness import check, specs
from tests.graph.inputs import INF, B, H, S, normal, qkv


def seen() -> Tensor:
    return torch.ones(S, S, dtype=torch.bool).tril()


class Recommender(nn.Module):
    """HSTU (Zhai et al. 2024, equation 2): silu(q k^T + relative bias) / n, masked by a product."""

    def __init__(self):
        super().__init__()
        self.given, self.out = nn.Linear(32, 4 * 32), nn.Linear(32, 32)
        self.table = nn.Parameter(0.1 * normal(2 * S - 1).detach())
        self.register_buffer("mask", torch.ones(S, S).tril())

    def forward(self, x):
        b, n, _ = x.shape
        u, v, q, k = (t.view(b, n, 2, 16) for t in F.silu(self.given(x)).chunk(4, -1))
        i = torch.arange(n)
        s = torch.einsum("bnhd,bmhd->bhnm", q, k) + self.table[i[None] - i[:, None] + S - 1]
        w = F.silu(s) / n * self.mask[:n, :n]
        return self.out((u * torch.einsum("bhnm,bmhd->bnhd", w, v)).flatten(2)) + x


class GatedUnit(nn.Module):
    """GAU (Hua et al. 2022, section 3): one head, q and k from one projection, squared relu."""

    def __init__(self):
        super().__init__()
        self.given, self.out = nn.Linear(32, 2 * 64 + 16), nn.Linear(64, 32)
        self.gamma, self.beta = (nn.Parameter(normal(2, 16, seed=i).detach()) for i in (1, 2))

    def forward(self, x):
        u, v, z = F.silu(self.given(x)).split([64, 64, 16], -1)
        q, k = (z[..., None, :] * self.gamma + self.beta).unbind(-2)
        w = F.relu(torch.einsum("bnd,bmd->bnm", q, k) / x.shape[1]) ** 2
        w = w.masked_fill(~seen(), 0.0)
        return self.out(u * torch.einsum("bnm,bme->bne", w, v))


class Retention(nn.Module):
    """Sun et al. 2023, equation 5 with the normalisations of section 2.4."""

    def __init__(self, rows: bool):
        super().__init__()
        self.given, self.rows = nn.Linear(32, 96, bias=False), rows
        self.register_buffer("decay", torch.log(1 - 2 ** (-5 - torch.arange(2.0))))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, 2, 16).transpose(1, 2) for t in self.given(x).chunk(3, -1))
        i = torch.arange(n).to(self.decay)
        m = (i[:, None] - i[None, :]).masked_fill(~seen(), INF)
        m = torch.exp(m * self.decay[:, None, None]).nan_to_num()
        w = q @ (k * 0.25).mT * (m / m.sum(-1, keepdim=True).sqrt())
        if self.rows:
            w = w / w.detach().abs().sum(-1, keepdim=True).clamp(min=1)
        return (w @ v).transpose(1, 2).reshape(b, n, 32)


def test_hstu():
    assert_expected_inline(
        specs(check(Recommender(), normal(B, S, 32))),
        """attention(normalize=none, score=(0.041666666666666664*load(0, kv - q + 23) + 0.041666666666666664*s)*load(1, q, kv)*sigmoid(load(0, kv - q + 23) + s), aux=[float, float])""",
    )


def test_gated_attention_unit():
    assert_expected_inline(
        specs(check(GatedUnit(), normal(B, S, 32))),
        """attention(normalize=none, score=pow(max(0, 0.041666666666666664*s), 2), mask=kv <= q, out_order=bqhd)""",
    )


def test_retention():
    assert_expected_inline(
        specs(check(Retention(rows=False), normal(B, S, 32))),
        """attention(normalize=none, score=0.25*load(0, h, kv - q + 23)*pow(load(1, h, q, 0), -1)*s, aux=[float, float], out_order=bqhd)""",
    )


def test_retention_divided_by_sizes_that_are_held_constant():
    # The sum of sizes of weights of both signs is not what the op gives.
    assert check(Retention(rows=True), normal(B, S, 32)).fused == []


def test_linear_attention_in_its_quadratic_form():
    # Katharopoulos et al. 2020, equation 7.
    def attention(q, k, v):
        w = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
        return w @ v / (w.sum(-1, keepdim=True) + 1e-6)

    assert_expected_inline(
        specs(check(attention, *qkv())), """attention(normalize=sums, score=s, mask=kv <= q)"""
    )


def test_state_space_duality():
    # Dao and Gu 2024, equation 6: (L * C B^T) X with L = exp(segsum(a)), by one einsum.
    def attention(c, b, x, a):
        sums = a.cumsum(-1)
        decay = (sums[..., :, None] - sums[..., None, :]).masked_fill(~seen(), -INF).exp()
        return torch.einsum("bhln,bhsn,bhls,bhsp->bhlp", c, b, decay, x)

    a = -normal(B, H, S).detach().abs()
    assert_expected_inline(
        specs(check(attention, *qkv(), a.requires_grad_())),
        """attention(normalize=none, score=exp(load(0, b, h, q) - load(0, b, h, kv))*s, mask=kv <= q, aux=[float])""",
    )
