"""The Hopper forward kernel on few queries and long caches.

    python benchmarks/kernels/sm90_decode.py [NAME ...]    GB/s of keys and values
    python benchmarks/kernels/sm90_decode.py grow          host time, a key more a call

on a Hopper GPU. NAME is one of FORMS. Full numbers go to $OUT (default: the current directory).
"""

from __future__ import annotations

import csv
import itertools
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.kernels.sm90_forward import problem_of
from fa3_compile.lower.kernels.cuda_sm90 import CudaSm90
from fa3_compile.spec.attention import AttentionSpec

OUT = Path(os.environ.get("OUT", "."))

CACHES = tuple((b, n) for b in (1, 2, 4, 8, 16, 32) for n in (8192, 16384, 32768, 65536))
GROUP, KV_HEADS, HEAD_DIM = 8, 8, 128


def replayed(function: Callable[[int], object], sets: int, calls: int = 0) -> float:
    """Milliseconds of a call, of `sets` sets of tensors in turn, in a CUDA graph."""
    calls = max(calls, sets)
    for i in range(sets):
        function(i)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            function(i % sets)
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return sorted(times)[len(times) // 2]


def copy_bandwidth() -> float:
    """GB/s of a device-to-device copy, bytes read and written."""
    a = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / replayed(lambda _: b.copy_(a), 1, 5) / 1e6


FORMS = {
    "full": "score=0.088*s",
    "static cache": "score=0.088*s, mask=(kv - load(0, 0) <= 0), aux=[int]",
    "left padding": "score=0.088*s, mask=(load(0, b, kv) != 0), dead=zero, aux=[int]",
    "softcap": "score=50.0*tanh(0.00176*s)",
    "window": "score=0.088*s, mask=(kv - q - Skv + Sq <= 0) & (Skv + q - Sq - kv <= 4095)",
}


def decoded(name: str, batch: int, length: int) -> tuple[float, float, float]:
    """(bytes of keys and values, milliseconds, milliseconds of SDPA) of one query row."""
    seen = {"static cache": length // 2, "left padding": length // 2, "window": 4096}
    bytes_ = 4 * batch * KV_HEADS * seen.get(name, length) * HEAD_DIM
    sets = max(1, -(-4 * 10**8 // bytes_))  # so that nothing is found in L2
    aux = []
    if name == "static cache":
        aux = [torch.tensor([length // 2 - 1], device="cuda")]
    if name == "left padding":
        real = torch.arange(length, device="cuda") >= length // 2
        aux = [real.long().expand(batch, -1).contiguous()]
    tensors = []
    for _ in range(sets):
        q, k, v = (
            torch.randn(batch, heads, rows, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
            for heads, rows in ((KV_HEADS * GROUP, 1), (KV_HEADS, length), (KV_HEADS, length))
        )
        tensors.append((q, k, v))
    spec = AttentionSpec.parse(f"attention({FORMS[name]})")
    q, k, v = tensors[0]
    problem, kernel = problem_of(spec, q, k, v, aux), CudaSm90()

    def ours(i: int):
        q, k, v = tensors[i]
        return kernel.run(problem, q, k, v, aux, ())

    took = replayed(ours, sets, 8)
    if name != "full":
        return bytes_, took, 0.0
    sdpa = partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    return bytes_, took, replayed(lambda i: sdpa(*tensors[i]), sets)


def decode(wanted: list[str]) -> None:
    """GB/s of keys and values, read once, and the share of the copy's bandwidth."""
    rows = []
    copied = copy_bandwidth()
    print(f"copy {copied:.0f} GB/s", flush=True)
    for name, (batch, length) in itertools.product(FORMS, CACHES):
        few = batch in (1, 8) and length == 32768
        if (wanted and name not in wanted) or (name != "full" and not few):
            continue
        bytes_, took, sdpa = decoded(name, batch, length)
        rate = bytes_ / took / 1e6
        rows.append((name, batch, length, f"{1e3 * took:.1f}", f"{rate:.0f}",
                     f"{rate / copied:.3f}", f"{1e3 * sdpa:.1f}"))  # fmt: skip
        print(*rows[-1], flush=True)
        torch.cuda.empty_cache()
    with open(OUT / "sm90_decode.csv", "w", newline="") as file:
        head = ("form", "batch", "keys", "us", "GB/s", "share of copy", "sdpa us")
        csv.writer(file).writerows([head, *rows])


def grow(steps: int = 200) -> None:
    """Microseconds of host time a call while a cache grows by a key a call, and where it does not.

    Each length is bound anew; no kernel may be built on the way.
    """
    from fa3_compile.lower.binaries import build_nvrtc

    for name in ("full", "left padding"):
        spec = AttentionSpec.parse(f"attention({FORMS[name]})")
        q = torch.randn(1, 32, 1, 128, device="cuda").bfloat16()
        cache = torch.randn(2, 1, 4, 4096 + steps, 128, device="cuda").bfloat16()
        mask = torch.ones(1, 4096 + steps, dtype=torch.int64, device="cuda")
        kernel = CudaSm90()

        def call(length: int, q=q, cache=cache, mask=mask, name=name, spec=spec, kernel=kernel):
            k, v = cache[:, :, :, :length]
            aux = [] if name == "full" else [mask[:, :length]]
            kernel.run(problem_of(spec, q, k, v, aux), q, k, v, aux, ())

        call(4095)
        built = build_nvrtc.load.cache_info().misses
        times = []
        for length in [*range(4096, 4096 + steps)] * 2:
            torch.cuda.synchronize()
            start = time.perf_counter()
            call(length)
            times.append(1e6 * (time.perf_counter() - start))
        new, known = sorted(times[:steps]), sorted(times[steps:])
        again = build_nvrtc.load.cache_info().misses - built
        print(
            f"{name}: a new length {new[steps // 2]:.0f} us (worst {new[-1]:.0f}), a known one "
            f"{known[steps // 2]:.0f} us, kernels built on the way: {again}", flush=True
        )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:] == ["grow"]:
        grow()
    else:
        decode(sys.argv[1:])
