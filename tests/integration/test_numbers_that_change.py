"""Python numbers that change from call to call: compiled once more, and then no more."""

from __future__ import annotations

import torch
from torch import nn

from tests.integration.gpt import rewritten


class Softcapped(nn.Module):
    """Scores capped, both numbers attributes that are set from outside."""

    scale, cap = 0.25, 5.0

    def forward(self, q, k, v):
        scores = q @ k.mT * self.scale
        return (self.cap * torch.tanh(scores / self.cap)).softmax(-1) @ v


def test_floats():
    compiled = []

    def backend(gm, inputs):
        compiled.append(gm)
        return rewritten(gm, inputs)

    model = Softcapped()
    call = torch.compile(model, backend=backend)
    q, k, v = (torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3))
    for model.scale, model.cap in ((0.25, 5.0), (0.5, 6.0), (0.7, 7.0), (0.1, 8.0)):
        ours, eager = (torch.autograd.grad(f(q, k, v).sum(), (q, k)) for f in (call, model))
        torch.testing.assert_close(ours, eager)
    assert len(compiled) == 2
