"""Absorbed latent attention (DeepSeek-V2, section 2.1) as people write it, through torch.compile
and the Triton kernel, under Triton's interpreter.

TRITON_INTERPRET has to be set before Triton is imported, so this file is also the program that
runs the models, in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

HEADS, SCALE = 4, 0.05


class CachesApart(nn.Module):
    """DeepSeek's inference code: a cache of latents and one of rotary keys, scores added."""

    kv_cache: Tensor
    pe_cache: Tensor

    def __init__(self, latent: int, rotary: int):
        super().__init__()
        self.register_buffer("kv_cache", torch.zeros(2, 300, latent))
        self.register_buffer("pe_cache", torch.zeros(2, 300, rotary))

    def forward(self, q: Tensor, q_pe: Tensor, kv: Tensor, k_pe: Tensor, start: int) -> Tensor:
        b, s = q.shape[:2]
        end = start + s
        self.kv_cache[:b, start:end] = kv
        self.pe_cache[:b, start:end] = k_pe
        scores = torch.einsum("bshc,btc->bsht", q, self.kv_cache[:b, :end])
        rotary = torch.einsum("bshr,btr->bsht", q_pe, self.pe_cache[:b, :end])
        scores = (scores + rotary) * SCALE
        if s > 1:
            mask = torch.full((s, s), float("-inf")).triu_(1)
            scores += mask.unsqueeze(1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).type_as(q)
        return torch.einsum("bsht,btc->bshc", weights, self.kv_cache[:b, :end])


def one_cache(q: Tensor, cache: Tensor, end: int) -> Tensor:
    """The cache of an inference engine, [b, t, latent and rotary], by matmul."""
    kv = cache[:, None, :end]
    weights = ((q.transpose(1, 2) @ kv.transpose(-1, -2)) * SCALE).softmax(-1)
    return weights @ kv[..., :512]


def several_queries(q: Tensor, cache: Tensor, end: int) -> Tensor:
    """Speculative decoding by einsum: the last queries, each with the keys before it."""
    kv, s = cache[:, :end], q.shape[1]
    scores = torch.einsum("bshd,btd->bhst", q, kv) * SCALE
    late = torch.ones(s, end, dtype=torch.bool).triu(end - s + 1)
    weights = scores.masked_fill(late, float("-inf")).softmax(-1)
    return torch.einsum("bhst,btd->bshd", weights, kv[..., :512])


def last_columns(q: Tensor, cache: Tensor, end: int) -> Tensor:
    kv = cache[:, None, :end]
    return (q.transpose(1, 2) @ kv.mT * SCALE).softmax(-1) @ kv[..., -512:]


def other_positions(q: Tensor, cache: Tensor, end: int) -> Tensor:
    kv = cache[:, None, :end]
    weights = (q.transpose(1, 2) @ kv.mT * SCALE).softmax(-1)
    return weights @ cache[:, None, 1 : end + 1, :512]


def copied(q: Tensor, cache: Tensor, end: int) -> Tensor:
    kv = cache[:, None, :end]
    return (q.transpose(1, 2) @ kv.mT * SCALE).softmax(-1) @ (kv[..., :512] * 2)


def one_wide_cache(s: int, ends: tuple[int, ...]) -> list[tuple]:
    cache = torch.randn(2, 40, 576)
    return [(torch.randn(2, s, HEADS, 576), cache, end) for end in ends]


def latents(b: int, s: int, start: int, latent: int, rotary: int) -> tuple:
    shapes = (b, s, HEADS, latent), (b, s, HEADS, rotary), (b, s, latent), (b, s, rotary)
    return *map(torch.randn, shapes), start


