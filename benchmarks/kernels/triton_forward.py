"""The Triton forward kernel on a GPU: every form against float64, then times against its peers.

    python benchmarks/kernels/triton_forward.py all      both, with worker processes for the builds
    python benchmarks/kernels/triton_forward.py check    numerics only
    python benchmarks/kernels/triton_forward.py time     times only

Prints a short table; everything goes to $OUT (default: benchmarks/results) as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# Inductor moves this directory when it first compiles; the workers' builds have to be found.
os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))

import torch
from torch import Tensor

from benchmarks.kernels.triton_cases import CAUSAL, Case, check_cases, time_cases
from fa3_compile.lower.choose import KernelBuildError
from fa3_compile.lower.kernels import triton_forward
from fa3_compile.lower.kernels.reference import attention
from fa3_compile.lower.tiles import tune_forward
from fa3_compile.lower.tiles.config import TritonConfig

OUT = Path(os.environ.get("OUT", Path(__file__).resolve().parents[1] / "results"))
WORKERS = max(1, min(14, (os.cpu_count() or 2) - 2))


def check(case: Case) -> dict:
    """The kernel's error against float64, beside that of the reference in the same dtype."""
    kernel = triton_forward.TritonForward()
    q, k, v, aux = case.inputs()
    problem, spec = case.problem(), case.parsed()
    record = {"case": case.name, "dim": case.dim, "dtype": case.dtype, "lengths": case.q_len}
    if reason := kernel.supports(problem):
        return record | {"ok": False, "why": reason}
    try:
        out, lse = kernel.run(problem, q, k, v, aux, [])
    except Exception as error:
        return record | {"ok": False, "why": f"{type(error).__name__}: {error}"[:600]}
    exact, exact_lse = attention(spec, q.double(), k.double(), v.double(), aux, [])
    eager, _ = attention(spec, q, k, v, aux, [])

    def distance(x: Tensor) -> float:
        return (x.double() - exact).nan_to_num(0.0).abs().max().item()

    same_nan = torch.equal(out.isnan(), exact.isnan())
    finite = torch.isfinite(exact_lse) & (exact_lse.abs() < 1e30)
    lse_error = (lse - exact_lse)[finite].abs().max().item() if finite.any() else 0.0
    ours, theirs = distance(out), distance(eager)
    least = 1e-5 if case.dtype == "fp32" else 1e-3
    ok = same_nan and ours <= 2 * theirs + least and lse_error < 2e-3
    return record | {
        "ok": ok, "error": ours, "eager": theirs, "lse": lse_error, "nan": same_nan,
    }  # fmt: skip


def configs_for(case: Case) -> list[TritonConfig]:
    """Candidates to time, by head dim, and the shipped one."""
    table = tune_forward.table_config(case.problem())
    return [table, *(x for x in _listed(case) if x != table)]


def _listed(case: Case) -> list[TritonConfig]:
    c = TritonConfig
    if case.dtype == "fp32":
        shapes = ((64, 32, 4, 2), (128, 32, 4, 2), (32, 64, 4, 2), (64, 64, 8, 2), (32, 32, 4, 2))
        return [c(*x) for x in shapes]
    if case.dim <= 64:
        tiles = ((128, 128, 4, 3), (128, 64, 4, 3), (128, 128, 8, 3), (128, 64, 4, 4))
        tiles += ((128, 128, 4, 2), (128, 128, 8, 2), (64, 128, 4, 3), (128, 32, 4, 4))
    elif case.dim <= 128:
        tiles = ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 3))
        tiles += ((128, 64, 8, 2), (64, 128, 4, 2), (64, 64, 4, 3), (128, 32, 4, 4))
    else:
        tiles = ((128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 2), (64, 64, 4, 2))
        tiles += ((64, 32, 4, 3), (64, 32, 4, 2), (128, 64, 8, 1))
    out = [c(*x) for x in tiles]
    if case.name in ("full", "causal"):
        out += [c(*x, tma=True) for x in tiles[:4]]
    return [x for x in out if x.shared_memory(case.problem()) < 240000]


@dataclass
class Runner:
    name: str
    call: Callable[[], object]
    times: list[float] = field(default_factory=list)


def against_flex(case: Case) -> bool:
    """Where FlexAttention is timed too: each of its kernels takes seconds to compile."""
    plain = case.name in ("full", "causal")
    return case.dtype == "bf16" and case.q_len == (16384 if plain else 8192)


