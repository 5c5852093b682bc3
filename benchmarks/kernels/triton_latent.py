"""Absorbed latent attention (DeepSeek-V2, section 2.1) with the Triton kernel: 128 query heads read
one head of keys, 576 wide, of which the first 512 columns are the values.

    python benchmarks/kernels/triton_latent.py JOB

check    numbers of wide heads against float64
time     decoding and a prompt, against eager and SDPA
tiles    other tiles and parts for the same
model    DeepSeek's step through torch.compile, and decoding of grouped heads 128 wide

on a GPU. Full numbers go to $OUT (default: the current directory).
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.sm90_decode import copy_bandwidth, replayed
from fa3_compile.backend import fa3
from fa3_compile.lower.choose import KernelBuildError, Problem
from fa3_compile.lower.kernels import triton_forward
from fa3_compile.lower.kernels.reference import attention
from fa3_compile.lower.kernels.triton_forward import TritonForward, bind_config
from fa3_compile.lower.tiles import tune_forward
from fa3_compile.lower.tiles.config import TritonConfig
from fa3_compile.report import collect
from fa3_compile.spec.attention import AttentionSpec

OUT = Path(os.environ.get("OUT", "."))
HEADS, DIM, V_DIM, SCALE = 128, 576, 512, 576**-0.5
FULL = f"attention(score={SCALE!r}*s)"
CAUSAL = f"attention(score={SCALE!r}*s, mask=(kv - q <= 0))"
CACHES = tuple((batch, length) for batch in (1, 16, 64) for length in (8192, 32768))
WORKERS = 8


@dataclass(frozen=True)
class Case:
    """(B, H, Hkv, Sq, Skv, D, Dv) of a spec; `latent`: V is a part of K."""

    spec: str
    shape: tuple[int, ...]
    latent: bool = False
    dtype: torch.dtype = torch.bfloat16
    aux: tuple[str, ...] = ()


DECODE, PROMPT = (3, 128, 1, 1, 3000, 576, 512), (2, 16, 1, 300, 300, 576, 512)
PLAIN, LOWER = "score=0.05*s", "score=0.05*s, mask=(kv - q <= 0)"
BIAS = "score=0.05*s + 0.05*load(0, b, h, 0, kv), aux=[float]"
PADDING = (
    "score=0.05*s, mask=(load(0, b, 0, 0, kv) != 0), dead=score, fill=-3.4028234663852886e38,"
    " aux=[bool]"
)
WINDOW = (
    "score=20.0*tanh(0.0025*s), mask=(kv - q - Skv + Sq <= 0) & (q + Skv - Sq - kv <= 999),"
    " sinks=[load(0, h)], aux=[float]"
)
CASES = [
    Case(PLAIN, DECODE, latent=True),
    Case(PLAIN, DECODE),
    Case(PLAIN, (2, 16, 1, 1, 4096, 576, 512), latent=True, dtype=torch.float16),
    Case(PLAIN, (2, 32, 1, 2, 2049, 576, 512), latent=True),
    Case(BIAS, (2, 128, 1, 1, 3000, 512, 512), latent=True, aux=("bias",)),
    Case(PADDING, DECODE, latent=True, aux=("padding",)),
    Case(WINDOW, (2, 128, 1, 4, 3000, 576, 512), latent=True, aux=("sinks",)),
    Case(LOWER, PROMPT, latent=True),
    Case(f"{LOWER}, out_order=bqhd", PROMPT),
    Case(LOWER, PROMPT, dtype=torch.float32),
    Case(LOWER, (2, 4, 4, 300, 300, 320, 320)),
    Case(LOWER, (2, 4, 2, 300, 300, 384, 384)),
    Case(PLAIN, (2, 4, 4, 200, 333, 264, 520)),
    Case(PLAIN, (2, 4, 4, 200, 333, 768, 640)),
    Case(LOWER, (1, 4, 4, 200, 333, 1024, 1024)),
    Case(PLAIN, (3, 32, 8, 1, 5000, 128, 128)),
    Case("score=0.1*s, mask=(kv - q - Skv + Sq <= 0)", (2, 32, 8, 5, 5000, 64, 64)),
    Case(PADDING, (3, 8, 8, 1, 5000, 256, 256), aux=("padding",)),
]


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Queries, keys, values and what the spec captures."""
    b, h, kv_h, q_len, kv_len, dim, v_dim = case.shape
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator).to(case.dtype)

    q, k = normal(b, q_len, h, dim).transpose(1, 2), normal(b, kv_h, kv_len, dim)
    v = k[..., :v_dim] if case.latent else normal(b, kv_h, kv_len, v_dim)
    lengths = torch.arange(b, device="cuda").view(b, 1, 1, 1) * kv_len // b
    made = {
        "bias": lambda: normal(b, h, q_len, kv_len),
        "sinks": lambda: normal(h).float(),
        "padding": lambda: torch.arange(kv_len, device="cuda") < lengths,
    }
    return q, k, v, [made[x]() for x in case.aux]


