"""The Triton backward on a GPU: every form's gradients against float64, then times.

    python benchmarks/kernels/triton_backward.py check             numerics, in worker processes
    python benchmarks/kernels/triton_backward.py time --budget 60  against cuDNN and FlexAttention

The cases are those of triton_cases.py; times are medians in TFLOP/s of the work the mask leaves.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from benchmarks.kernels import triton_forward as dev
from benchmarks.kernels.triton_cases import Case
from benchmarks.kernels.triton_forward import Runner
from fa3_compile.lower.choose import Problem
from fa3_compile.lower.kernels import triton_backward, triton_forward
from fa3_compile.lower.kernels.reference import attention_backward
from fa3_compile.lower.tiles.config import TritonConfig
from fa3_compile.lower.tiles.tune_backward import Configs, table_configs
from fa3_compile.runtime.op import BackwardInputs

OTHERS = {
    64: [
        ((64, 128, 8, 2), (64, 128, 4, 3)),
        ((32, 128, 8, 3), (128, 128, 8, 2)),
        ((64, 64, 4, 3), (64, 64, 4, 3)),
        ((64, 128, 4, 3), (128, 64, 4, 3)),
    ],
    128: [
        ((64, 128, 8, 3), (128, 64, 8, 4)),
        ((64, 64, 4, 3), (128, 32, 4, 3)),
        ((32, 128, 4, 2), (128, 64, 4, 2)),
        ((128, 128, 8, 1), (128, 32, 8, 4)),
    ],
    256: [
        ((64, 64, 4, 2), (128, 64, 8, 2)),
        ((32, 128, 8, 2), (128, 16, 8, 3)),
        ((64, 64, 8, 3), (128, 32, 4, 2)),
    ],
}


def needs_of(aux: list[Tensor]) -> list[bool]:
    return [True, True, True, *(x.is_floating_point() for x in aux)]


def problem_of(case: Case, aux: list[Tensor]) -> Problem:
    needs = needs_of(aux)
    dtypes = tuple(x.dtype for x in aux)
    return replace(
        case.problem(), aux_dtypes=dtypes, needs_grad=True, aux_needs_grad=tuple(needs[3:])
    )


def check(case: Case) -> dict:
    """The gradients' errors against float64, beside those of the reference in the same dtype."""
    kernel = triton_forward.TritonForward()
    q, k, v, aux = case.inputs()
    problem, spec, needs = problem_of(case, aux), case.parsed(), needs_of(aux)
    record = {"case": case.name, "dim": case.dim, "dtype": case.dtype, "lengths": case.q_len}
    if reason := kernel.supports_backward(problem):
        return record | {"ok": True, "why": reason}
    try:
        out, lse = kernel.run(problem, q, k, v, aux, [])
        dout, dlse = torch.randn_like(out), torch.randn_like(lse)
        given = BackwardInputs(dout, dlse, q, k, v, out, lse, aux, [], needs)
        found = kernel.run_backward(problem, given)
    except Exception as error:
        return record | {"ok": False, "why": f"{type(error).__name__}: {error}"[:600]}
    wide = [x.double() if x.is_floating_point() else x for x in aux]
    exact = attention_backward(
        spec, dout.double(), dlse, q.double(), k.double(), v.double(), wide, [], needs
    )
    eager = attention_backward(spec, dout, dlse, q, k, v, aux, [], needs)
    ok, errors = True, {}
    names = ["dq", "dk", "dv", *(f"aux{i}" for i in range(len(aux)))]
    for name, x, y, z in zip(names, *((*g[:3], *g[3]) for g in (found, exact, eager))):
        if x is None:
            continue
        ours, theirs = ((g.double() - y).nan_to_num(0.0).abs().max().item() for g in (x, z))
        least = (1e-5 if case.dtype == "fp32" else 4e-3) * (1 + y.nan_to_num(0.0).abs().max())
        fine = torch.equal(x.isnan(), y.isnan()) and ours <= 2 * theirs + float(least)
        ok &= fine
        errors[name] = [ours, theirs, fine]
    return record | {"ok": bool(ok), "errors": errors}


def shard_cases(which: str) -> list[Case]:
    cases = [x for x in dev.check_cases() if x.dtype != "fp32" or x.dim <= 128]
    return dev.shard(cases[::2], which)


def check_all(budget: float) -> None:
    start = time.time()
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "check-shard", "--shard", f"{i}/{dev.WORKERS}",
             "--budget", str(budget)],
            stdout=subprocess.PIPE,
        )
        for i in range(dev.WORKERS)
    ]  # fmt: skip
    lines = [line for p in processes for line in p.communicate()[0].decode().splitlines()]
    records = [json.loads(x) for x in lines if x.startswith("{")]
    dev.write("triton_backward_check.jsonl", records)
    bad = [x for x in records if not x["ok"]]
    declined = [x for x in records if x["ok"] and "why" in x]
    count = len(shard_cases("0/1"))
    print(f"check: {len(records)} of {count} cases, {len(bad)} wrong, {len(declined)} declined, "
          f"{time.time() - start:.0f} s")  # fmt: skip
    for x in [*bad, *declined][:16]:
        print("  ", json.dumps(x)[:600], flush=True)


def configs_for(case: Case) -> list[Configs]:
    table = table_configs(problem_of(case, []))
    found = [table]
    if case.name == "causal" and case.q_len >= 8192:
        for keys, queries in OTHERS[case.dim]:
            found.append(Configs(TritonConfig(*keys), TritonConfig(*queries)))
    return found


def prepared(case: Case):
    kernel = triton_forward.TritonForward()
    q, k, v, aux = case.inputs()
    problem = problem_of(case, aux)
    out, lse = kernel.run(problem, q, k, v, aux, [])
    dout, needs = torch.randn_like(out), needs_of(aux)
    return problem, BackwardInputs(dout, None, q, k, v, out, lse, aux, [], needs)


