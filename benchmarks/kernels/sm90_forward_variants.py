"""Other ways to build a Hopper forward against the one that runs: the same numbers, and how fast.

    python benchmarks/kernels/sm90_forward_variants.py [CASE ...]    on a Hopper GPU

Each row is a configuration of one case, all of a case in turn in one process; `diff` is the
largest distance of its output and its LSE from the first row's, `error` what one head's first rows
are off in float64, in units of what eager is.
"""

from __future__ import annotations

import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from benchmarks.kernels.sm90_forward import (
    TOKENS,
    WIDTH,
    WORKERS,
    Timed,
    interleaved,
    made,
    problem_of,
    timed,
)
from fa3_compile.lower.binaries.build_nvrtc import Built, load
from fa3_compile.lower.kernels.cuda_sm90 import bind
from fa3_compile.lower.kernels.cuda_sm90_keys import keys_of, layout_of
from fa3_compile.lower.kernels.reference import attention
from fa3_compile.lower.render.render_cuda import CudaKey

N = 8192
ROWS = 1024  # that are held against float64
CAUSAL = "mask=(kv - q <= 0)"
PADDED = f"{CAUSAL} & (load(0, b, kv) != 0)"
DOCUMENTS = "mask=(load(0, b, q) == load(0, b, kv))"
SQUARES = " & ".join(
    f"(abs({f}(floordiv(q, 64), 16) - {f}(floordiv(kv, 64), 16)) <= 2)" for f in ("floordiv", "mod")
)


def score(dim: int, cap: float = 0.0, times: float = 1.0) -> str:
    """Of normal Q and K `times` a normal number, under a softcap if there is one."""
    scale = times / math.sqrt(dim)
    return f"score={cap}*tanh({scale / cap}*s)" if cap else f"score={scale}*s"


S = score(128)
BIAS = "load(0, 0, h, q, kv)"


# Beside those of sm90_forward.py; `bias infinite` and `bias least` hold a causal mask, as -inf and
# as finfo.min; `ragged` are documents of random lengths. `far`: one score in four is where a
# softcap is no polynomial, `some`: one in 2000.
OWN = (
    *(Timed(f"softcap{d}", f"{score(d, 50.0)}, {CAUSAL}", d, N, 0.5) for d in (64, 96, 256)),
    *(Timed(f"causal{d}", f"{score(d)}, {CAUSAL}", d, N, 0.5) for d in (64, 80, 96, 192, 256)),
    *(Timed(f"full{d}", score(d), d, N, 1.0) for d in (64, 96, 256)),
    *(
        Timed(f"{name}{'' if d == 128 else d} {n // 1024}k", fields, d, n, share)
        for d in (64, 128, 256)
        for n in (2048, 16384)
        for name, fields, share in (
            ("full", score(d), 1.0),
            ("causal", f"{score(d)}, {CAUSAL}", 0.5),
        )
    ),
    *(
        Timed(f"padded{d}", f"{score(d)}, {PADDED}", d, N, 0.5, ("ones",))
        for d in (64, 96, 192, 256)
    ),
    *(
        Timed(f"documents{d}", f"{score(d)}, {DOCUMENTS}", d, N, 1 / 8, ("eighths",))
        for d in (64, 96, 192, 256)
    ),
    *(
        Timed(f"bias{d}", f"{score(d)} + {BIAS}", d, N, 1.0, ("bias_of_heads",))
        for d in (64, 96, 192)
    ),
    *(
        Timed(f"wide bias{d}", f"{score(d)} + {BIAS}", d, N, 1.0, ("wide_bias_of_heads",))
        for d in (64, 96, 128, 192, 256)
    ),
    Timed("wide bias causal", f"{S} + {BIAS}, {CAUSAL}", 128, N, 0.5, ("wide_bias_of_heads",)),
    Timed("softcap full", score(128, 50.0), 128, N, 1.0),
    Timed("softcap far", f"{score(128, 20.0, 13.9)}, {CAUSAL}", 128, N, 0.5),
    Timed("softcap some", f"{score(128, 20.0, 4.6)}, {CAUSAL}", 128, N, 0.5),
    Timed("softcap padded", f"{score(128, 50.0)}, {PADDED}", 128, N, 0.5, ("ones",)),
    Timed("full", S, 128, N, 1.0),
    Timed("ragged", f"{S}, {DOCUMENTS}", 128, N, 0.0, ("eighths",)),
    Timed("bias causal", f"{S} + {BIAS}, {CAUSAL}", 128, N, 0.5, ("bias_of_heads",)),
    Timed("bias causal64", f"{score(64)} + {BIAS}, {CAUSAL}", 64, N, 0.5, ("bias_of_heads",)),
    Timed("bias of all", f"{S} + {BIAS.replace('h', '0')}", 128, N, 1.0, ("bias_of_heads",)),
    Timed("bias infinite", f"{S} + {BIAS}", 128, N, 1.0, ("bias_of_heads",)),
    Timed("bias least", f"{S} + {BIAS}", 128, N, 1.0, ("bias_of_heads",)),
    Timed("squares", f"{S}, mask={SQUARES}", 128, N, 0.0),
)
HELD = {"held_queries": True}
FIRST = HELD | {"dense_first": True}


