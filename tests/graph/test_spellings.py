"""One attention, many spellings: each of them has to come out as the same closed form."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.harness import check, specs
from tests.graph.inputs import SCALE, B, D, H, S, attend, normal, qkv, scores_of

PLAIN = "attention(score=0.25*s)"
HEAD = "attention(score=0.25*s, out_order=bqhd)"

PRODUCTS = {
    "matmul": lambda q, k: torch.matmul(q, k.transpose(-2, -1)) * SCALE,
    "transpose(2, 3)": lambda q, k: q @ k.transpose(2, 3) * SCALE,
    "mT": lambda q, k: q.matmul(k.mT) * SCALE,
    "mH": lambda q, k: q.matmul(k.mH) * SCALE,
    "swapaxes": lambda q, k: q @ k.swapaxes(-1, -2) * SCALE,
    "permute": lambda q, k: q @ k.permute(0, 1, 3, 2) * SCALE,
    "movedim": lambda q, k: q @ k.movedim(-1, -2) * SCALE,
    "einsum": lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE,
    "einsum with dots": lambda q, k: torch.einsum("...qd,...kd->...qk", q, k) * SCALE,
    "einsum, operands swapped": lambda q, k: torch.einsum("bhkd,bhqd->bhqk", k, q) * SCALE,
    "einsum, scale inside": lambda q, k: torch.einsum(
        "bhqd,bhkd,->bhqk", q, k, torch.tensor(SCALE)
    ),
    "keys first": lambda q, k: (k @ q.mT).mT * SCALE,
    "bmm": lambda q, k: (
        torch.bmm(q.reshape(B * H, S, D), k.reshape(B * H, S, D).mT).view(B, H, S, S) * SCALE
    ),
    "baddbmm": lambda q, k: torch.baddbmm(
        torch.empty(B * H, S, S), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=SCALE
    ).view(B, H, S, S),
    "baddbmm of zeros": lambda q, k: torch.baddbmm(
        torch.zeros(1, 1, 1), q.flatten(0, 1), k.flatten(0, 1).mT, alpha=SCALE
    ).view(B, H, S, S),
}

SCALES = {
    "divided": lambda q, k: q @ k.mT / math.sqrt(k.size(-1)),
    "torch.div": lambda q, k: torch.div(q @ k.mT, D**0.5),
    "on q": lambda q, k: (q * SCALE) @ k.mT,
    "on q, in the middle": lambda q, k: (q.transpose(1, 2) * SCALE).transpose(1, 2) @ k.mT,
    "on k": lambda q, k: q @ (k / 4).mT,
    "on k transposed": lambda q, k: q @ (k.mT * SCALE),
    "half on each": lambda q, k: (q * D**-0.25) @ (k * D**-0.25).mT,
    "in three places": lambda q, k: (q * 2) @ (k / 4).mT / 2,
    "two signs": lambda q, k: -((-q) @ k.mT * SCALE),
    "0-d tensor": lambda q, k: q @ k.mT * torch.tensor(SCALE),
    "0-d tensor divides": lambda q, k: q @ k.mT / torch.tensor(float(D)).sqrt(),
    "0-d tensor on q": lambda q, k: q.mul(torch.tensor(D).rsqrt()) @ k.mT,
    "one-element tensor": lambda q, k: q @ k.mT * torch.tensor([SCALE]),
    "torch.full": lambda q, k: q @ k.mT / torch.full([], q.size(-1) ** 0.5, dtype=q.dtype),
    "in place": lambda q, k: (q @ k.mT).mul_(SCALE),
    "operator in place": lambda q, k: _scaled_in_place(q @ k.mT),
}


def _scaled_in_place(scores: Tensor) -> Tensor:
    scores *= SCALE
    return scores


def _exp_over_sum(s: Tensor) -> Tensor:
    e = s.exp()
    return e / e.sum(-1, keepdim=True)


def _exp_over_sum_unsqueezed(s: Tensor) -> Tensor:
    e = torch.exp(s)
    return e / torch.sum(e, dim=-1)[..., None]


def _in_place_softmax(s: Tensor) -> Tensor:
    s = s - s.amax(-1, keepdim=True)
    e = s.exp()
    return e.div(e.sum(-1, True))


SOFTMAXES = {
    "method": lambda s: s.softmax(-1),
    "method, positive dim": lambda s: s.softmax(dim=3),
    "torch.softmax": lambda s: torch.softmax(s, dim=-1),
    "F.softmax": lambda s: F.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype),
    "nn.Softmax": lambda s: nn.Softmax(dim=-1)(s),
    "float": lambda s: s.float().softmax(-1).type_as(s),
    "aten": lambda s: torch.ops.aten._softmax.default(s, -1, False),
    "special": lambda s: torch.special.softmax(s, -1),
    "log_softmax": lambda s: F.log_softmax(s, -1).exp(),
    "torch.log_softmax": lambda s: torch.exp(torch.log_softmax(s, -1)),
    "exp over sum": _exp_over_sum,
    "exp over sum, unsqueezed": _exp_over_sum_unsqueezed,
    "less the maximum": lambda s: _exp_over_sum(s - s.max(-1, keepdim=True).values),
    "less the maximum, [0]": lambda s: _exp_over_sum(s - s.max(-1, keepdim=True)[0]),
    "less the maximum, detached": lambda s: _exp_over_sum(s - s.amax(-1, keepdim=True).detach()),
    "less the maximum, unsqueezed": lambda s: _exp_over_sum(s - s.amax(-1).unsqueeze(-1)),
    "div method": _in_place_softmax,
    "maximum and softmax": lambda s: (s - s.amax(-1, keepdim=True)).softmax(-1),
    "shifted by a constant": lambda s: (s - 7.5 + 7.5).softmax(-1),
    "transposed": lambda s: s.mT.softmax(-2).mT,
    "flattened": lambda s: s.view(B * H * S, S).softmax(-1).view(B, H, S, S),
    "dropout that drops nothing": lambda s: F.dropout(s.softmax(-1), 0.1, training=False),
    "dropout of probability 0": lambda s: nn.Dropout(0.0)(s.softmax(-1)),
    "copies": lambda s: s.clone().softmax(-1).contiguous(),
}

VALUES = {
    "matmul": lambda p, v: torch.matmul(p, v),
    "method": lambda p, v: p.matmul(v),
    "einsum": lambda p, v: torch.einsum("bhqk,bhkd->bhqd", p, v),
    "einsum, operands swapped": lambda p, v: torch.einsum("bhkd,bhqk->bhqd", v, p),
    "values first": lambda p, v: (v.mT @ p.mT).mT,
    "bmm": lambda p, v: torch.bmm(p.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (B, H)),
    "float": lambda p, v: (p.float() @ v.float()).to(v.dtype),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_product(product):
    assert specs(check(lambda q, k, v: attend(product(q, k), v), *qkv())) == PLAIN


@pytest.mark.parametrize("product", SCALES.values(), ids=SCALES)
def test_scale(product):
    assert specs(check(lambda q, k, v: attend(product(q, k), v), *qkv())) == PLAIN


@pytest.mark.parametrize("softmax", SOFTMAXES.values(), ids=SOFTMAXES)
def test_softmax(softmax):
    assert specs(check(lambda q, k, v: softmax(scores_of(q, k)) @ v, *qkv())) == PLAIN


def test_logsumexp():
    def attention(q, k, v):
        s = scores_of(q, k)
        return (s - s.logsumexp(-1, keepdim=True)).exp() @ v

    assert specs(check(attention, *qkv())) == PLAIN


@pytest.mark.parametrize("product", VALUES.values(), ids=VALUES)
def test_product_with_values(product):
    def attention(q, k, v):
        return product(scores_of(q, k).softmax(-1), v)

    assert specs(check(attention, *qkv())) == PLAIN


def test_scaled_dot_product_attention():
    assert specs(check(F.scaled_dot_product_attention, *qkv())) == PLAIN


def test_scaled_dot_product_attention_with_a_mask_of_a_wider_type():
    q, k, v = qkv(dtype=torch.bfloat16)
    mask = torch.zeros(S, S).masked_fill(torch.ones(S, S).triu(1).bool(), -float("inf"))
    assert len(check(F.scaled_dot_product_attention, q, k, v, mask).fused) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    def attention(q, k, v):
        weights = F.softmax(scores_of(q, k), dim=-1, dtype=torch.float32).to(q.dtype)
        return weights @ v

    assert specs(check(attention, *qkv(dtype=dtype))) == PLAIN


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_with_scores_in_float32(dtype):
    def attention(q, k, v):
        return attend(scores_of(q.float(), k.float()), v.float()).to(q.dtype)

    assert specs(check(attention, *qkv(dtype=dtype))) == PLAIN


SCALED = {
    "number": lambda v: v * 1.25,
    "of each head": lambda v: v * torch.arange(1, H + 1)[:, None, None],
    "of each key": lambda v: v / torch.arange(1, S + 1)[:, None],
}


@pytest.mark.parametrize("name", SCALED)
def test_half_precision_with_values_scaled_in_float32(name):
    """V is no tensor of 16 bits then, and Q and K are read in float32 as well."""

    def attention(q, k, v):
        return attend(scores_of(q.float(), k.float()), SCALED[name](v.float())).to(q.dtype)

    assert specs(check(attention, *qkv(dtype=torch.bfloat16))) == PLAIN


def test_half_precision_cast_to_that_of_the_values():
    def attention(q, k, v):
        return attend(scores_of(q.float(), k.float()), v)

    q, k, v = qkv()
    q, k = (x.detach().bfloat16().requires_grad_() for x in (q, k))
    assert specs(check(attention, q, k, v)) == PLAIN


class Heads(nn.Module):
    """Projections around, as in most models."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(32, 3 * H * D)
        self.out = nn.Linear(H * D, 32)
        self.norm = nn.LayerNorm(32)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        q, k, v = self.project(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (t.view(B, S, H, D).transpose(1, 2) for t in (q, k, v))
        y = self.drop(attend(scores_of(q, k), v)).transpose(1, 2).flatten(2)
        return x + self.out(F.gelu(y))


def test_module_with_projections():
    report = check(Heads().eval(), normal(B, S, 32))
    assert specs(report) == "attention(score=0.25*s, out_order=bqhd)"


class Attention(nn.Module):
    """PyTorch's own module, without or with its (unused) weights."""

    def __init__(self, need_weights: bool):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.MultiheadAttention(32, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x):
        return self.inner(x, x, x, need_weights=self.need_weights)[0]


OF_TORCH = {
    "MultiheadAttention": lambda: Attention(False),
    "MultiheadAttention, weights": lambda: Attention(True),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(
        32, 2, 16, dropout=0.0, batch_first=True
    ),
}


@pytest.mark.parametrize("make", OF_TORCH.values(), ids=OF_TORCH)
def test_modules_of_torch(make):
    report = check(make(), normal(B, S, 32))
    assert [region.fused for region in report.regions] == [True]


def test_one_head_after_another():
    def attention(q, k, v):
        heads = [attend(scores_of(q[:, h], k[:, h]), v[:, h]) for h in range(H)]
        return torch.stack(heads, 1)

    assert specs(check(attention, *qkv())) == "\n".join([HEAD] * H)


def test_layers_that_feed_one_another():
    def attention(q, k, v):
        for _ in range(3):
            q = attend(scores_of(q, k), v)
        return q

    assert specs(check(attention, *qkv())) == "\n".join([PLAIN] * 3)


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