def problem_of(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, aux=()) -> Problem:
    capability = torch.cuda.get_device_capability()
    b, h, q_len, dim = q.shape
    shape = (b, h, k.shape[1], q_len, k.shape[2], dim, v.shape[3])
    dtypes = tuple(x.dtype for x in aux)
    return Problem(spec, q.dtype, q.device, capability, *shape, aux_dtypes=dtypes)


def checked(number: int) -> str:
    """A line about one case; it begins with "wrong" where the kernel is."""
    case = CASES[number]
    spec = AttentionSpec.parse(f"attention({case.spec})")
    q, k, v, aux = tensors(case)
    problem = problem_of(spec, q, k, v, aux)
    call = TritonForward().bound(problem, q, k, v, aux, ())
    if call is None:
        return f"wrong: not built: {case}"
    exact, exact_lse = attention(spec, q.double(), k.double(), v.double(), aux, ())
    rounded, _ = attention(spec, q, k, v, aux, ())
    allowed = 2 * _distance(rounded, exact)
    allowed += 4 * torch.finfo(case.dtype).eps * exact.abs().max().item()
    worst, worst_lse, runs = 0.0, 0.0, []
    for _ in range(3):
        out, lse = call(q, k, v, aux)
        finite = torch.isfinite(exact_lse) & (exact_lse.abs() < 1e30)
        worst = max(worst, _distance(out, exact))
        worst_lse = max(worst_lse, _distance(lse[finite], exact_lse[finite]))
        runs.append(out.clone())
    same = all(torch.equal(runs[0], x) for x in runs)
    right = worst <= allowed and worst_lse < 1e-2 and same and not runs[0].isnan().any()
    kernels = [(x.keeps.n_regs, x.keeps.n_spills) for x in getattr(call, "launches", ())]
    return (
        f"{'right' if right else 'wrong'}: {worst:.2e} of {allowed:.2e}, LSE {worst_lse:.1e}, same"
        f" bits {same}, (registers, spills) {kernels}, {case.shape} {case.dtype}"
        f" {'V in K' if case.latent else ''} {case.spec[:60]}"
    )


def _distance(x: Tensor, exact: Tensor) -> float:
    return (x.double() - exact).abs().max().item() if x.numel() else 0.0


def check() -> None:
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        lines = [*pool.map(checked, range(len(CASES)))]
    lines += [model_line()]
    print(*sorted(lines, reverse=True), sep="\n")
    print(f"{sum(x.startswith('right') for x in lines)} of {len(lines)} right", flush=True)


def decode_step(q, q_rotary, latent, rotary, end: int) -> Tensor:
    """As DeepSeek's inference code has it."""
    scores = torch.einsum("bshc,btc->bsht", q, latent[:, :end])
    scores = (scores + torch.einsum("bshr,btr->bsht", q_rotary, rotary[:, :end])) * SCALE
    weights = scores.softmax(dim=-1, dtype=torch.float32).type_as(q)
    return torch.einsum("bsht,btc->bshc", weights, latent[:, :end])


def model_line() -> str:
    """The same through torch.compile, and which kernel its report names."""
    shapes = ((4, 1, 128, 512), (4, 1, 128, 64), (4, 4096, 512), (4, 4096, 64))
    inputs = [torch.randn(x, device="cuda").bfloat16() for x in shapes]
    compiled = torch.compile(decode_step, backend=fa3)
    worst = 0.0
    with torch.no_grad(), collect() as report:
        for end in (3000, 3001):
            exact = decode_step(*(x.double() for x in inputs), end=end)
            error = _distance(decode_step(*inputs, end=end), exact)
            worst = max(worst, _distance(compiled(*inputs, end=end), exact) / error)
    kernels = [x.kernel or x.reason for x in report.regions]
    right = worst < 3 and len(report.fused) == len(kernels)
    return f"{'right' if right else 'wrong'}: compiled, {worst:.2f} of eager's error, {kernels}"


