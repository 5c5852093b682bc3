"""Gradients that torch takes inside a backward: the current device stays what it is."""

from __future__ import annotations

import pytest
import torch

from fa3_compile.lower.kernels.reference import attention_backward
from fa3_compile.lower.kernels.triton_captured import chained
from fa3_compile.lower.printers.elements import Shape
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec

SPEC = AttentionSpec.parse("attention(score=0.25*s + load(0, q), aux=[float])")


def by_the_reference() -> None:
    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    attention_backward(SPEC, v, None, q, k, v, [torch.randn(5)], (), [True] * 4)


def of_a_captured_tensor() -> None:
    parts = [(x, torch.ones(1, 2, 5, 1)) for x in E.loads_in(SPEC.score)]
    chained(parts, SPEC, Shape(1, 2, 5, 5), 0, [torch.randn(5)], ())


@pytest.mark.parametrize("backward", [by_the_reference, of_a_captured_tensor])
def test_current_device(backward, monkeypatch) -> None:
    """The engine makes the device of the thread that it runs in, here 0, the current one."""
    current, gradients = 1, torch.autograd.grad

    def exchange(device: int) -> int:
        nonlocal current
        before, current = current, device
        return before

    def by_thread_of_device_0(*arguments, **options):
        exchange(0)
        return gradients(*arguments, **options)

    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, exchange)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.autograd, "grad", by_thread_of_device_0)
    backward()
    assert current == 1
