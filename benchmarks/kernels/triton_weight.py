"""Triton kernels with a factor after the softmax, and gradients of tables, on a GPU.

    python benchmarks/kernels/triton_weight.py JOB

check   masks bit by bit, gradients, repetitions
time    dropout, tables: beside the same without
lists   documents, padding: with lists and without
"""

from __future__ import annotations

import argparse
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import fa3_compile.runtime.op  # noqa: F401  defines the operators
from fa3_compile.lower.choose import KernelBuildError, Problem
from fa3_compile.lower.kernels import triton_backward, triton_captured, triton_forward
from fa3_compile.lower.kernels.reference import attention_backward
from fa3_compile.lower.printers.philox import uniform
from fa3_compile.lower.render import render_blocks
from fa3_compile.lower.tiles.config import TritonConfig
from fa3_compile.lower.tiles.tune_backward import Configs, table_configs
from fa3_compile.runtime.op import BackwardInputs
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.expr import load
from fa3_compile.spec.forms import dropout_weight
from fa3_compile.spec.text import text

CAUSAL = "mask=kv <= q, dead=nan"
WINDOW = "mask=(kv <= q) & (q - kv <= 70)"
DROP = "weight=" + text(dropout_weight(load(0, 0), 0.1))
MIN = "-3.4028234663852886e38"
BUCKET = "max(min(kv - q, 31), -31) + 31"
# name -> (fields, captured tensors, rows beyond Skv)
FORMS = {
    "dropout": (f"score=0.1*s, {DROP}", ("seed",), 0),
    "dropout causal": (f"score=0.1*s, {CAUSAL}, {DROP}", ("seed",), 0),
    "dropout softcap": (f"score=9.0*tanh(0.01*s), {CAUSAL}, {DROP}", ("seed",), 0),
    "dropout least": (f"score=0.1*s, {WINDOW}, dead=score, fill=0.1*s + {MIN}, {DROP}", ("seed",),
                      200),
    "dropout bias": (f"score=0.1*s + load(1, 0, h, q, kv), {DROP}", ("seed", "bias"), 0),
    "gate": ("score=0.1*s, weight=load(0, 0, h, q, kv)", ("bias",), 0),
    "table": (f"score=0.1*s + load(0, h, {BUCKET}), {CAUSAL}", ("table",), 0),
    "table full": (f"score=0.1*s + load(0, h, {BUCKET})", ("table",), 0),
    "swin": ("score=0.1*s + load(0, h, load(1, q, kv))", ("table", "index"), 0),
    "decomposed": ("score=0.1*s + load(0, b, h, q, floordiv(kv, 16))", ("decomposed",), 0),
    "twice": ("score=0.1*s + load(0, 0, h, q, kv) + load(0, 0, h, kv, q)", ("bias",), 0),
    "documents": ("score=0.1*s, mask=(load(0, b, q) == load(0, b, kv)) & (kv <= q)", ("documents",),
                  0),
    "padding": ("score=0.1*s, mask=load(0, b, kv) != 0, dead=zero", ("padding",), 0),
    "fill by key": (f"score=0.1*s, {WINDOW}, dead=score, fill=-kv*0.01", (), 200),
    "fill with s": (f"score=0.1*s, {WINDOW}, dead=score, fill=0.1*s - 99.0", (), 200),
}  # fmt: skip
KINDS = {"seed": "int", "index": "int", "documents": "int", "padding": "bool"}


def spec_of(form: str) -> AttentionSpec:
    fields, aux, _ = FORMS[form]
    kinds = f", aux=[{', '.join(KINDS.get(x, 'float') for x in aux)}]" if aux else ""
    return AttentionSpec.parse(f"attention({fields}{kinds})")