def tile(block_m: int, block_n: int, *ahead: int, **changes) -> list[dict[str, object]]:
    """With maxima that come late, and the weights of as many columns ahead of the values before."""
    plain: dict[str, object] = {"block_m": block_m, "block_n": block_n}
    plain |= {"held_queries": False, "optimistic": True, "dense_first": False}
    return [plain | changes | {"ahead": x} for x in ahead or (0,)]


# Case -> what its rows change of the table's first configuration.
PLAN = {
    **dict.fromkeys(
        ("full", "causal", "alibi", "window1024", "prefix1024"),
        tile(192, 80, 0, 16, 32) + tile(128, 128, 0, 16, 32, 48, **HELD),
    ),
    **dict.fromkeys(
        ("full 2k", "full 16k", "causal 2k", "causal 16k"),
        tile(192, 80) + tile(128, 128, 32, 48, **HELD),
    ),
    **dict.fromkeys(
        ("full64", "causal64", "full64 2k", "full64 16k", "causal64 2k", "causal64 16k"),
        tile(192, 128, 0, 16, 32) + tile(128, 128, 32, **HELD),
    ),
    **dict.fromkeys(
        ("full256", "causal256", "full256 2k", "full256 16k", "causal256 2k", "causal256 16k"),
        tile(128, 64, 0, optimistic=False) + tile(128, 64, 0, 16, 32),
    ),
    "causal80": tile(192, 112, 0, 16, 32),
    **dict.fromkeys(("full96", "causal96"), tile(192, 96, 0, 16, 32) + tile(128, 128, 32)),
    "causal192": tile(128, 96, 0, 16, 32),
    **dict.fromkeys(
        ("documents", "ragged", "padded causal", "squares"),
        tile(128, 128, 0, 16, 32, 48) + tile(128, 128, 0, 32, **HELD),
    ),
    "dense mask": tile(128, 128, 0, 16, 32),
    **dict.fromkeys(
        ("bias", "bias causal", "bias of all", "bias infinite", "bias least"),
        tile(128, 128, 0, 16, 32, 48, **FIRST),
    ),
    **dict.fromkeys(
        ("bias64", "bias causal64"), tile(192, 128, 0, 16) + tile(128, 128, 0, 32, **FIRST)
    ),
    "bias96": tile(192, 80, 0, 16, 32),
    **dict.fromkeys(
        ("wide bias128", "wide bias causal"),
        tile(128, 96, optimistic=False)
        + tile(128, 96)
        + tile(128, 96, 0, 16, **HELD)
        + tile(128, 96, 0, 16, **FIRST)
        + tile(128, 64, 0, 32, **HELD)
        + tile(128, 64, 0, 32, **FIRST)
        + tile(128, 64, stages=3, **HELD)
        + tile(128, 64, stages=3, **FIRST)
        + tile(192, 64),
    ),
    "wide bias64": tile(128, 128)
    + tile(128, 128, 0, 32, **FIRST)
    + tile(192, 64)
    + tile(128, 64, stages=4, **FIRST),
    "wide bias96": tile(128, 96) + tile(192, 64) + tile(128, 64),
    "wide bias192": tile(128, 64) + tile(128, 64, optimistic=False) + tile(128, 32),
    "wide bias256": tile(128, 32, optimistic=False) + tile(128, 32),
    "bias192": tile(128, 80, 0, 16, 32),
}