def eager(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Queries [B, H, Sq, D] on one head of keys, as two large products."""
    b, h, q_len, dim = q.shape
    scores = (q.reshape(b, h * q_len, dim) @ k[:, 0].mT).view(b, h, q_len, -1) * SCALE
    if causal:
        mask = torch.ones(q_len, k.shape[2], dtype=torch.bool, device="cuda").triu(1)
        scores = scores.masked_fill(mask, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights.view(b, h * q_len, -1) @ v[:, 0]).view(b, h, q_len, -1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Whatever backend takes it; in decoding the heads are its queries."""
    if q.shape[2] == 1:
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=SCALE).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=SCALE, enable_gqa=True)


def cache(batch: int, length: int, q_len: int = 1, apart: bool = False):
    """Sets of (q, k, v), more than L2 holds."""
    size = 2 * batch * length * DIM
    sets = max(1, min(8, 2**28 // size))
    made = []
    for _ in range(sets):
        q = torch.randn(batch, q_len, HEADS, DIM, device="cuda").bfloat16().transpose(1, 2)
        k = torch.randn(batch, 1, length, DIM, device="cuda").bfloat16()
        v = k[..., :V_DIM]
        made.append((q, k, v.clone() if apart else v))
    return made


def measured(call: Callable[..., object], sets) -> float:
    """Milliseconds, or NaN where it does not run."""
    try:
        return replayed(lambda i: call(*sets[i]), len(sets), 6)
    except (RuntimeError, KernelBuildError) as error:
        print("   ", type(error).__name__, str(error).splitlines()[0][:150])
        return float("nan")


def rates(batch: int, q_len: int, length: int, causal: bool, ms: float) -> tuple[float, float]:
    """(GB/s of the latent cache, TFLOP/s of what the mask leaves)."""
    operations = 2 * batch * HEADS * q_len * length * (DIM + V_DIM) / (2 if causal else 1)
    return 2 * batch * length * DIM / ms / 1e6, operations / ms / 1e9


def time() -> None:
    print(torch.cuda.get_device_name(), f"copy {copy_bandwidth():.0f} GB/s")
    with open(OUT / "latent.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(
            ["batch", "queries", "keys", "contender", "ms", "GB/s of the cache", "TFLOP/s"]
        )
        shapes = [(b, 1, n, False) for b, n in CACHES] + [(1, 2048, 2048, True)]
        for batch, q_len, length, causal in shapes:
            spec = AttentionSpec.parse(CAUSAL if causal else FULL)

            def ours(q, k, v, spec=spec):
                return TRITON.run(problem_of(spec, q, k, v), q, k, v, [], ())

            joint, apart = (cache(batch, length, q_len, x) for x in (False, True))
            contenders = {
                "V in K": (ours, joint),
                "V apart": (ours, apart),
                "eager": (lambda q, k, v, c=causal: eager(q, k, v, c), joint),
                "SDPA": (lambda q, k, v, c=causal: sdpa(q, k, v, c), joint),
            }
            line = f"B{batch} {q_len} x {length}:"
            for name, (call, sets) in contenders.items():
                ms = measured(call, sets)
                found = rates(batch, q_len, length, causal, ms)
                table.writerow([batch, q_len, length, name, ms, *found])
                line += f"  {name} {1e3 * ms:.0f} us {found[0]:.0f} GB/s {found[1]:.0f} TFLOP/s;"
            print(line, flush=True)
            del joint, apart


TRITON = TritonForward()
CHOSEN = TritonConfig(64, 64, 8, 2, tma=True, packed=True)
# By query heads.
TILES = {
    128: [
        CHOSEN,
        TritonConfig(64, 64, 8, 2, packed=True),
        TritonConfig(64, 32, 8, 4, tma=True, packed=True),
        TritonConfig(64, 64, 8, 2, tma=True, packed=True, lazy_rescale=True),
    ],
    16: [
        CHOSEN,
        TritonConfig(16, 64, 8, 2, packed=True),
        TritonConfig(16, 32, 8, 2, packed=True),
        TritonConfig(16, 64, 4, 2, packed=True),
        TritonConfig(16, 32, 4, 3, packed=True),
    ],
}
PARTS = {
    (1, 8192): (16, 24, 32, 48, 64),
    (1, 32768): (22, 33, 44, 66, 132),
    (16, 8192): (1, 2, 4, 8),
}


def tiles() -> None:
    """Each tile on 16 caches of 8k; then parts."""
    for heads, configs in TILES.items():
        sets = [(q[:, :heads], k, v) for q, k, v in cache(16, 8192)]
        problem = problem_of(AttentionSpec.parse(FULL), *sets[0])
        print(f"{heads} heads, B16 1 x 8192")
        for config in configs:
            _variant(problem, config, sets, heads, config)
    spec, chosen = AttentionSpec.parse(FULL), triton_forward.part_count
    for (batch, length), counts in PARTS.items():
        sets = cache(batch, length)
        taken = chosen(problem_of(spec, *sets[0]), 2 * batch, length)
        print(f"parts, B{batch} {length} keys; {taken} are taken")
        for count in counts:
            triton_forward.part_count = lambda *_, n=count: n  # type: ignore[assignment]
            _variant(problem_of(spec, *sets[0]), CHOSEN, sets, HEADS, f"{count} parts")


def _variant(problem: Problem, config: TritonConfig, sets, heads: int, name: object) -> None:
    q, k, v = sets[0]
    try:
        bound = bind_config(problem, config, q, k, v, [], ())
    except KernelBuildError as error:
        print(f"  {name}: {str(error)[-100:]}")
        return
    assert bound.launches is not None
    launches = bound.launches
    ms = measured(lambda q, k, v: launches(q, k, v, []), sets)
    causal = problem.spec.has_mask
    gigabytes, teraflops = rates(problem.batch, problem.q_len, problem.kv_len, causal, ms)
    facts = launches.launches[0].keeps
    teraflops *= heads / HEADS
    print(
        f"  {name}: {1e3 * ms:.1f} us, {gigabytes:.0f} GB/s, {teraflops:.0f} TFLOP/s",
        f"{facts.n_regs} registers, {facts.n_spills} spills, {facts.metadata.shared} bytes",
        flush=True,
    )


def model() -> None:
    """One step of DeepSeek's inference code, with its caches of latents and of rotary keys."""
    ways = {
        "eager": decode_step,
        "inductor": torch.compile(decode_step),
        "fa3": torch.compile(decode_step, backend=fa3),
    }
    for batch, length in ((1, 32768), (16, 8192)):
        shapes = (batch, 1, HEADS, 512), (batch, 1, HEADS, 64), (batch, length, 512)
        inputs = [torch.randn(x, device="cuda").bfloat16() for x in (*shapes, (batch, length, 64))]
        with torch.no_grad():
            times = {name: measured(x, [(*inputs, length)]) for name, x in ways.items()}
        shown = "; ".join(f"{name} {1e3 * ms:.0f} us" for name, ms in times.items())
        print(f"B{batch} {length} keys: {shown}", flush=True)
    print("32 heads on 8 of keys, D128, the Triton kernel: packed and split, and neither")
    chosen = triton_forward.part_count
    for batch, length in ((1, 32768), (16, 8192)):
        q = torch.randn(batch, 32, 1, 128, device="cuda").bfloat16()
        k, v = (torch.randn(batch, 8, length, 128, device="cuda").bfloat16() for _ in range(2))
        problem = problem_of(AttentionSpec.parse("attention(score=0.088*s)"), q, k, v)
        config = tune_forward.table_config(problem)
        for tile, count in ((config, chosen), (replace(config, packed=False), lambda *_: 1)):
            triton_forward.part_count = count
            bound = bind_config(problem, tile, q, k, v, [], ())
            assert bound.launches is not None
            ms = measured(bound.launches, [(q, k, v, [])])
            rate = 4 * batch * 8 * length * 128 / ms / 1e6
            print(f"  B{batch} {length} keys: {1e3 * ms:.0f} us, {rate:.0f} GB/s", flush=True)
        triton_forward.part_count = chosen


if __name__ == "__main__":
    {"check": check, "time": time, "tiles": tiles, "model": model}[sys.argv[1]]()
