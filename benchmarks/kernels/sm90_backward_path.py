"""A Hopper backward timed as its kernels alone and through the compiled graph, in one process.

    python benchmarks/kernels/sm90_backward_path.py [NAME DIM LENGTH ...]    on a Hopper GPU

The way is taken step by step: the kernels on tensors as sm90_backward.py makes them; dO in memory
as [B, S, H, D]; heads as a batch, as a batch of one is compiled; the compiled graph
given dO in the layout of its output, and given one of another layout, which AOTAutograd copies.
cuDNN beside it with dO of either layout. For each: the tile that was bound, its median
in rounds of shuffled order, when it follows cuDNN, and when it follows itself, the clock it ends
at, and its kernels' times.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import cases, contenders
from benchmarks.kernels.sm90_backward import backward_problem, last_bound
from benchmarks.kernels.sm90_forward import Timed, made, timed
from benchmarks.kernels.sm90_forward import interleaved as in_order
from fa3_compile.lower.kernels import cuda_sm90_backward as backward
from fa3_compile.lower.kernels.cuda_sm90 import CudaSm90
from fa3_compile.runtime.op import BackwardInputs
from fa3_compile.timing import interleaved

CHOSEN = (("causal", 128, 2048), ("causal", 128, 16384), ("causal", 64, 16384),
          ("causal", 256, 2048), ("full", 128, 2048), ("full", 64, 16384))  # fmt: skip
PROBE = 100_000  # cycles of a kernel that does nothing, by which the clock is read
ALONE = 12
Call = Callable[[], Any]


def direct(case: Timed, q: Tensor, k: Tensor, v: Tensor, aux, dout: Tensor) -> Call:
    """The kernels, bound to these tensors."""
    spec = made(case, "meta")[0]
    problem = backward_problem(spec, q, k, v, aux)
    out, lse = CudaSm90().run(problem, q, k, v, aux, ())
    needs = [True] * 3 + [False] * len(aux)
    given = BackwardInputs(dout, None, q, k, v, out, lse, aux, (), needs)

    def call():
        return backward.run_backward(problem, given)

    call()
    print("  direct:", bound_last())
    return call


def bound_last() -> str:
    """The tile of the backward that was bound last."""
    bound = last_bound()
    return "another family" if bound is None else str(bound.config)


def bshd(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def calls_of(case: Timed) -> dict[str, Call]:
    _, q, k, v, aux = made(case)
    dout = torch.randn(q.shape, device="cuda", dtype=q.dtype)  # [B, H, S, D] in memory
    found = {
        "kernels": direct(case, q, k, v, aux, dout),
        "kernels, dO bshd": direct(case, q, k, v, aux, bshd(dout)),
    }
    if q.shape[0] == 1:
        of = [x.transpose(0, 1) for x in (q, k, v, dout)]
        found["kernels, heads as batch"] = direct(case, of[0], of[1], of[2], aux, of[3])
    [plain] = [x for x in cases.all_cases() if named(x) == (case.name, case.dim, case.length)][:1]
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    of_q, of_k, of_v = leaves
    causal = case.name == "causal"

    def graded(out: Tensor, given: Tensor) -> Call:
        return lambda: torch.autograd.grad(out, leaves, given, retain_graph=True)

    with functorch_config.patch(donated_buffer=False):
        compiled = contenders.contender("fa3", plain, leaves)
        assert compiled is not None
        out = compiled(*leaves)
        torch.autograd.grad(out, leaves, dout, retain_graph=True)
    print("  compiled:", bound_last())
    print("  output's strides", out.stride(), "dO's", dout.stride(), bshd(dout).stride())
    found["compiled, dO as out"] = graded(out, torch.empty_like(out).copy_(dout))
    found["compiled, dO bshd"] = graded(out, bshd(dout))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        y = torch.nn.functional.scaled_dot_product_attention(of_q, of_k, of_v, is_causal=causal)
    found["cudnn, dO bshd"] = graded(y, bshd(dout))
    found["cudnn, dO bhsd"] = graded(y, dout)
    return found


def named(x: cases.Case) -> tuple[str, int, int]:
    return x.variant.name, x.dim, x.kv_len


def alone(calls: int, call: Call) -> tuple[float, float]:
    """(median ms of a call that follows itself, MHz after the last)."""
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 2)]
    for mark in marks[:-2]:
        mark.record()
        call()
    marks[-2].record()
    torch.cuda._sleep(PROBE)
    marks[-1].record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in zip(marks[:-2], marks[1:-1]))
    return times[calls // 2], PROBE / marks[-2].elapsed_time(marks[-1]) / 1e3


def kernels(call: Call, count: int = 5) -> str:
    """The device time of each kernel of a call, in us."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        for _ in range(count):
            call()
        torch.cuda.synchronize()
    on_device = [x for x in found.events() or () if x.device_type.name == "CUDA"]
    times: dict[str, list[float]] = {}
    for x in sorted(on_device, key=lambda x: x.time_range.start):
        times.setdefault(x.name[:48], []).append(x.time_range.elapsed_us())
    each = (f"{name} {sum(t) / count:.0f}" for name, t in times.items())
    return ", ".join(each) or "the profiler saw none"


def show(case: Timed) -> None:
    print(f"{case.name} D{case.dim} S{case.length}", flush=True)
    calls = calls_of(case)
    shuffled = interleaved(calls, torch.device("cuda"))
    cudnn = calls["cudnn, dO bshd"]
    for name, call in calls.items():
        theirs, after = in_order([cudnn, call])
        own, mhz = alone(ALONE, call)
        print(f"  {name:<26} shuffled {shuffled[name]:.3f} after cudnn {after:.3f} (cudnn "
              f"{theirs:.3f}) alone {own:.3f} ms, {mhz:.0f} MHz", flush=True)  # fmt: skip
    for name, call in calls.items():
        print(f"  {name}: {kernels(call)}", flush=True)


def main() -> None:
    words = sys.argv[1:]
    wanted = [(n, int(d), int(s)) for n, d, s in zip(words[::3], words[1::3], words[2::3])]
    of = {(x.name, x.dim, x.length): x for x in timed()}
    for name in wanted or CHOSEN:
        torch._dynamo.reset()
        show(of[name])
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