def inputs(name: str, device: str):
    """(what it is, the share of the work that is left, spec, q, k, v, aux)."""
    cases = [x for x in timed() if (x.dim, x.length) == (128, N)]
    case = next(x for x in (*OWN, *cases) if x.name == name)
    spec, q, k, v, aux = made(case, device)
    share = case.share
    if name == "squares":
        at = torch.arange(N) // 64
        near = [(x[:, None] - x).abs() <= 2 for x in (at // 16, at % 16)]
        share = (near[0] & near[1]).double().mean().item()
    if name == "bias of all":  # which L2 holds better
        aux = [aux[0][:, :1].contiguous()]
    if name in ("bias infinite", "bias least"):
        above = torch.ones(N, N, dtype=torch.bool, device=device).triu(1)
        least = torch.finfo(torch.bfloat16).min if name == "bias least" else -math.inf
        aux = [aux[0].masked_fill(above, least)]
    if name == "ragged":
        random = torch.Generator().manual_seed(3)
        cuts = torch.randint(0, N, (TOKENS // N, 7), generator=random).sort(1).values
        ids = (torch.arange(N)[None, :, None] >= cuts[:, None]).sum(-1)
        lengths = torch.stack([torch.bincount(x, minlength=8) for x in ids]).double()
        share, aux = ((lengths / N) ** 2).sum(1).mean().item(), [ids.to(device)]
    return case, share, spec, q, k, v, aux


def keys(name: str) -> list[CudaKey]:
    _, _, spec, q, k, v, aux = inputs(name, "meta")
    first = keys_of(problem_of(spec, q, k, v, aux), layout_of(spec, aux))[0]
    return [replace(first, config=replace(first.config, **x)) for x in PLAN[name]]


def build(key: CudaKey) -> Built:
    """In a worker, so that the kernel lies in the cache on disk."""
    torch.set_num_threads(1)
    return load(key)


def error(spec, out: Tensor, q: Tensor, k: Tensor, v: Tensor, aux) -> float:
    """How far the first rows of the first head are from float64, where eager in 16 bits is 1."""
    q, k, v = q[:1, :1, :ROWS], k[:1, :1], v[:1, :1]
    exact, _ = attention(spec, q.double(), k.double(), v.double(), aux, ())
    eager, _ = attention(spec, q, k, v, aux, ())
    off = [(x.double() - exact).abs().max().item() for x in (out[:1, :1, :ROWS], eager)]
    return off[0] / off[1]


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
        said = [f"{c.block_m}x{c.block_n}"]
        said += [x for x in ("held_queries", "optimistic", "dense_first") if getattr(c, x)]
        said += [f"ahead {c.ahead}"] if c.ahead else []
        said += [] if built.healthy else [f"spills {built.spill_bytes}"]
        calls.append(lambda bound=bound: bound(q, k, v, aux))
        far = error(spec, found[0], q, k, v, aux)
        rows.append((" ".join(said), f"diff {off[0]:.1e} {off[1]:.1e} error {far:.2f}"))
    work = 4 * TOKENS * case.length * WIDTH * share
    for (said, off), ms in zip(rows, interleaved(calls, 25)):
        print(f"{name:15s}{said:32s}{1e3 * ms:8.1f} us {work / ms / 1e9:5.0f} TFLOP/s  {off}")
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