def flex_runner(case: Case, q, k, v, aux) -> Runner:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    causal = lambda b, h, i, j: j <= i  # noqa: E731
    masks = {
        "causal": causal,
        "softcap": causal,
        "alibi": causal,
        "window1024": lambda b, h, i, j: (j <= i) & (i - j <= 1023),
        "padding": lambda b, h, i, j: aux[0][b, 0, 0, j],
        "documents8": lambda b, h, i, j: aux[0][b, i] == aux[0][b, j],
        "prefix1024": lambda b, h, i, j: (j <= i) | (j < 1024),
    }
    scores = {
        "softcap": lambda s, b, h, i, j: 20 * torch.tanh(s / 20),
        "alibi": lambda s, b, h, i, j: s + aux[0][0, h, 0, 0] * (j - i),
        "bias": lambda s, b, h, i, j: s + aux[0][0, h, i, j],
    }
    block_mask = None
    if mask := masks.get(case.flex):
        batch = case.batch if aux and case.flex != "alibi" else None
        block_mask = create_block_mask(mask, batch, None, case.q_len, case.kv_len)
    compiled = torch.compile(flex_attention, dynamic=False)
    score = scores.get(case.flex)
    return Runner("flex", lambda: compiled(q, k, v, score_mod=score, block_mask=block_mask))


def cudnn_runner(case: Case, q, k, v) -> Runner:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    causal = case.name == "causal"

    def call():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return Runner("cudnn", call)


def our_runners(case: Case, q, k, v, aux, built, failures: list[str]) -> list[Runner]:
    problem, runners = case.problem(), []
    table = tune_forward.table_config(problem)
    for config in [x for x in configs_for(case) if x in built]:
        try:
            bound = triton_forward.bind_config(problem, config, q, k, v, aux, [])
        except KernelBuildError as error:
            failures.append(f"{case.name} D{case.dim} {error}"[:300])
            continue
        outputs = triton_forward.outputs(problem, q, v)
        pointers = [q, k, v, *outputs, *(aux[i] for i in bound.aux)]
        label = f"{config.block_q},{config.block_kv},{config.num_warps},{config.num_stages}"
        label += ",tma" * config.tma + ",ws" * config.warp_specialize
        label += f",spill{bound.spills}" if bound.spills else ""
        runners.append(
            Runner(label + "*" * (config == table), lambda b=bound, p=pointers: b.launch(p))
        )
    return runners


def time_case(case: Case, rounds: int, built: set[TritonConfig]) -> dict:
    """Interleaved medians of every candidate and peer, in TFLOP/s of the work the mask leaves."""
    q, k, v, aux = case.inputs()
    failures: list[str] = []
    runners = our_runners(case, q, k, v, aux, built, failures)
    peers = [lambda: flex_runner(case, q, k, v, aux)] if against_flex(case) else []
    if case.name in ("full", "causal") and case.dtype == "bf16":
        peers.append(lambda: cudnn_runner(case, q, k, v))
    for make in peers:
        try:
            runner = make()
            runner.call()
            runners.append(runner)
        except Exception as error:
            failures.append(f"peer: {type(error).__name__}: {error}"[:200])
    for runner in runners:
        runner.call()
    torch.cuda.synchronize()
    for _ in range(rounds):
        events = []
        for runner in runners:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            runner.call()
            end.record()
            events.append((runner, start, end))
        torch.cuda.synchronize()
        for runner, start, end in events:
            runner.times.append(start.elapsed_time(end) / 1e3)
    work = 4 * case.batch * case.heads * case.q_len * case.kv_len * case.dim * case.density
    speeds = {r.name: work / statistics.median(r.times) / 1e12 for r in runners}
    return {
        "case": case.name, "dim": case.dim, "length": case.q_len, "dtype": case.dtype,
        "tflops": speeds, "failures": failures,
    }  # fmt: skip


def host_overhead(case: Case, calls: int = 2000) -> float:
    """Microseconds of host time a warm call takes; the GPU's queue never runs full."""
    kernel, problem = triton_forward.TritonForward(), case.problem()
    q, k, v, aux = case.inputs()
    kernel.run(problem, q, k, v, aux, [])
    total = 0.0
    for _ in range(calls // 100):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            kernel.run(problem, q, k, v, aux, [])
        total += time.perf_counter() - start
    return total / calls * 1e6


def write(name: str, records: list[dict]) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / name).write_text("".join(json.dumps(x) + "\n" for x in records))


def run_workers(job: str) -> list[dict]:
    """The job in WORKERS processes, each with its share of the cases."""
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, job, "--shard", f"{i}/{WORKERS}"], stdout=subprocess.PIPE
        )
        for i in range(WORKERS)
    ]
    lines = [line for p in processes for line in p.communicate()[0].decode().splitlines()]
    return [json.loads(x) for x in lines if x.startswith("{")]


