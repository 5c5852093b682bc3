"""The Hopper backward kernels on their own: what ptxas says, the numbers, the times.

    python benchmarks/kernels/sm90_backward.py JOB [NAME ...]

compile [NAME ...]   anywhere: registers, spills
check [NAME ...]     on a Hopper GPU: against float64
bench [NAME ...]     on a Hopper GPU: against cuDNN SDPA
all [SECONDS]        on a Hopper GPU: `check` of every form, sm90_backward_variants.py checked and
                     timed against what runs, then `bench`, within SECONDS (default 540)
all --dry            anywhere: builds what that needs

NAME is part of a form's name; EVERY=n checks one in n. Full numbers go to $OUT (default: the
current directory).
"""

from __future__ import annotations

import csv
import itertools
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.sm90_forward import (
    LENGTHS,
    OUT,
    TOKENS,
    WIDTH,
    Check,
    Timed,
    build_all,
    interleaved,
    made,
    problem_of,
    timed,
)
from fa3_compile.lower.binaries.build_nvrtc import load_first
from fa3_compile.lower.choose import KernelBuildError
from fa3_compile.lower.kernels import cuda_sm90_backward as backward
from fa3_compile.lower.kernels.cuda_sm90 import CudaSm90
from fa3_compile.lower.kernels.cuda_sm90_backward_keys import keys_of as backward_keys_of
from fa3_compile.lower.kernels.cuda_sm90_backward_keys import load_best
from fa3_compile.lower.kernels.cuda_sm90_keys import keys_of, layout_of, tile_candidate
from fa3_compile.lower.kernels.reference import attention_backward
from fa3_compile.runtime.op import BackwardInputs
from tests.numerics.forms import BY_NAME

DIMS = (
    (64, 64), (128, 128), (256, 256), (40, 40), (96, 96), (128, 64), (64, 128), (8, 24), (80, 80),
    (192, 128), (160, 160),
)  # fmt: skip
EVERYWHERE = ("full", "causal", "window", "softcap", "documents")


def needs_of(form, aux) -> list[bool]:
    """Gradients of q, k, v, of dense inputs, and of captured tensors that only sinks read."""
    spec = form.spec()
    tile = tile_candidate(spec)
    scored = {x.tensor for x in backward.E.loads_in(spec.score)}
    wanted = [x.is_floating_point() and i not in scored for i, x in enumerate(aux)]
    if tile is not None and form.name != "dense bias, fp32":
        wanted[tile.tensor] = True
    return [True] * 3 + wanted


def asked(check: Check, device: str):
    form, problem, tensors = check.made(device)
    needs = needs_of(form, tensors[3])
    problem = replace(problem, needs_grad=True, aux_needs_grad=tuple(needs[3:]))
    return form, problem, tensors, needs


def checks(wanted: list[str]) -> list[Check]:
    found = []
    for n, name in enumerate(BY_NAME):
        for m, (dims, dtype) in enumerate(itertools.product(DIMS, ("bf16", "fp16"))):
            if name in EVERYWHERE and m % 2 == n % 2 or (n + m) % 16 == 0 or (n + m) % 16 == 5:
                lengths = LENGTHS[(n + m) % len(LENGTHS)]
                layout = "bhds" if (n + m) % 7 == 3 else "bshd"
                found.append(Check(name, dtype, dims, lengths, (1, 2, 4)[(n + m) % 3], layout))
    found = found[:: int(os.environ.get("EVERY", "1"))]
    return [x for x in found if not wanted or any(part in x.form for part in wanted)]


