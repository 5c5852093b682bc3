"""Several GPUs, and several threads, in one process; on the CPU its one device twice."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from fa3_compile.report import collect
from tests.integration.gpt import (
    GPT,
    assert_as_close_as_eager,
    batch,
    compiled,
    gradients,
    step,
)

Devices = tuple[str, str]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def devices(request) -> Devices:
    if request.param == "cpu":
        return "cpu", "cpu"
    if torch.cuda.device_count() < 2:
        pytest.skip(f"two GPUs are needed, there is {torch.cuda.device_count()}")
    return "cuda:0", "cuda:1"


def made(device: str, learned: bool, **kwargs) -> GPT:
    """learned  the distance's bias has a gradient, which the Hopper backward leaves to Triton"""
    model = GPT(**kwargs).to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learned or not name.endswith("attention.bias"))
    return model


def check(ours: nn.Module, eager: nn.Module, tokens: Tensor, layers: int = 1) -> None:
    assert_as_close_as_eager(gradients(ours), gradients(eager), tokens, layers)


@pytest.mark.parametrize("learned", [True, False], ids=["learned bias", "fixed bias"])
def test_a_device_that_is_not_the_current_one(devices: Devices, learned: bool) -> None:
    ours, eager = (made(devices[1], learned) for _ in range(2))
    current = torch.cuda.current_device() if devices[1] != "cpu" else None
    with collect() as report:
        call = compiled(ours, devices[1])
        for _ in range(2):
            ours.zero_grad()
            step(call, batch(), devices[1])
    step(eager, batch(), devices[1])
    assert len(report.fused) == len(report.regions) == 1
    check(ours, eager, batch())
    assert devices[1] == "cpu" or torch.cuda.current_device() == current


def test_one_function_on_each_device_in_turn(devices: Devices) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2], device=q.device)
        scores = (q @ k.mT).masked_fill(at > at[:, None], float("-inf"))
        return scores.softmax(-1) @ v

    call = compiled(attention, devices[0])
    for device in (*devices, *devices):
        wide = [torch.randn(2, 4, 50, 16, device=device).requires_grad_() for _ in range(3)]
        half = [x.bfloat16() for x in wide] if device != "cpu" else wide
        out = call(*half)
        expected = attention(*wide)
        grads = torch.autograd.grad(out.float().square().sum(), wide)
        exact = torch.autograd.grad(expected.square().sum(), wide)
        assert out.device == torch.device(device)
        tolerance = 1e-5 if device == "cpu" else 0.05
        torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)
        for x, y in zip(grads, exact, strict=True):
            assert (x - y).abs().max() <= tolerance * (1 + y.abs().max())


def test_layers_of_one_graph_on_two_devices(devices: Devices) -> None:
    def wrapped(block: nn.Module, x: Tensor) -> Tensor:
        return block(x.to(next(block.parameters()).device)).to(x.device)

    ours, eager = (made(devices[0], True, layers=2, wrapped=wrapped) for _ in range(2))
    for model in (ours, eager):
        for block, device in zip(model.blocks, devices, strict=True):
            block.to(device)
    with collect() as report:
        step(compiled(ours, devices[0]), batch(), devices[0])
    step(eager, batch(), devices[0])
    assert len(report.fused) == len(report.regions) == 2
    check(ours, eager, batch(), layers=2)


@pytest.mark.parametrize("shared", [False, True], ids=["a device each", "one device"])
def test_two_threads(devices: Devices, shared: bool) -> None:
    """Each compiles a model of its own, one after the other, which torch 2.11 needs; then they run
    at the same time."""
    if not shared and devices[0] == devices[1]:
        pytest.skip("there is one device")

    compiling, both = threading.Lock(), threading.Barrier(2, timeout=300)
    # Their weights come from the one generator that threads share.
    models = [
        [made(devices[0 if shared else number], number == 0) for _ in range(2)]
        for number in range(2)
    ]

    def work(number: int) -> tuple[GPT, GPT, Tensor]:
        device = devices[0 if shared else number]
        ours, eager = models[number]
        tokens = batch(seed=number)
        call = compiled(ours, device)
        with compiling:
            step(call, tokens, device)
        both.wait()
        for _ in range(20):
            ours.zero_grad()
            step(call, tokens, device)
        step(eager, tokens, device)
        return ours, eager, tokens

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(work, range(2)):
            check(*found)