def our_runners(case: Case) -> list[Runner]:
    problem, given = prepared(case)
    runners = []
    for i, configs in enumerate(configs_for(case)):
        launches = triton_backward.bind(problem, configs, given)
        if i == 0:
            runners.append(
                Runner("table", lambda x=launches: triton_backward.compute(problem, x, given))
            )
        tensors = triton_backward.tensors_of(problem, given)
        for name, launch in launches.items():
            config = configs.keys if name == "key_blocks" else configs.queries
            label = f"{name[:3]}:{config.block_q},{config.block_kv},{config.num_warps},"
            label += f"{config.num_stages}" + (f",spill{launch.spills}" if launch.spills else "")
            runners.append(Runner(label, lambda n=launch, t=tensors: n(t)))
    return runners


def peer(case: Case, forward) -> Runner:
    """The backward of a torch function of (q, k, v, aux)."""
    q, k, v, aux = case.inputs()
    leaves = [x.requires_grad_() for x in (q, k, v, *aux) if x.is_floating_point()]
    runner = forward(case, q, k, v, *([aux] if forward is dev.flex_runner else []))
    out = runner.call()
    dout = torch.randn_like(out)
    wanted = leaves if case.name == "bias" else leaves[:3]

    def call():
        return torch.autograd.grad(out, wanted, dout, retain_graph=True)

    return Runner(runner.name, call)


def time_cases() -> list[Case]:
    make = dev._timed
    return [
        make("causal", 128, 16, 1, 16384, 0.5),
        make("causal", 64, 32, 2, 8192, 0.5),
        make("causal", 256, 8, 2, 8192, 0.5),
        make("full", 128, 16, 4, 4096, 1.0),
        make("softcap", 128, 16, 2, 8192, 0.5),
        make("alibi", 128, 16, 2, 8192, 0.5),
        make("window1024", 128, 16, 2, 8192, 1024 / 8192 - 0.5 / 64),
        make("bias", 128, 16, 2, 4096, 1.0),
        make("documents8", 128, 16, 2, 8192, 1 / 8),
        make("prefix1024", 128, 16, 2, 8192, 0.5 + 0.5 / 64),
    ]


def uses_flex(case: Case) -> bool:
    return case.name not in ("full", "documents8", "prefix1024") and case.dim == 128


def build(case: Case, index: int) -> str:
    """Builds one set of kernels, or FlexAttention's (-1), into the caches on disk."""
    try:
        if index < 0:
            peer(case, dev.flex_runner).call()
        else:
            small = dev.build_shape(case)
            problem, given = prepared(small)
            triton_backward.bind(problem, configs_for(case)[index], given)
        torch.cuda.empty_cache()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def time_all(budget: float, rounds: int) -> None:
    start = time.time()
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    pool = ProcessPoolExecutor(dev.WORKERS, mp_context=multiprocessing.get_context("spawn"))
    cases = time_cases()
    jobs = {c: [pool.submit(build, c, i) for i in range(len(configs_for(c)))] for c in cases}
    flex = {c: pool.submit(build, c, -1) for c in cases if uses_flex(c)}
    records = []
    for case in cases:
        left = max(0.0, budget - (time.time() - start))
        wait([*jobs[case], *([flex[case]] if case in flex else [])], timeout=left)
        if time.time() - start > budget:
            print(f"stopped after {len(records)} of {len(cases)} cases")
            break
        try:
            records.append(time_case(case, rounds, flex.get(case)))
            dev.write("triton_backward_times.jsonl", records)
        except Exception as error:
            print(case.name, case.dim, f"{type(error).__name__}: {error}"[:400], flush=True)
        torch.cuda.empty_cache()
    pool.shutdown(wait=False, cancel_futures=True)
    print(f"times: {time.time() - start:.0f} s", flush=True)
    for process in list((pool._processes or {}).values()):
        process.terminate()


def time_case(case: Case, rounds: int, flex) -> dict:
    runners = our_runners(case)
    if flex is not None and flex.done():
        if flex.result():
            print("   flex:", flex.result()[:200])
        else:
            runners.append(peer(case, dev.flex_runner))
    if case.name in ("full", "causal"):
        runners.append(peer(case, dev.cudnn_runner))
    for runner in runners:
        runner.call()
    torch.cuda.synchronize()
    for _ in range(rounds):
        for runner in runners:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            runner.call()
            end.record()
            torch.cuda.synchronize()
            runner.times.append(begin.elapsed_time(end))
    work = 10 * case.batch * case.heads * case.q_len * case.kv_len * case.dim * case.density
    print(f"{case.name} D{case.dim} {case.q_len}", end=":", flush=True)
    times = {}
    for runner in runners:
        ms = times[runner.name] = statistics.median(runner.times)
        whole = runner.name in ("table", "flex", "cudnn")
        print(
            f"  {runner.name} {ms:.2f}ms" + (f" {work / ms / 1e9:.0f}TF" if whole else ""), end=""
        )
    print(flush=True)
    return {"case": case.name, "dim": case.dim, "length": case.q_len, "ms": times}


def main() -> None:
    parser = argparse.ArgumentParser(description="Triton backward kernels: numerics and times")
    parser.add_argument("job", choices=("check", "time", "check-shard"))
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/kernels/triton_backward.py needs a CUDA device")
    if args.job == "check":
        check_all(args.budget)
    elif args.job == "time":
        time_all(args.budget, args.rounds)
    else:
        start = time.time()
        for case in shard_cases(args.shard):
            if time.time() - start > args.budget:
                break
            print(json.dumps(check(case)), flush=True)


if __name__ == "__main__":
    main()
