"""On a GPU, with the kernels that are chosen there: flex_attention, autocast, checkpoints."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fa3_compile.backend import fa3
from fa3_compile.testing import assert_matches_eager
from tests.integration.gpt import checkpointed

pytestmark = pytest.mark.gpu
B, H, S, D = 2, 4, 384, 64


def qkv(kv_heads: int = H) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, n, S, D) for n in (H, kv_heads, kv_heads)]
    made = [torch.randn(s, generator=generator).to("cuda", torch.bfloat16) for s in shapes]
    return [x.requires_grad_() for x in made]


def causal(b, h, q, kv):
    return q >= kv


def window(b, h, q, kv):
    return (q >= kv) & (q - kv < 100)


@pytest.mark.parametrize("mask", [None, causal, window], ids=["full", "causal", "window"])
def test_flex(mask):
    made = mask and create_block_mask(mask, None, None, S, S, "cuda")

    def attention(q, k, v):
        return flex_attention(q, k, v, block_mask=made, enable_gqa=True)

    report = assert_matches_eager(attention, *qkv(kv_heads=2), training=True)
    assert [region.fused for region in report.regions] == [True]


def test_flex_with_captured_slopes_and_its_lse():
    made = create_block_mask(causal, None, None, S, S, "cuda")
    # Each is the sum of 147,456 terms that are rounded: how far eager's four are off is by luck.
    slopes = torch.tensor([0.5, 0.75, 0.0625, 0.125], dtype=torch.bfloat16, device="cuda")

    def attention(q, k, v, slopes):
        wide = slopes.float()

        def score(s, b, h, q, kv):
            return 20 * torch.tanh(s / 20) - wide[h] * (q - kv)

        y, lse = flex_attention(q, k, v, score, made, return_lse=True)
        # The kernels' tanh is an approximation: the LSE is right to 2e-5, not to float32.
        return y, lse.to(y.dtype)

    report = assert_matches_eager(attention, *qkv(), slopes.requires_grad_(), training=True)
    assert [region.fused for region in report.regions] == [True]


def test_documents():
    ids = torch.arange(S, device="cuda") // 90

    def attention(q, k, v, ids):
        made = create_block_mask(
            lambda b, h, q, kv: (ids[q] == ids[kv]) & (q >= kv), None, None, S, S, "cuda"
        )
        return flex_attention(q, k, v, block_mask=made)

    report = assert_matches_eager(attention, *qkv(), ids, training=True)
    assert [region.fused for region in report.regions] == [True]


class Layer(torch.nn.Module):
    """Projections and causal attention of 4 heads, under bfloat16 autocast."""

    def __init__(self, wrapped=None):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = torch.nn.Linear(H * D, 3 * H * D)
        self.wrapped = wrapped

    def attention(self, x):
        q, k, v = self.qkv(x).view(B, S, 3, H, D).permute(2, 0, 3, 1, 4)
        mask = torch.ones(S, S, dtype=torch.bool, device=x.device).tril()
        scores = (q @ k.transpose(-1, -2) / 8).masked_fill(~mask, -float("inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def forward(self, x):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            if self.wrapped is None:
                return self.attention(x).float()
            return self.wrapped(self.attention, x).float()


@pytest.mark.parametrize("wrapped", [None, checkpointed], ids=["plain", "checkpointed"])
def test_autocast(wrapped):
    ours, eager = (Layer(wrapped).cuda() for _ in range(2))
    x = torch.randn(B, S, H * D, device="cuda")
    call = torch.compile(ours, backend=fa3)
    for model, forward in ((ours, call), (eager, eager)):
        forward(x).square().mean().backward()
        assert model.qkv.weight.grad is not None
    torch.testing.assert_close(call(x), eager(x), atol=0.02, rtol=0.02)
    found, expected = (m.qkv.weight.grad for m in (ours, eager))
    torch.testing.assert_close(found, expected, atol=0.02 * float(expected.abs().max()), rtol=0.05)


NAN_MEETS = {
    "relu of weights": lambda s, bias: torch.relu(F.silu(s + bias) - 0.05),
    "squared relu": lambda s, bias: torch.relu(s + bias.sqrt()).square(),
    # All scores have a slope: where a row is NaN, eager's gradient is 0 where its slope is.
    "the larger of two": lambda s, bias: torch.maximum(s, bias.sqrt() - 99).softmax(-1),
    "the smaller of two": lambda s, bias: torch.minimum(s, bias.sqrt()).square(),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weights", NAN_MEETS.values(), ids=NAN_MEETS)
def test_nan_meets_a_maximum(weights, dtype):
    """The hardware's plain maximum is the other number."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in qkv())
    bias = torch.zeros(S, S, device="cuda")
    bias[5, 7] = bias[100:110, 250] = -torch.inf  # silu and root are NaN there

    def attention(q, k, v, bias):
        return weights(q @ k.mT / 8, bias) @ v

    report = assert_matches_eager(attention, q, k, v, bias.to(dtype), training=True)
    assert [region.fused for region in report.regions] == [True]
