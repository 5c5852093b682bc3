"""The Hopper forward on the shapes of published models, short and middle lengths, against cuDNN.

    python benchmarks/kernels/sm90_shapes.py [MODEL ...]    on a Hopper GPU

Ten calls in a CUDA graph, which take turns. The first tile is the table's; where tiles are few,
smaller ones and such whose keys are dealt out follow. Rows below cuDNN are marked. Full numbers go
to $OUT (default: the current directory).
"""

from __future__ import annotations

import csv
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.sm90_forward import OUT, WORKERS, problem_of
from benchmarks.measure import GRAPH_CALLS, graphed
from fa3_compile.lower.binaries.build_nvrtc import load_first
from fa3_compile.lower.kernels.cuda_sm90 import bind
from fa3_compile.lower.kernels.cuda_sm90_keys import keys_of, layout_of, processors
from fa3_compile.lower.render.render_cuda import CudaKey
from fa3_compile.lower.tiles.config_sm90 import Sm90Config
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.timing import interleaved

# Query heads, KV heads, head dim, whether it is causal; lengths of `LENGTHS` unless given.
MODELS = {
    "Llama-3-8B": (32, 8, 128, True),
    "Llama-3-70B on 8": (8, 1, 128, True),
    "Llama-3.2-1B": (32, 8, 64, True),
    "Qwen2.5-7B": (28, 4, 128, True),
    "Gemma-2-2B": (8, 4, 256, True),
    "GPT-2": (12, 12, 64, True),
    "Phi-3-mini": (32, 32, 96, True),
    "BERT": (12, 12, 64, False),
    "ViT-H": (16, 16, 80, False, 257),
    "Whisper": (20, 20, 64, False, 1500),
    "SD-1.5": (8, 8, 40, False, 1024, 4096),
    "Flux": (24, 24, 128, False, 4608),
}
LENGTHS = (512, 1024, 2048, 4096)
BATCHES = (1, 8)
Point = tuple[str, int, int]  # model, batch, length


def points(wanted: list[str]) -> list[Point]:
    return [
        (name, batch, length)
        for name, (_, _, _, _, *own) in MODELS.items()
        for length in own or LENGTHS
        for batch in BATCHES
        if not wanted or any(x in name for x in wanted)
    ]


def made(point: Point, device: str):
    """(spec, q, k, v), in memory [batch, length, heads, dim]."""
    name, batch, length = point
    heads, kv_heads, dim, causal, *_ = MODELS[name]
    mask = ", mask=(kv - q <= 0)" if causal else ""
    spec = AttentionSpec.parse(f"attention(score={1 / math.sqrt(dim)}*s{mask})")
    q, k, v = (
        torch.randn(batch, length, n, dim, device=device, dtype=torch.bfloat16).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads)
    )
    return spec, q, k, v


def keys(point: Point) -> list[CudaKey]:
    """The table's kernel, and others where a processor gets three tiles or less."""
    spec, q, k, v = made(point, "meta")
    found = keys_of(problem_of(spec, q, k, v, []), layout_of(spec, []))
    first = load_first(found)[0]
    _, batch, length = point
    tiles = batch * q.shape[1] * -(-length // first.config.block_m)
    if tiles > 3 * processors(torch.device("cuda")):
        return [first]
    narrow = 64 if q.shape[3] > 128 else 128
    ways = [replace(first.config, split=False, longest_first=spec.has_mask)]
    ways += [x.config for x in found if x.config.block_m == 192][:1]
    ways += [
        Sm90Config(m, narrow, longest_first=spec.has_mask, ping_pong=m > 64) for m in (128, 64)
    ]
    ways += [replace(x, split=True, longest_first=False) for x in ways[1:]]
    others = [replace(first, config=x) for x in ways if x != first.config]
    return [first, *(x for x in others if x.config.fits(q.shape[3], v.shape[3]))]


def build(point: Point) -> list[CudaKey]:
    """In a worker, so that the kernels lie in the cache on disk."""
    torch.set_num_threads(1)
    return [key for key in keys(point) if load_first([key])[1].healthy]


def measure(point: Point, ways: list[CudaKey]) -> tuple[list[float], float]:
    """(milliseconds of cuDNN and of each way, the largest distance from cuDNN)."""
    spec, q, k, v = made(point, "cuda")
    problem, causal = problem_of(spec, q, k, v, []), MODELS[point[0]][3]
    sdpa = partial(
        torch.nn.functional.scaled_dot_product_attention,
        q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        expected = sdpa().float()
        calls, off = {"cudnn": graphed(sdpa)}, 0.0
    for i, key in enumerate(ways):
        bound = bind(problem, q, k, v, [], (), key)
        off = max(off, (bound(q, k, v, [])[0].float() - expected).abs().max().item())
        calls[f"{i}"] = graphed(partial(bound, q, k, v, []))
    times = interleaved(calls, q.device)
    return [x / GRAPH_CALLS for x in times.values()], off


def said(config: Sm90Config) -> str:
    ahead = " ahead" * (config.ahead > 0)
    return f"{config.block_m}x{config.block_n}{ahead}{' split' * config.split}"


def main() -> None:
    todo, rows = points(sys.argv[1:]), []
    with ProcessPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        ways = list(pool.map(build, todo))
    for point, found in zip(todo, ways):
        try:
            (theirs, *ours), off = measure(point, found)
        except RuntimeError as error:
            print(*point, f"{error}"[:200], flush=True)
            continue
        name, batch, length = point
        mark = " <" if ours[0] > theirs else ""
        shares = [f"{said(x.config)} {theirs / ms:.2f}" for x, ms in zip(found, ours)]
        print(
            f"{name:17s}B{batch} S{length:<5d}{1e3 * theirs:8.1f} us, {', '.join(shares)}; ", end=""
        )
        print(f"off {off:.0e}{mark}", flush=True)
        rows += [
            (*point, said(x.config), f"{ms:.4f}", f"{theirs:.4f}", f"{theirs / ms:.3f}")
            for x, ms in zip(found, ours)
        ]
        torch.cuda.empty_cache()
    with open(OUT / "sm90_shapes.csv", "w", newline="") as file:
        head = ("model", "batch", "length", "tile", "ms", "cudnn_ms", "share")
        csv.writer(file).writerows([head, *rows])


if __name__ == "__main__":
    main()
