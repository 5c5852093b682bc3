"""dQ rounded by the main kernel against a kernel of its own: right, and how fast.

python benchmarks/sm90_backward_finish.py         on a Hopper GPU
python benchmarks/sm90_backward_finish.py --dry   anywhere: builds what that needs
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.sm90_backward_dev import asked, backward_problem, compare, gradients_of
from benchmarks.sm90_dev import TOKENS, WIDTH, WORKERS, Check, Timed, interleaved, made, timed
from fa3_compile.lower.build_nvrtc import load, load_all
from fa3_compile.lower.kernels import cuda_sm90_backward as backward
from fa3_compile.lower.kernels import cuda_sm90_backward_parameters as parameters
from fa3_compile.lower.kernels.cuda_sm90 import CudaSm90
from fa3_compile.lower.kernels.cuda_sm90_backward_keys import keys_of, load_best
from fa3_compile.lower.kernels.cuda_sm90_keys import layout_of

# (form, head dim, length) that are timed; kernels are timed one by one in the first.
CELLS = [
    ("full", 128, 2048), ("causal", 128, 2048), ("causal", 256, 2048), ("window1024", 128, 8192),
    ("full", 128, 16384), ("causal", 128, 16384), ("documents", 128, 8192), ("full", 256, 2048),
    ("causal", 64, 2048), ("full", 64, 2048), ("full", 64, 16384), ("causal", 64, 16384),
    ("causal", 256, 16384), ("full", 256, 16384), ("bias", 128, 8192), ("bias, kept", 128, 8192),
    ("softcap", 128, 8192), ("alibi", 128, 8192), ("prefix1024", 128, 8192), ("dropout", 128, 8192),
    ("dense mask", 128, 8192),
]  # fmt: skip
PROFILED = 4
FORMS = (
    "full", "causal", "window", "documents", "dense bias", "dense bias, one batch",
    "dropout, causal", "left padding", "dense mask", "alibi, softcap",
)  # fmt: skip


def ways(problem, aux, timed: bool):
    """(off, on), in the tile that runs without it where they are timed."""
    keys = keys_of(problem, layout_of(problem.spec, aux))
    off = load_best(keys, 4)[0] if timed else keys[0]
    return off, replace(off, config=replace(off.config, finishes=True))


def checks() -> list[Check]:
    return [
        Check(name, "bf16", (dim, dim), lengths, group, "bshd")
        for name in FORMS
        for dim, group, lengths in (
            (64, 2, (333, 421)), (128, 1, (1333, 1421)), (160, 1, (333, 421)), (128, 2, (70, 2100)),
        )
        if name in ("full", "causal") or (dim, group) in ((64, 2), (128, 1))
    ]  # fmt: skip


def _built(what):
    torch.set_num_threads(1)
    if isinstance(what, Check):
        _, problem, (*_, aux), _ = asked(what, "cpu")
    else:
        spec, q, k, v, aux = made(what, "meta")
        problem = problem_of(what, spec, q, k, v, aux)
    if backward.supports_backward(problem):
        return None
    if torch.cuda.is_available():
        CudaSm90().prepare(problem)
    keys = ways(problem, aux, isinstance(what, Timed))
    if isinstance(what, Check):
        return keys, [load(keys[1]).spill_bytes]
    if what.name.startswith("bias"):
        load_all(fetches(keys[1:]))
    return keys, [load(x).spill_bytes for x in keys]


def built(wanted):
    with ProcessPoolExecutor(WORKERS) as pool:
        return list(pool.map(_built, wanted, chunksize=1))


def cells() -> list[Timed]:
    cases = list(timed())
    # The bias without its gradient.
    cases += [replace(x, name="bias, kept") for x in cases if x.name == "bias"]
    return [next(x for x in cases if (x.name, x.dim, x.length) == cell) for cell in CELLS]


def problem_of(case: Timed, spec, q, k, v, aux):
    problem = backward_problem(spec, q, k, v, aux)
    return replace(problem, aux_needs_grad=(False,)) if "kept" in case.name else problem


def check_all() -> None:
    right = failed = 0
    for check, found in zip(checks(), built(checks())):
        if found is None:
            continue
        form, problem, (q, k, v, aux), needs = asked(check, "cuda")
        out, lse = CudaSm90().run(problem, q, k, v, aux, form.sizes)
        dout, dlse = torch.randn_like(out), torch.randn_like(lse)
        arguments = (dout, dlse, q, k, v, out, lse, aux, form.sizes, needs)
        exact, eager = gradients_of(problem.spec, *arguments)
        for ahead, section in ((3, 32 * 2**20), (0, 1)):
            parameters.AHEAD, parameters.SECTION_BYTES = ahead, section
            key = found[0][1]
            bound = backward.bind(problem, dlse, q, k, v, dout, out, aux, form.sizes, needs, key)
            for _ in range(3):
                torch.full((2**26,), float("nan"), device="cuda")  # what scratch memory holds
                wrong, _ = compare(bound(problem, *arguments), exact, eager)
                right, failed = right + (wrong is None), failed + (wrong is not None)
                if wrong:
                    print(f"FAIL {check} {ahead}: {wrong}", flush=True)
        parameters.AHEAD, parameters.SECTION_BYTES = 3, 32 * 2**20
    print(f"{right} of {right + failed} right", flush=True)


def time_all() -> None:
    for n, (case, (keys, spilled)) in enumerate(zip(cells(), built(cells()))):
        time_cell(case, keys, spilled, n < PROFILED)
        torch.cuda.empty_cache()


def time_cell(case: Timed, keys, spilled, profiles: bool) -> None:
    spec, q, k, v, aux = made(case)
    problem = problem_of(case, spec, q, k, v, aux)
    out, lse = CudaSm90().run(problem, q, k, v, aux, ())
    dout = torch.randn_like(out)
    needs = [True] * 3 + list(problem.aux_needs_grad)

    def call(key, ahead):
        parameters.AHEAD = ahead
        bound = backward.bind(problem, None, q, k, v, dout, out, aux, (), needs, key)
        parameters.AHEAD = 3
        return lambda: bound(problem, dout, None, q, k, v, out, lse, aux, (), needs)

    calls = [call(keys[0], 3), call(keys[1], 3), call(keys[1], 10**6), call(keys[1], 2)]
    if case.name.startswith("bias"):
        time_fetches(case, keys[1], lambda key: call(key, 3))
    if case.name in ("full", "causal"):
        leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            y = torch.nn.functional.scaled_dot_product_attention(
                *leaves[:3], is_causal=case.name == "causal"
            )
        calls.append(lambda: torch.autograd.grad(y, leaves, dout, retain_graph=True))
    off, on, again = calls[0](), calls[1](), calls[0]()
    apart = [(a.float() - b.float()).abs().max().item() for a, b in zip(off[:3], on[:3])]
    noise = [(a.float() - b.float()).abs().max().item() for a, b in zip(off[:3], again[:3])]
    times = interleaved(calls)
    work = 10 * TOKENS * case.length * WIDTH * case.share / 1e9
    rates = [f"{work / x:.0f}" for x in times]
    share = f"{times[-1] / times[0]:.3f} -> {times[-1] / times[1]:.3f}" if len(calls) > 4 else "-"
    print(f"{case.name} D{case.dim} {case.length}: off {rates[0]} | on {rates[1]} | all slots "
          f"{rates[2]} | 2 ahead {rates[3]} TFLOP/s; of cuDNN {share}; spills {spilled}; "
          f"apart {max(apart):.1e}, off twice {max(noise):.1e}", flush=True)  # fmt: skip
    if profiles:
        profile(calls[:2])


FETCHES = (0, 2, 4, 8)


def fetches(keys):
    return [replace(x, config=replace(x.config, dense_ahead=n)) for n in FETCHES for x in keys]


def time_fetches(case, key, call) -> None:
    times = interleaved([call(x) for x in fetches([key])])
    work = 10 * TOKENS * case.length * WIDTH * case.share / 1e9
    rates = [f"{n} {work / x:.0f}" for n, x in zip(FETCHES, times)]
    print(f"{case.name}: fetched to L2 steps ahead:", " | ".join(rates), flush=True)


def profile(calls) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    for name, call in zip(("off", "on"), calls):
        with profiled(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(5):
                call()
            torch.cuda.synchronize()
        said = [f"{x.key[:14]} {x.device_time:.0f} us" for x in found.key_averages()
                if "fill" not in x.key]  # fmt: skip
        print("   ", name, ", ".join(said), flush=True)


def main() -> None:
    if "--dry" in sys.argv:
        for case, found in zip([*cells(), *checks()], built([*cells(), *checks()])):
            print(case, found and (found[0][1].config, found[1]), flush=True)
        return
    if "--time" not in sys.argv:
        check_all()
    time_all()


if __name__ == "__main__":
    main()