# name -> (model, the arguments of its calls, head dims, whether V is taken from K's tiles)
MODELS = {
    "caches apart": (
        lambda: CachesApart(512, 64),
        lambda: [latents(2, 1, 20, 512, 64), latents(2, 1, 21, 512, 64)],
        (512, 512),
        True,
    ),
    "caches apart, prompt": (
        lambda: CachesApart(256, 16),
        lambda: [latents(1, 280, 0, 256, 16)],
        (272, 256),
        True,
    ),
    "one cache": (lambda: one_cache, lambda: one_wide_cache(1, (20, 21)), (576, 512), True),
    "several queries": (
        lambda: several_queries,
        lambda: one_wide_cache(3, (21,)),
        (576, 512),
        True,
    ),
    "last columns": (lambda: last_columns, lambda: one_wide_cache(1, (20,)), (576, 512), False),
    "other positions": (
        lambda: other_positions,
        lambda: one_wide_cache(1, (20,)),
        (576, 512),
        False,
    ),
    "copied": (lambda: copied, lambda: one_wide_cache(1, (20,)), (576, 512), False),
}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> dict[str, dict]:
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("interpreter")
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FA3_CACHE_DIR": str(folder)}
    environment["PYTHONPATH"] = str(root)
    done = subprocess.run(
        [sys.executable, __file__], env=environment, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {x["name"]: x for x in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", MODELS)
def test_runs_fused_in_the_triton_kernel(name: str, records) -> None:
    _, _, dims, shared = MODELS[name]
    record = records[name]
    assert record["kernels"] == ["triton"] * len(record["kernels"]) and record["kernels"]
    assert record["error"] < 2e-5
    assert record["seen"] == [[*dims, shared]]


def test_gradients_are_eagers(records) -> None:
    """There is no backward kernel for heads so wide."""
    record = records["training"]
    assert record["kernels"] == ["triton"] and record["gradients"] == ["reference"]
    assert record["error"] < 1e-5


def train() -> dict:
    from fa3_compile.backend import fa3
    from fa3_compile.report import collect

    torch.manual_seed(0)
    torch._dynamo.reset()
    q, cache = torch.randn(2, 5, HEADS, 320), torch.randn(2, 7, 320)

    def attention(q: Tensor, cache: Tensor) -> Tensor:
        scores = torch.einsum("bshd,btd->bhst", q, cache) * SCALE
        return torch.einsum("bhst,btd->bshd", scores.softmax(-1), cache[..., :264]).square().sum()

    found = []
    with collect() as report:
        for f in (attention, torch.compile(attention, backend=fa3, options={"kernels": "triton"})):  # fmt: skip
            inputs = [x.clone().requires_grad_() for x in (q, cache)]
            f(*inputs).backward()
            found.append([x.grad for x in inputs])
    error = max((a - b).abs().max().item() / a.abs().max().item() for a, b in zip(*found))
    kernels = [x.kernel or x.reason for x in report.regions]
    gradients = [x.gradients for x in report.regions]
    return {"name": "training", "kernels": kernels, "gradients": gradients, "error": error}


def run(name: str) -> dict:
    from fa3_compile.backend import fa3
    from fa3_compile.lower.kernels import triton_forward
    from fa3_compile.report import collect

    make, calls, _, _ = MODELS[name]
    seen, bound = set(), triton_forward.TritonForward.bound

    def spy(self, problem, q, k, v, *rest):
        seen.add((problem.dim, problem.v_dim, triton_forward._is_shared(problem, k, v)))
        return bound(self, problem, q, k, v, *rest)

    torch.manual_seed(0)
    torch._dynamo.reset()
    model, error = make(), 0.0
    compiled = torch.compile(model, backend=fa3, options={"kernels": "triton"})
    with torch.no_grad(), collect() as report, pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_forward.TritonForward, "bound", spy)
        for arguments in calls():
            expected = model(*arguments)
            error = max(error, (compiled(*arguments) - expected).abs().max().item())
    kernels = [x.kernel or x.reason for x in report.regions]
    return {"name": name, "kernels": kernels, "error": error, "seen": sorted(seen)}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for each in MODELS:
        print(json.dumps(run(each)), flush=True)
    print(json.dumps(train()), flush=True)
