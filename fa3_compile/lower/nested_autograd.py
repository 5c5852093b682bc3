"""Gradients by PyTorch's engine inside a backward that it is running.

The thread that asks works for the engine until they are there, and with each task that it takes it
makes the device that it works for the current one (`set_device` in torch/csrc/autograd/engine.cpp,
Engine::thread_main). A compiled graph with layers on several GPUs runs in one thread, on devices
that its code makes current: its next kernel would meet the context of another device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad`, None for an input that no output depends on; the current CUDA device
    stays what it is."""
    with _current_device_kept():
        return torch.autograd.grad(outputs, inputs, tangents, allow_unused=True)


def _current_device_kept() -> contextlib.AbstractContextManager:
    if not torch.cuda.is_initialized():
        return contextlib.nullcontext()
    return torch.cuda.device(torch.cuda.current_device())