def shard(items: list, which: str) -> list:
    i, n = map(int, which.split("/"))
    return items[i::n]


def check_all() -> None:
    start = time.time()
    records = run_workers("check-shard")
    write("triton_check.jsonl", records)
    bad = [x for x in records if not x["ok"]]
    print(f"check: {len(records)} of {len(check_cases())} cases, {len(bad)} wrong, "
          f"{time.time() - start:.0f} s")  # fmt: skip
    for x in bad[:12]:
        print("  ", json.dumps(x)[:700])


def time_all(rounds: int, budget: float, only: str) -> None:
    """Times each case as soon as its kernels are built; stops starting new ones at `budget` s."""
    start = time.time()
    cases = [x for x in time_cases() if only in f"{x.name} D{x.dim} {x.q_len} {x.dtype}"]
    # A worker that compiles for FlexAttention must not start workers of its own.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(WORKERS, mp_context=context)
    jobs: dict[tuple, Future] = {}
    for case in cases:
        for config in configs_for(case):
            key = (build_shape(case), config)
            if key not in jobs:
                jobs[key] = pool.submit(build, build_shape(case), config)
        if against_flex(case):
            jobs[case, None] = pool.submit(build_flex, case)
    records, built = [], {}
    for case in cases:
        keys = [(build_shape(case), x) for x in configs_for(case)]
        keys += [(case, None)] if against_flex(case) else []
        left = max(0.0, budget - (time.time() - start))
        wait([jobs[x] for x in keys], timeout=left)
        if time.time() - start > budget:
            print(f"stopped after {len(records)} of {len(cases)} cases")
            break
        built = {x[1] for x in keys if x[1] and jobs[x].result() == ""}
        record = time_case(case, rounds, built)
        record["failures"] += [f"{x[1]}: {jobs[x].result()}" for x in keys if jobs[x].result()]
        records.append(record)
        show(record)
        write("triton_times.jsonl", records)
    pool.shutdown(wait=False, cancel_futures=True)
    small = Case("causal", f"attention(score=0.125*s, mask={CAUSAL})", 1, 4, 4, 64, 64, 64)
    print(f"host time of a warm call: {host_overhead(small):.1f} us")
    print(f"times: {time.time() - start:.0f} s", flush=True)
    for process in list((pool._processes or {}).values()):
        process.terminate()


def show(record: dict) -> None:
    speeds = dict(record["tflops"])
    peers = "  ".join(f"{x} {speeds.pop(x):.0f}" for x in ("flex", "cudnn") if x in speeds)
    best = sorted(speeds.items(), key=lambda x: -x[1])
    shown = "  ".join(f"{n} {x:.0f}" for n, x in best[:5])
    table = next((f"{x:.0f}" for n, x in best if n.endswith("*")), "-")
    name = f"{record['case']:11} D{record['dim']:<3} {record['length']:>5} {record['dtype']}"
    print(f"{name} table {table:>4} | {shown} | {peers}", flush=True)
    for failure in record["failures"][:2]:
        print("    ", failure[:160])


def build_shape(case: Case) -> Case:
    """A small case with the same binary: the lengths are arguments of the kernel."""
    return replace(case, batch=1, q_len=1024, kv_len=1024)


def build(case: Case, config: TritonConfig) -> str:
    """Builds one kernel into Triton's cache on disk; "" or why it does not build."""
    try:
        q, k, v, aux = case.inputs()
        triton_forward.bind_config(case.problem(), config, q, k, v, aux, [])
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def build_flex(case: Case) -> str:
    """The same for FlexAttention, into Inductor's cache."""
    try:
        flex_runner(case, *case.inputs()).call()
        torch.cuda.empty_cache()
    except Exception as error:
        return f"flex: {type(error).__name__}: {error}"[:300]
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Triton forward kernel: numerics and times")
    parser.add_argument("job", choices=("all", "check", "time", "check-shard"))
    parser.add_argument("--shard", default="0/1", help="of the cases to check: index/count")
    parser.add_argument("--rounds", type=int, default=9, help="launches per median")
    parser.add_argument("--budget", type=float, default=240, help="seconds for the times")
    parser.add_argument("--only", default="", help='part of "name D128 8192 bf16"')
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/kernels/triton_forward.py needs a CUDA device")
    if args.job == "check-shard":
        for case in shard(check_cases(), args.shard):
            print(json.dumps(check(case)), flush=True)
    if args.job in ("all", "check"):
        check_all()
    if args.job in ("all", "time"):
        time_all(args.rounds, args.budget, args.only)


if __name__ == "__main__":
    main()
