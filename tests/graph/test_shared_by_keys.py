"""Gradients of what all keys of a row read alike: sums of dS, in which nearly all cancels."""

from __future__ import annotations

import torch

from tests.graph.harness import check, specs
from tests.graph.inputs import normal, uniform


def test_a_temperature_beside_equal_keys() -> None:
    """Its gradient is 0. The maximum that the program takes off has one, so that eager's dS sum to 0
    but for the rounding of each; those of a softmax's own gradient are all off by that of one sum.
    """
    length = 200
    torch.manual_seed(0)
    q = torch.randn(2, 4, length, 8)
    k = torch.randn(2, 4, length, 8)[:, :, :1].expand(-1, -1, length, -1).contiguous()
    temperature = (torch.rand(4, 1, 1) + 0.5).requires_grad_()
    gate = torch.rand(length)

    def attention(q, k, temperature, gate):
        s = (q @ k.mT * 0.35 + 0.05 * torch.arange(length)[:, None] + 1) * temperature
        e = (s - s.amax(-1, keepdim=True)).exp()
        return (e / e.sum(-1, keepdim=True) * gate) @ k

    found = specs(check(attention, q, k, temperature, gate))
    assert "*load(1, h, 0, 0), weight=load(0, kv)" in found


def test_sinks_and_rows_without_a_key() -> None:
    """What the keys' dS sum to is the sinks' share, and the LSE's gradient is not in it."""

    def attention(q, k, v, number, sink, seen):
        s = (q @ k.mT * 0.25 + number).masked_fill(~seen, -torch.inf)
        column = sink[:, None, None].expand(*s.shape[:3], 1)
        return torch.cat((s, column), -1).softmax(-1)[..., :-1] @ v

    def with_lse(q, k, v, number, seen):
        s = (q @ k.mT * 0.25 + number).masked_fill(~seen, -torch.inf)
        return s.softmax(-1) @ v, s.logsumexp(-1)

    q, k, v, number = (normal(2, 2, 9, n, seed=n) for n in (16, 16, 16, 1))
    seen = torch.arange(9)[:, None] - 2 > torch.arange(9)
    assert "sinks" in specs(check(attention, q, k, v, number, normal(2), seen))
    assert "load" in specs(check(with_lse, q, k, v, number, uniform(9, 9) < 0.9))
