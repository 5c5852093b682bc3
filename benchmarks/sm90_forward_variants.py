"""Other ways to build a Hopper forward against the one that runs: the same numbers, and how fast.

    python benchmarks/sm90_forward_variants.py [CASE ...]    on a Hopper GPU

Each row is a configuration of one case, all of a case in turn in one process; `diff` is the
largest distance of its output and its LSE from the first row's.
"""

from __future__ import annotations

import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.sm90_dev import TOKENS, WIDTH, WORKERS, Timed, interleaved, made, problem_of, timed
from fa3_compile.lower.build_nvrtc import Built, load
from fa3_compile.lower.kernels.cuda_sm90 import bind
from fa3_compile.lower.kernels.cuda_sm90_keys import keys_of, layout_of
from fa3_compile.lower.render_cuda import CudaKey

S, N = f"{1 / math.sqrt(128)}*s", 8192
SQUARES = " & ".join(
    f"(abs({f}(floordiv(q, 64), 16) - {f}(floordiv(kv, 64), 16)) <= 2)" for f in ("floordiv", "mod")
)
BIAS = f"score={S} + load(0, 0, h, q, kv)"
# Beside those of sm90_dev.py; `ragged` are documents of random lengths.
OWN = (
    Timed("full", f"score={S}", 128, N, 1.0),
    Timed(
        "ragged", f"score={S}, mask=(load(0, b, q) == load(0, b, kv))", 128, N, 0.0, ("eighths",)
    ),
    Timed("bias causal", f"{BIAS}, mask=(kv - q <= 0)", 128, N, 0.5, ("bias_of_heads",)),
    Timed("squares", f"score={S}, mask={SQUARES}", 128, N, 0.0),
)
LARGE = {"block_m": 128, "block_n": 128}
PLAIN, LATE = {"held_queries": False, "optimistic": False}, {"optimistic": True}
HELD = {"held_queries": True}
WAYS = (PLAIN, PLAIN | LATE, PLAIN | HELD, PLAIN | HELD | LATE)
# Case -> what its rows change of the table's first configuration.
PLAN = {
    **dict.fromkeys(("documents", "ragged", "padded causal", "dense mask", "squares"), WAYS),
    **dict.fromkeys(("bias", "bias causal"), WAYS),
    **dict.fromkeys(
        ("full", "causal", "softcap", "alibi", "window1024", "prefix1024"),
        (PLAIN, PLAIN | LATE, *(LARGE | x for x in WAYS)),
    ),
}


def inputs(name: str, device: str):
    """(what it is, the share of the work that is left, spec, q, k, v, aux)."""
    cases = [x for x in (*OWN, *timed()) if x.name == name and (x.dim, x.length) == (128, N)]
    spec, q, k, v, aux = made(cases[0], device)
    share = cases[0].share
    if name == "squares":
        at = torch.arange(N) // 64
        near = [(x[:, None] - x).abs() <= 2 for x in (at // 16, at % 16)]
        share = (near[0] & near[1]).double().mean().item()
    if name == "ragged":
        random = torch.Generator().manual_seed(3)
        cuts = torch.randint(0, N, (TOKENS // N, 7), generator=random).sort(1).values
        ids = (torch.arange(N)[None, :, None] >= cuts[:, None]).sum(-1)
        lengths = torch.stack([torch.bincount(x, minlength=8) for x in ids]).double()
        share, aux = ((lengths / N) ** 2).sum(1).mean().item(), [ids.to(device)]
    return cases[0], share, spec, q, k, v, aux


def keys(name: str) -> list[CudaKey]:
    _, _, spec, q, k, v, aux = inputs(name, "meta")
    first = keys_of(problem_of(spec, q, k, v, aux), layout_of(spec, aux))[0]
    return [replace(first, config=replace(first.config, **x)) for x in PLAN[name]]


def build(key: CudaKey) -> Built:
    """In a worker, so that the kernel lies in the cache on disk."""
    torch.set_num_threads(1)
    return load(key)


def measure(name: str) -> None:
    case, share, spec, q, k, v, aux = inputs(name, "cuda")
    problem = problem_of(spec, q, k, v, aux)
    calls, rows, expected = [], [], None
    for key in keys(name):
        bound, built = bind(problem, q, k, v, aux, (), key), load(key)
        found = bound(q, k, v, aux)
        expected = expected or found
        off = [(a.float() - b.float()).abs().max().item() for a, b in zip(found, expected)]
        c = key.config
        said = [
            f"{c.block_m}x{c.block_n}",
            *(x for x in ("held_queries", "optimistic") if getattr(c, x)),
        ]
        said += [] if built.healthy else [f"spills {built.spill_bytes}"]
        calls.append(lambda bound=bound: bound(q, k, v, aux))
        rows.append((" ".join(said), f"diff {off[0]:.1e} {off[1]:.1e}"))
    work = 4 * TOKENS * case.length * WIDTH * share
    for (said, off), ms in zip(rows, interleaved(calls, 25)):
        print(f"{name:14s}{said:32s}{1e3 * ms:8.1f} us {work / ms / 1e9:5.0f} TFLOP/s  {off}")
    sys.stdout.flush()


def main() -> None:
    wanted = sys.argv[1:] or list(PLAN)
    with ProcessPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        list(pool.map(build, [key for name in wanted for key in keys(name)]))
    for name in wanted:
        measure(name)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
