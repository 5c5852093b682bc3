"""What a score_mod computes of captured tensors in half precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from tests.graph.flex import MARKS
from tests.graph.harness import check, specs
from tests.graph.inputs import H, S, normal, qkv

pytestmark = MARKS

SLOPES = normal(H, seed=7)
TABLE = normal(H, 2 * S - 1, seed=8)
PADDING = (torch.arange(S) < 15).float()


def outcome(score_mod, captured: Tensor, dtype: torch.dtype = torch.bfloat16) -> str:
    """The spec of a score_mod(s, h, q, kv, captured), the captured tensor in the dtype too."""
    captured = captured.detach().to(dtype).requires_grad_(captured.requires_grad)

    def attention(q, k, v, captured):
        def score(s, b, h, q, kv):
            return score_mod(s, h, q, kv, captured)

        return flex_attention(q, k, v, score_mod=score)

    return specs(check(attention, *qkv(dtype=dtype), captured))


COMPUTED = {
    "slopes": (lambda s, h, q, kv, x: s + x[h] * (kv - q), SLOPES),
    "a function of slopes": (lambda s, h, q, kv, x: s - torch.exp2(x[h]) * (q - kv).abs(), SLOPES),
    "a table that is scaled": (lambda s, h, q, kv, x: s + (x * 1.5)[h, q - kv + S - 1], TABLE),
    "a product that is cast": (lambda s, h, q, kv, x: s + x[h].float() * (kv - q), SLOPES),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_digits_alone_are_rounded(name):
    assert outcome(*COMPUTED[name]).startswith("attention(score=")


DECIDED = {
    "a comparison": (lambda s, h, q, kv, x: torch.where(x[h] * 1.1 < q - kv, s, s - 1), SLOPES),
    "a step": (lambda s, h, q, kv, x: s + torch.floor(x[h] * q), SLOPES),
    "an infinity": (
        lambda s, h, q, kv, x: s + (1 - x[kv]) * torch.finfo(torch.float32).min,
        PADDING,
    ),
    "what is cast": (lambda s, h, q, kv, x: s + (x[h] * q).to(torch.bfloat16), SLOPES),
}


@pytest.mark.parametrize("name", DECIDED)
def test_more_than_digits_is_rounded(name):
    score_mod, captured = DECIDED[name]
    assert outcome(score_mod, captured.detach()) == "lift: not-pointwise"


def test_float16_may_overflow():
    assert outcome(*COMPUTED["slopes"], torch.float16) == "lift: not-pointwise"
