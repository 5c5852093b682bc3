"""Two processes over gloo on the CPU: the gradients of one process that sees both halves."""

from __future__ import annotations

import os
import socket
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.multiprocessing.spawn import spawn

from fa3_compile.report import collect
from tests.integration.gpt import GPT, batch, compiled, gradients, rewritten

PROCESSES = 2


def _expected() -> dict[str, torch.Tensor]:
    """The gradients of eager code over the whole batch."""
    model = GPT()
    model(batch(2 * PROCESSES)).backward()
    return gradients(model)


def _half(rank: int) -> torch.Tensor:
    return batch(2 * PROCESSES)[2 * rank : 2 * rank + 2]


def _data_parallel(rank: int) -> None:
    model = GPT()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    call = compiled(parallel)
    for _ in range(2):  # the second step has gradients to overwrite
        model.zero_grad()
        call(_half(rank)).backward()
    torch.testing.assert_close(gradients(model), _expected(), atol=1e-5, rtol=1e-5)


def _data_parallel_around_the_compiled(rank: int) -> None:
    model = GPT()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    model.compile(backend=rewritten)
    parallel(_half(rank)).backward()
    torch.testing.assert_close(gradients(model), _expected(), atol=1e-5, rtol=1e-5)


def _fully_sharded(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = GPT()
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    call = compiled(model)
    call(_half(rank)).backward()
    whole = {n: cast(DTensor, g).full_tensor() for n, g in gradients(model).items()}
    torch.testing.assert_close(whole, _expected(), atol=1e-5, rtol=1e-5)


def _tensor_parallel(rank: int) -> None:
    """Half of the heads in each process; the projections are DTensors, the attention is not."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({name: nn.Linear(16, 16, bias=False) for name in "qkvo"})

    def attention(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (model[name](x).unflatten(2, (-1, 4)).transpose(1, 2) for name in "qkv")
        return model["o"](((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))

    ours, eager, x = made(), made(), torch.randn(2, 8, 16)
    styles = {"o": RowwiseParallel()} | {name: ColwiseParallel() for name in "qkv"}
    parallelize_module(ours, init_device_mesh("cpu", (PROCESSES,)), styles)
    compiled(attention)(ours, x).square().sum().backward()
    attention(eager, x).square().sum().backward()
    whole = {n: cast(DTensor, g).full_tensor() for n, g in gradients(ours).items()}
    torch.testing.assert_close(whole, gradients(eager), atol=1e-4, rtol=1e-4)


def _work(rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    try:
        for work in (
            _data_parallel,
            _data_parallel_around_the_compiled,
            _fully_sharded,
            _tensor_parallel,
        ):
            with collect() as report:
                work(rank)
            assert report.fused and len(report.fused) == len(report.regions), str(report)
            dist.barrier()
            torch._dynamo.reset()
    finally:
        dist.destroy_process_group()


def test_gradients_are_those_of_one_process():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_work, (port,), nprocs=PROCESSES)