def made(form: str, batch, heads, kv_heads, length, dim, dtype):
    """(problem, q, k, v, aux, needs)"""
    _, names, beyond = FORMS[form]
    generator = torch.Generator("cuda").manual_seed(len(form) + dim)

    def normal(*size):
        return torch.randn(size, device="cuda", generator=generator).to(dtype)

    q_len, kv_len = length + beyond, length
    q = normal(batch, q_len, heads, dim).transpose(1, 2)
    k = normal(batch, kv_len, kv_heads, dim).transpose(1, 2)
    v = normal(batch, kv_len, kv_heads, dim).transpose(1, 2)
    aux: list[Tensor] = []
    for name in names:
        match name:
            case "seed":
                aux.append(torch.tensor([2**40 + 7], device="cuda"))
            case "bias":
                aux.append(normal(1, heads, q_len, kv_len))
            case "table":
                aux.append(normal(heads, 63).float())
            case "index":
                aux.append(torch.randint(63, (q_len, kv_len), device="cuda", generator=generator))
            case "documents":
                aux.append((torch.arange(kv_len, device="cuda") * 8 // kv_len).expand(batch, -1))
            case "padding":
                ends = torch.arange(1, batch + 1, device="cuda").view(-1, 1) * kv_len // batch
                aux.append(torch.arange(kv_len, device="cuda") < ends)
            case "decomposed":
                aux.append(normal(batch, heads, q_len, -(-kv_len // 16)))
    needs = [True] * 3 + [x.is_floating_point() for x in aux]
    problem = Problem(
        spec_of(form), dtype, q.device, torch.cuda.get_device_capability(), batch, heads, kv_heads,
        q_len, kv_len, dim, dim, tuple(x.dtype for x in aux), True, tuple(needs[3:]),
    )  # fmt: skip
    return problem, q, k, v, aux, needs


def check_masks() -> str:
    """Out and dV of uniform weights 2**-12 and p = 1/2, where every product is exact."""
    kernel, length, dim = triton_forward.TritonForward(), 4096, 128
    spec = AttentionSpec(weight=dropout_weight(load(0, 0), 0.5), aux=("int",))
    seed = torch.tensor([-(2**50) - 3], device="cuda")
    q = torch.zeros(1, 2, length, dim, device="cuda", dtype=torch.bfloat16)
    chosen = torch.randperm(length, device="cuda")[:dim]
    v = torch.zeros_like(q)
    v[:, :, chosen, torch.arange(dim, device="cuda")] = 1
    lengths = (1, 2, 2, length, length, dim, dim)
    capability = torch.cuda.get_device_capability()
    problem = Problem(spec, q.dtype, q.device, capability, *lengths, (torch.int64,), True, (False,))
    out, lse = kernel.run(problem, q, q, v, [seed], [])
    h, rows = torch.arange(2, device="cuda").view(1, 2, 1, 1), torch.arange(length, device="cuda")
    kept = uniform(seed, 0, h, rows.view(-1, 1), rows.view(1, -1)) >= 0.5
    forward = torch.equal(out != 0, kept[..., chosen].expand(out.shape))
    dout = torch.zeros_like(q)
    dout[:, :, chosen, torch.arange(dim, device="cuda")] = 1
    needs = [True, True, True, False]
    given = BackwardInputs(dout, None, q, q, v, out, lse, [seed], [], needs)
    _, _, dv, _ = kernel.run_backward(problem, given)
    assert dv is not None
    backward = torch.equal(dv != 0, kept[:, :, chosen].mT)
    rate = kept.double().mean().item()
    sigmas = abs(rate - 0.5) / (0.25 / kept.numel()) ** 0.5
    return f"masks: forward {forward}, backward {backward}, kept {rate:.6f} ({sigmas:.1f} sigma)"


def check(form: str, dim: int, dtype: torch.dtype, scratch: int) -> str:
    """What is wrong with the gradients, or with a second computation of them."""
    triton_captured.SCRATCH, render_blocks.WORTHWHILE = scratch, 0
    kernel = triton_forward.TritonForward()
    problem, q, k, v, aux, needs = made(form, 2, 4, 2, 384, dim, dtype)
    if reason := kernel.supports_backward(problem):
        return f"declined: {reason}"
    out, lse = kernel.run(problem, q, k, v, aux, [])
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    given = BackwardInputs(dout, dlse, q, k, v, out, lse, aux, [], needs)
    found = kernel.run_backward(problem, given)
    again = [kernel.run_backward(problem, given) for _ in range(8)]
    spec = problem.spec
    wide = [x.double() if x.is_floating_point() else x for x in aux]
    exact = attention_backward(
        spec, dout.double(), dlse, q.double(), k.double(), v.double(), wide, [], needs
    )
    eager = attention_backward(spec, dout, dlse, q, k, v, aux, [], needs)
    wrong = []
    flat = [[*x[:3], *x[3]] for x in (found, exact, eager)]
    for i, (x, y, z) in enumerate(zip(*flat)):
        if x is None or y is None or z is None:
            continue
        ours, theirs = ((g.double() - y).nan_to_num(0.0).abs().max().item() for g in (x, z))
        least = 4e-3 * (1 + y.nan_to_num(0.0).abs().max().item())
        if not (torch.equal(x.isnan(), y.isnan()) and ours <= 2 * theirs + least):
            wrong.append(f"{i}: {ours:.2e} beyond {theirs:.2e}")
        for other in again:
            if not torch.equal([*other[:3], *other[3]][i].nan_to_num(7.0), x.nan_to_num(7.0)):
                wrong.append(f"{i} is another the next time")
                break
    return "; ".join(wrong) or "ok"


def check_graph() -> str:
    """Replays of a CUDA graph that draws the seed: different masks, the same mask in backward."""
    text = str(AttentionSpec(weight=dropout_weight(load(0, 0), 0.5), aux=("int",)))
    q, k, v = (torch.randn(1, 2, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    v.requires_grad_()

    def step():
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device="cuda")
        out = torch.ops.fa3.attention(q, k, v, [seed], [], f"{text} #;kernels=triton")[0]
        [dv] = torch.autograd.grad(out, v, torch.ones_like(out))
        return seed, out, dv

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seed, out, dv = step()
    seen = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        both = [(out.double().sum() - (dv.double() * v.double()).sum()).abs().item()]
        seen.append((seed.item(), out.double().abs().sum().item(), *both))
    different = len({x[0] for x in seen}) == 3 and len({x[1] for x in seen}) == 3
    return f"CUDA graph: new masks {different}, linearity {max(x[2] for x in seen):.2e}"


def milliseconds(call) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


TIMED = [("table", 64), ("swin", 64), ("decomposed", 64), ("dropout causal", 64)]  # fmt: skip
FORWARD = {64: [(128, 64, 4, 3), (128, 128, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3)],
           128: [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 32, 8, 3)]}  # fmt: skip
BACKWARD = {64: [((64, 64, 4, 3), (128, 64, 4, 3)), ((64, 128, 8, 2), (128, 64, 8, 3)),
                 ((64, 64, 8, 2), (64, 64, 4, 3))],
            128: [((64, 128, 8, 3), (128, 64, 8, 3)), ((32, 128, 8, 2), (128, 32, 8, 3)),
                  ((64, 64, 4, 3), (64, 64, 4, 3)), ((64, 64, 8, 2), (64, 64, 8, 3))]}  # fmt: skip


def build(form: str, dim: int) -> str:
    try:
        time(form, dim, only_build=True)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def time(form: str, dim: int, only_build: bool = False, length: int = 2048) -> None:
    """Prints the times of a form's forward and backward by configuration."""
    heads = 2048 // dim
    problem, q, k, v, aux, needs = made(form, 4, heads, heads, length, dim, torch.bfloat16)
    labels = []
    for config in FORWARD[dim][: 2 if length > 2048 else None]:
        try:
            bound = triton_forward.bind_config(problem, TritonConfig(*config), q, k, v, aux, [])
        except KernelBuildError:
            labels.append(f"{config} does not fit")
            continue
        tensors = [q, k, v, *triton_forward.outputs(problem, q, v), *(aux[i] for i in bound.aux)]
        if not only_build:
            ms = milliseconds(lambda b=bound, t=tensors: b.launch(t))
            labels.append(f"{config} {ms:.2f} (spill {bound.spills})")
    out, lse = triton_forward.TritonForward().run(problem, q, k, v, aux, [])
    dout = torch.randn_like(out)
    given = BackwardInputs(dout, None, q, k, v, out, lse, aux, [], needs)
    listed = [Configs(TritonConfig(*x), TritonConfig(*y)) for x, y in BACKWARD[dim]][
        : 0 if length > 2048 else None
    ]
    for configs in [table_configs(problem), *listed]:
        launches = triton_backward.bind(problem, configs, given)
        if not only_build:
            labels.append(backward_times(problem, configs, launches, given))
    if not only_build:
        print(f"{form} D{dim} B4 S{length}:", *labels, sep="\n    ", flush=True)


def backward_times(problem, configs: Configs, launches, given: BackwardInputs) -> str:
    tensors = triton_backward.tensors_of(problem, given)
    whole = milliseconds(lambda: triton_backward.compute(problem, launches, given))
    each = [f"{n[:5]} {milliseconds(lambda x=x: x(tensors)):.2f}" for n, x in launches.items()]
    return f"bwd {whole:.2f} ({', '.join(each)}) {configs.keys} {configs.queries}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Dropout and tables in the Triton kernels")
    parser.add_argument("job", choices=("check", "time", "lists"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/kernels/triton_weight.py needs a CUDA device")
    pool = ProcessPoolExecutor(8, mp_context=get_context("spawn"))
    if args.job == "time":
        FORMS["plain causal"] = (f"score=0.1*s, {CAUSAL}", (), 0)
        cases = [*TIMED, ("plain causal", 64), ("plain causal", 128)]
        jobs = [pool.submit(build, *case) for case in TIMED]
        for case, job in zip(cases, [*jobs, None, None]):
            if job is not None and job.result():
                print(*case, job.result())
            time(*case)
        return
    if args.job == "lists":
        for form in ("documents", "padding"):
            for worthwhile in (2**20, 2**60):
                render_blocks.WORTHWHILE = worthwhile
                time(form, 128, length=4096)
        return
    bf16, fp16 = torch.bfloat16, torch.float16
    cases = [(f, d, bf16, 2**28) for f in FORMS for d in (64, 128)]
    cases += [("dropout causal", d, fp16, 2**28) for d in (64, 80, 256)]
    cases += [(f, 64, fp16, 2**19) for f in ("table", "table full", "swin", "decomposed", "twice")]
    jobs = [pool.submit(check, *case) for case in cases]
    print(check_masks(), flush=True)
    print(check_graph(), flush=True)
    results = [job.result() for job in jobs]
    for case, result in zip(cases, results):
        if result != "ok":
            print(*case, result, flush=True)
    print(f"gradients: {results.count('ok')} of {len(results)} right and bitwise repeatable")


if __name__ == "__main__":
    main()