def build(check: Check) -> tuple[Check, str, float]:
    """In a worker, so that the kernels lie in the cache on disk."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    _, problem, (q, k, v, aux), _ = asked(check, "cpu")
    if reason := backward.supports_backward(problem):
        return check, f"declined: {reason}", 0.0
    layout = layout_of(problem.spec, aux)
    if not (keys := backward_keys_of(problem, layout)):
        return check, "declined: a dense input that TMA cannot describe", 0.0
    try:
        if torch.cuda.is_available():
            load_first(keys_of(problem, layout))
        key, built = load_best(keys)
    except KernelBuildError as error:
        return check, f"does not build: {error}"[:600], 0.0
    c = key.config
    said = f"{c.block_m}x{c.block_n}{' early' if c.early_values else ''}"
    if not built.healthy:
        said += f", spills {built.spill_bytes} B, serialised {built.serialised}"
    return check, said, time.perf_counter() - start


def compare(found, exact, eager) -> tuple[str | None, float]:
    """What is wrong, and the largest error as a share of what is allowed."""
    wrong, worst = [], 0.0
    names = ["dq", "dk", "dv", *(f"aux{i}" for i in range(len(found[3])))]
    for name, x, y, z in zip(names, *((*g[:3], *g[3]) for g in (found, exact, eager))):
        if x is None:
            continue
        ours, theirs = ((g.double() - y).nan_to_num(0.0).abs().max().item() for g in (x, z))
        limit = 2 * theirs + 4e-3 * (1 + y.nan_to_num(0.0).abs().max().item())
        worst = max(worst, ours / limit)
        if not ours <= limit:
            wrong.append(f"{name} off by {ours:.2e}, allowed {limit:.2e}")
        if not torch.equal(x.isnan(), y.isnan()):
            wrong.append(f"{name} has {int(x.isnan().sum())} NaN, not {int(y.isnan().sum())}")
    return "; ".join(wrong) or None, worst


def last_bound() -> backward.BoundBackward | None:
    """The kernel that was bound last; None where another family ran in its place."""
    last = next(reversed(backward._bound.values()))
    return last if isinstance(last, backward.BoundBackward) else None


def gradients_of(spec, dout, dlse, q, k, v, out, lse, aux, sizes, needs):
    """(in float64, as the reference has them in the inputs' type)."""
    wide = [x.double() if x.is_floating_point() else x for x in aux]
    exact = attention_backward(
        spec, dout.double(), None if dlse is None else dlse.double(), q.double(), k.double(),
        v.double(), wide, sizes, needs,
    )  # fmt: skip
    return exact, attention_backward(spec, dout, dlse, q, k, v, aux, sizes, needs)


def check_all(wanted: list[str]) -> None:
    """Against float64, beside the reference's own error in the same dtype."""
    kernel = CudaSm90()
    todo = checks(wanted)
    built = build_all(todo, build)
    rows, failed, declined = [], 0, 0
    for check in todo:
        wrong, worst = None, 0.0
        if built[check].startswith("declined"):
            declined += 1
            rows.append([*vars(check).values(), built[check], "", 0])
            continue
        try:
            form, problem, (q, k, v, aux), needs = asked(check, "cuda")
            sizes = form.sizes
            out, lse = kernel.run(problem, q, k, v, aux, sizes)
            dout, dlse = torch.randn_like(out), torch.randn_like(lse)
            dlse = None if len(check.form) % 2 else dlse
            given = BackwardInputs(dout, dlse, q, k, v, out, lse, aux, sizes, needs)
            found = backward.run_backward(problem, given)
            torch.cuda.synchronize()
            if last_bound() is None:
                wrong = "another family ran"
            said, worst = compare(found, *gradients_of(problem.spec, *given))
            wrong = wrong or said
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"[:500]
            if "CUDA" in wrong or "Accelerator" in wrong:
                print(f"FAIL {check} {wrong}", flush=True)
                raise
        failed += wrong is not None
        rows.append([*vars(check).values(), built[check], wrong or "ok", f"{worst:.2f}"])
        if wrong or "spills" in built[check]:
            print(f"{'FAIL' if wrong else 'note'} {check} [{built[check]}] {wrong}", flush=True)
    right = len(todo) - failed - declined
    print(f"{right} of {len(todo)} right, {declined} declined", flush=True)
    with open(OUT / "sm90_backward_check.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


def bench(wanted: list[str], deadline: float = math.inf) -> None:
    """TFLOP/s of what the mask leaves, and the share of cuDNN's in the same process."""
    rows = []
    for case in timed():
        names = (case.name, f"{case.name} {case.dim} {case.length}")
        if wanted and not set(names) & set(wanted):
            continue
        if time.monotonic() > deadline:
            print("no time left for", *names[1:], flush=True)
            continue
        if (row := measured(case)) is not None:
            rows.append(row)
            print(*row, flush=True)
        torch.cuda.empty_cache()
    with open(OUT / "sm90_backward_bench.csv", "w", newline="") as file:
        head = ("form", "dim", "length", "tile", "ms", "tflops", "cudnn", "share")
        csv.writer(file).writerows([head, *rows])


def measured(case: Timed) -> tuple | None:
    """One line of the table."""
    spec, q, k, v, aux = made(case)
    problem = backward_problem(spec, q, k, v, aux)
    if reason := backward.supports_backward(problem):
        print(case.name, case.dim, "declined:", reason, flush=True)
        return None
    out, lse = CudaSm90().run(problem, q, k, v, aux, ())
    dout = torch.randn_like(out)
    needs = [True] * 3 + list(problem.aux_needs_grad)
    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
    causal = case.name != "full"
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        y = torch.nn.functional.scaled_dot_product_attention(*leaves[:3], is_causal=causal)  # pyright: ignore

    given = BackwardInputs(dout, None, q, k, v, out, lse, aux, (), needs)

    def ours():
        return backward.run_backward(problem, given)

    def cudnn():
        return torch.autograd.grad(y, leaves, dout, retain_graph=True)

    theirs, mine = interleaved([cudnn, ours])
    bound = last_bound()
    work = 10 * TOKENS * case.length * WIDTH
    rate = work * case.share / mine / 1e9
    base = work * (0.5 if causal else 1.0) / theirs / 1e9
    tile = f"{bound.config.block_m}x{bound.config.block_n}" if bound else "none"
    numbers = (f"{mine:.3f}", f"{rate:.0f}", f"{base:.0f}", f"{rate / base:.3f}")
    return (case.name, case.dim, case.length, tile, *numbers)


def backward_problem(spec, q, k, v, aux):
    """With the gradients of dense biases."""
    problem = problem_of(spec, q, k, v, aux)
    wanted = tuple(x.is_floating_point() and x.dim() == 4 and x.shape[3] > 1 for x in aux)
    return replace(problem, needs_grad=True, aux_needs_grad=wanted)


def run_all(words: list[str]) -> None:
    from benchmarks.kernels import sm90_backward_variants as variants

    seconds = next((x for x in words if x.replace(".", "").isdigit()), "540")
    deadline = time.monotonic() + float(seconds)
    if "--dry" in words:
        variants.show()
        return
    check_all([])
    variants.check_all(deadline)
    variants.table(deadline)
    bench([], deadline)


def main() -> None:
    mode, wanted = (sys.argv[1:] + [""])[0], sys.argv[2:]
    if mode == "compile":
        for check, said in build_all(checks(wanted), build).items():
            print(check.form, check.dtype, *check.dims, said)
    elif mode == "check":
        check_all(wanted)
    elif mode == "bench":
        bench(wanted)
    elif mode == "all":
        run_all(wanted)
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
