"""Softcaps without tanh: where scores are near enough to 0, `cuda_sm90` takes a polynomial."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fa3_compile.lower.choose import Problem
from fa3_compile.lower.kernels.cuda_sm90_keys import keys_of, layout_of
from fa3_compile.lower.render.cuda_terms import arrange, capped
from fa3_compile.lower.tiles.config_sm90 import Sm90Config
from fa3_compile.spec.attention import AttentionSpec
from tests.host_driver import launches
from tests.numerics.test_cuda_sm90_forward_emulated import ran

__all__ = ["launches"]


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("50.0*tanh(0.002*s)", 0.002),
        ("tanh(0.002*s)", 0.002),
        ("50.0*tanh(0.002*s) + load(0, h)*q", 0.002),  # which the LSE alone sees
        ("-50.0*tanh(0.002*s)", 0.0),
        ("50.0*tanh(0.002*s + 1)", 0.0),
        ("50.0*tanh(0.002*s) + load(0, h)*kv", 0.0),
        ("50.0*tanh(load(0, h)*s)", 0.0),
        ("50.0*tanh(0.002*s)*tanh(0.002*s)", 0.0),
        ("50.0*tanh(1e-9*s)", 0.0),
        ("0.1*s", 0.0),
    ],
)
def test_which_scores_are_capped(score: str, expected: float) -> None:
    aux = ", aux=[float]" if "load" in score else ""
    spec = AttentionSpec.parse(f"attention(score={score}{aux})")
    assert capped(arrange(spec.score)) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_near_and_far(dtype, tmp_path, monkeypatch, launches) -> None:
    """The rows of a warp are as large as one another; of the last warp one row and key are large."""
    inner, cap, dim, kv_len = 0.05, 20.0, 32, 100
    spec = AttentionSpec.parse(f"attention(score={cap}*tanh({inner}*s))")
    sizes = torch.tensor([0.0, 0.01, 0.3, 0.6, 5.0, 50.0, 5000.0]).repeat_interleave(16)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, dim, generator=generator) for n in (128, kv_len, kv_len))
    q[:, :, :112] *= sizes[:, None]
    q[:, :, 112:] *= 0.5
    q[:, :, 127] = 0.7 * k[:, :, 50]
    q, k, v = (x.to(dtype) for x in (q, k, v))
    q[:, :, 3], q[:, :, 20] = float("nan"), float("inf")
    problem = Problem(spec, dtype, torch.device("cuda:0"), (9, 0), 1, 1, 1, 128, kv_len, dim, dim)
    key = keys_of(problem, layout_of(spec, []))[0]
    key = replace(key, config=Sm90Config(128, 16, longest_first=False, optimistic=True))
    out, lse = ran(problem, key, (q, k, v, []), (), tmp_path, monkeypatch)
    scores = cap * torch.tanh(inner * (q.double() @ k.double().mT))
    expected, sums = torch.softmax(scores, -1) @ v.double(), scores.logsumexp(-1)
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02, equal_nan=True)
    off = (lse.double() - sums).abs()[0, 0].nan_to_num(0.0).view(8, 16).amax(1)
    assert off.max() < 3.1e-4 * cap
    # tanh is exact here, so that what is not comes of the polynomial: rows near 0, and no others.
    assert (off > 1e-5).tolist() == [False, False, True, True, False, False, False, True]
