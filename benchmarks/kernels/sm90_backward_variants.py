"""Other ways to build a Hopper backward against the one that runs: right, and how fast.

`benchmarks/kernels/sm90_backward.py all` runs this. A variant is one of the candidates of
`cuda_sm90_backward_keys.keys_of`; the first of a row is what is built without it.
"""

from __future__ import annotations

import csv
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from benchmarks.kernels.sm90_backward import asked, backward_problem, compare, gradients_of
from benchmarks.kernels.sm90_forward import (
    OUT,
    TOKENS,
    WIDTH,
    WORKERS,
    Check,
    Timed,
    interleaved,
    made,
    timed,
)
from fa3_compile.lower.binaries.build_nvrtc import Built, load
from fa3_compile.lower.choose import Problem
from fa3_compile.lower.kernels import cuda_sm90_backward as backward
from fa3_compile.lower.kernels.cuda_sm90 import CudaSm90
from fa3_compile.lower.kernels.cuda_sm90_backward_keys import keys_of, load_best
from fa3_compile.lower.kernels.cuda_sm90_keys import layout_of
from fa3_compile.lower.render.render_cuda_backward import CudaBackwardKey
from fa3_compile.runtime.op import BackwardInputs

# What a row of the table is about: forms of which several candidates are worth their time.
TIMED = ("documents", "dense mask", "dropout", "bias", "softcap", "alibi")
# And of which only who rounds dQ is.
ROUNDED = ("full", "causal", "window1024", "prefix1024")
CHECKED = (
    "documents", "documents, full", "dense mask", "dropout, causal", "dense bias",
    "dense bias, one batch", "dense bias with -inf", "alibi, softcap", "softcap",
)  # fmt: skip
SHORTEST = 20.0  # seconds that a row may take: none is begun with less left


def name_of(key: CudaBackwardKey) -> str:
    c = key.config
    flags = ("early_values", "late_dq", "bits", "in_turn", "finishes")
    said = [x.split("_")[0] if x != "in_turn" else "turns" for x in flags if getattr(c, x)]
    if key.tile is not None:
        said.append("tile")
    return " ".join([f"{c.block_m}x{c.block_n}", *said])


def rows() -> list[Timed]:
    """The cases of a table, as `timed` has them at D128, and those at D64."""
    found = [x for x in timed() if x.name in TIMED]
    few = [replace(x, dim=64) for x in found if x.name in ("documents", "dense mask", "dropout")]
    return found + few + [x for x in timed() if x.name in ROUNDED]


def variants(problem: Problem, aux, tiles: bool = True) -> list[CudaBackwardKey]:
    """What runs, then every other candidate that builds, by those that spill least; without
    `tiles` only the one that has dQ rounded elsewhere."""
    keys = keys_of(problem, layout_of(problem.spec, aux))
    first, _ = load_best(keys)
    others = [x for x in keys if x != first and x.tile == first.tile] if tiles else []
    if first.tile is None:
        finishes = not first.config.finishes
        others.append(replace(first, config=replace(first.config, finishes=finishes)))
    cubins = {load(first).cubin}
    found = [first]
    for key in others:
        built = load(key)
        # Candidates may differ by what their form has no use for.
        if built.cubin not in cubins and not built.serialised:
            cubins.add(built.cubin)
            found.append(key)
    return found


Found = list[tuple[CudaBackwardKey, Built]]


def _built(what: Timed | Check) -> Found:
    """In a worker, so that the kernels lie in the cache on disk."""
    torch.set_num_threads(1)
    if isinstance(what, Check):
        _, problem, (*_, aux), _ = asked(what, "cpu")
    else:
        spec, q, k, v, aux = made(what, "meta")
        problem = backward_problem(spec, q, k, v, aux)
    if torch.cuda.is_available():
        CudaSm90().prepare(problem)
    tiles = isinstance(what, Check) or what.name in TIMED
    return [(x, load(x)) for x in variants(problem, aux, tiles)]


def built(wanted: list[Any]) -> list[Found]:
    with ProcessPoolExecutor(WORKERS) as pool:
        return list(pool.map(_built, wanted, chunksize=1))


def show() -> None:
    """What would be checked and timed."""
    found = rows()
    for case, keys in zip(found, built(found)):
        for key, x in keys:
            said = "" if x.healthy else f", spills {x.spill_bytes} B"
            print(f"{case.name} D{case.dim}: {name_of(key)}{said}", flush=True)
    counts = [len(x) for x in built(checks())]
    print(f"{sum(counts)} variants of {len(counts)} forms to check")


def table(deadline: float) -> None:
    """TFLOP/s of what the mask leaves, of all variants of a form in turn in one process."""
    lines = []
    for case, keys in zip(rows(), built(rows())):
        if deadline - time.monotonic() < SHORTEST:
            print(f"no time left for {case.name} D{case.dim}", flush=True)
            continue
        for line in measured(case, [key for key, _ in keys]):
            lines.append(line)
            print(*line, sep=" | ", flush=True)
        torch.cuda.empty_cache()
    with open(OUT / "sm90_backward_variants.csv", "w", newline="") as file:
        head = ("form", "dim", "length", "first", "tflops", "variant", "its tflops", "ratio")
        csv.writer(file).writerows([head, *lines])


def measured(case: Timed, keys: list[CudaBackwardKey]) -> list[tuple]:
    spec, q, k, v, aux = made(case)
    problem = backward_problem(spec, q, k, v, aux)
    out, lse = CudaSm90().run(problem, q, k, v, aux, ())
    dout = torch.randn_like(out)
    needs = [True] * 3 + list(problem.aux_needs_grad)
    given = BackwardInputs(dout, None, q, k, v, out, lse, aux, (), needs)

    def call(key: CudaBackwardKey):
        bound = backward.bind(problem, given, key)
        return lambda: bound(problem, given)

    times = interleaved([call(key) for key in keys])
    work = 10 * TOKENS * case.length * WIDTH * case.share / 1e9
    rates = [work / x for x in times]
    return [
        (case.name, case.dim, case.length, name_of(keys[0]), f"{rates[0]:.0f}", name_of(key),
         f"{rate:.0f}", f"{rate / rates[0]:.3f}")
        for key, rate in zip(keys[1:], rates[1:])
    ]  # fmt: skip


def checks() -> list[Check]:
    return [
        Check(name, "bf16", (dim, dim), (333, 421), group, "bshd")
        for name in CHECKED
        for dim, group in ((64, 2), (128, 1), (160, 1))
        if "dropout" not in name or dim <= 128
    ]


def check_all(deadline: float) -> None:
    """Every variant of the forms in CHECKED against float64, as `check` does what runs."""
    right = failed = 0
    for check, keys in zip(checks(), built(checks())):
        if time.monotonic() > deadline:
            print(f"no time left for the variants of {check.form}", flush=True)
            continue
        form, problem, (q, k, v, aux), needs = asked(check, "cuda")
        out, lse = CudaSm90().run(problem, q, k, v, aux, form.sizes)
        dout, dlse = torch.randn_like(out), torch.randn_like(lse)
        given = BackwardInputs(dout, dlse, q, k, v, out, lse, aux, form.sizes, needs)
        exact, eager = gradients_of(problem.spec, *given)
        for key, _ in keys:
            bound = backward.bind(problem, given, key)
            wrong, _ = compare(bound(problem, given), exact, eager)
            right, failed = right + (wrong is None), failed + (wrong is not None)
            if wrong:
                print(f"FAIL {check} {name_of(key)}: {wrong}", flush=True)
    print(f"{right} of {right + failed} variants right", flush=True)
