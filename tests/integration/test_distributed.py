"""Two processes, over gloo on the CPU and over NCCL on a GPU each. Their gradients are as close to
those of one process that sees both halves as the same processes' are without compiling."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.multiprocessing.spawn import spawn

from fa3_compile.report import collect
from fa3_compile.testing import Result, assert_close_to_oracle
from tests.integration.gpt import (
    GPT,
    assert_as_close_as_eager,
    batch,
    compiled,
    gradients,
    step,
)

PROCESSES = 2
BATCH = 2 * PROCESSES
Wrap = Callable[[Callable], Callable]


def _half(rank: int) -> Tensor:
    return batch(BATCH)[2 * rank : 2 * rank + 2]


def _kind(device: str) -> str:
    return torch.device(device).type


def _data_parallel(rank: int, device: str, wrap: Wrap) -> dict[str, Tensor]:
    model = GPT().to(device)
    call = wrap(nn.parallel.DistributedDataParallel(model))
    for _ in range(2):  # the second step has gradients to overwrite
        model.zero_grad()
        step(call, _half(rank), device)
    return gradients(model)


def _data_parallel_around_the_compiled(rank: int, device: str, wrap: Wrap) -> dict[str, Tensor]:
    model = GPT().to(device)
    parallel = nn.parallel.DistributedDataParallel(cast(nn.Module, wrap(model)))
    step(parallel, _half(rank), device)
    return gradients(model)


def _fully_sharded(rank: int, device: str, wrap: Wrap) -> dict[str, Tensor]:
    model = GPT().to(device)
    mesh = init_device_mesh(_kind(device), (PROCESSES,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    step(wrap(model), _half(rank), device)
    return _whole(model)


def _whole(model: nn.Module) -> dict[str, Tensor]:
    return {n: cast(DTensor, g).full_tensor() for n, g in gradients(model).items()}


def _tensor_parallel(device: str, wrap: Wrap) -> dict[str, Tensor]:
    """Half of the heads in each process; the projections are DTensors, the attention is not."""
    model, x = _projections().to(device), _tensor_parallel_input().to(device)
    styles: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in "qkv"}
    styles["o"] = RowwiseParallel()
    parallelize_module(model, init_device_mesh(_kind(device), (PROCESSES,)), styles)
    with torch.autocast(_kind(device), torch.bfloat16, enabled=device != "cpu"):
        out = wrap(_attention)(model, x)
    out.float().square().sum().backward()
    return _whole(model)


def _projections() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(16, 16, bias=False) for name in "qkvo"})


def _tensor_parallel_input() -> Tensor:
    return torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))


def _attention(model: nn.ModuleDict, x: Tensor) -> Tensor:
    q, k, v = (model[name](x).unflatten(2, (-1, 8)).transpose(1, 2) for name in "qkv")
    return model["o"](((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


def _both(work: Callable[[Wrap], dict[str, Tensor]], device: str):
    """The gradients of the work compiled, every attention of it fused, and of the work as it is."""
    with collect() as report:
        ours = work(lambda model: compiled(model, device))
    assert report.fused and len(report.fused) == len(report.regions), str(report)
    assert device == "cpu" or all(x.kernel != "reference" for x in report.fused), str(report)
    dist.barrier()
    torch._dynamo.reset()
    return ours, work(lambda model: model)


def _work(rank: int, port: int, kind: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    device = "cpu" if kind == "cpu" else f"cuda:{rank}"
    if kind == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("gloo" if kind == "cpu" else "nccl", rank=rank, world_size=PROCESSES)
    try:
        for work in (_data_parallel, _data_parallel_around_the_compiled, _fully_sharded):
            both = _both(lambda wrap, work=work: work(rank, device, wrap), device)
            assert_as_close_as_eager(*both, batch(BATCH))
        ours, eager = _both(lambda wrap: _tensor_parallel(device, wrap), device)
        exact = _projections().double()
        _attention(exact, _tensor_parallel_input().double()).square().sum().backward()
        there = [{n: g.cpu() for n, g in x.items()} for x in (ours, eager, gradients(exact))]
        assert_close_to_oracle(*(Result({}, x) for x in there))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_are_those_of_one_process(kind: str) -> None:
    if kind == "cuda" and torch.cuda.device_count() < PROCESSES:
        pytest.skip(f"{PROCESSES} GPUs are needed, there are {torch.cuda.device_count()}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_work, (port, kind), nprocs=PROCESSES)
