"""The Hopper forward kernel on its own: what ptxas says, the numbers, the times.

    python benchmarks/kernels/sm90_forward.py JOB [NAME ...]

compile [NAME ...]   anywhere: tiles, registers, spills
check [NAME ...]     on a Hopper GPU: every form against float64
bench [NAME ...]     on a Hopper GPU: against cuDNN SDPA
host                 on a Hopper GPU: host time, CUDA graphs

NAME is part of a form's name. Full numbers go to $OUT (default: the current directory).
sm90_decode.py times few queries against long caches; sm90_checks.py has the sanitizer, repetitions
and odd sizes.
"""

from __future__ import annotations

import csv
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from fa3_compile.lower.binaries.build_nvrtc import load_first
from fa3_compile.lower.choose import KernelBuildError, Problem
from fa3_compile.lower.kernels import cuda_sm90_keys
from fa3_compile.lower.kernels.cuda_sm90 import Bound, CudaSm90
from fa3_compile.lower.kernels.cuda_sm90_keys import keys_of, layout_of
from fa3_compile.spec.attention import AttentionSpec
from tests.numerics.forms import BY_NAME, Shape, compare, inputs, shape_for

OUT = Path(os.environ.get("OUT", "."))
WORKERS = int(os.environ.get("WORKERS", str(min(16, os.cpu_count() or 1))))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DIMS = ((40, 40), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (8, 24))
LENGTHS = ((333, 421), (421, 333), (128, 512), (1, 700), (700, 50), (1027, 1027))
DECODE = ((1, 2011), (5, 1500), (40, 900))  # few enough tiles that keys are dealt out
EVERYWHERE = ("full", "causal", "window", "left padding", "softcap", "dense bias", "documents")


@dataclass(frozen=True)
class Check:
    """One form at one shape."""

    form: str
    dtype: str
    dims: tuple[int, int]
    lengths: tuple[int, int]
    group: int
    layout: str
    large: bool = False  # the tiles of long inputs, which these are too short for

    def tiles(self):
        """While this is open, the check's tiles are chosen."""
        if not self.large:
            return nullcontext()
        return patch.object(cuda_sm90_keys, "processors", lambda device: 0)

    def made(self, device: str):
        form = BY_NAME[self.form]
        shape = shape_for(form, *self.dims, *self.lengths, self.group)
        if self.lengths in DECODE:
            shape = Shape(2, 4, 4 // self.group, *self.lengths, *self.dims)
        tensors = inputs(form, shape, DTYPES[self.dtype], device, self.layout)
        return form, problem_of(form.spec(), *tensors), tensors


def problem_of(spec: AttentionSpec, q, k, v, aux, capability=(9, 0)) -> Problem:
    device = q.device if q.is_cuda else torch.device("cuda:0")
    lengths = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    dtypes = tuple(x.dtype for x in aux)
    return Problem(spec, q.dtype, device, capability, *lengths, aux_dtypes=dtypes)


def checks(wanted: list[str]) -> list[Check]:
    """Every form at three head dims, the most used ones at all of them."""
    found = []
    for n, name in enumerate(BY_NAME):
        for m, (dims, dtype) in enumerate(itertools.product(DIMS, DTYPES)):
            if name in EVERYWHERE or (n + m) % 5 == 0:
                lengths = LENGTHS[(n + m) % len(LENGTHS)]
                layout = "bhds" if (n + m) % 7 == 3 else "bshd"
                large, group = (n + m) % 4 < 2, (1, 2, 4)[(n + m) % 3]
                found.append(Check(name, dtype, dims, lengths, group, layout, large))
        for m, lengths in enumerate(DECODE):
            dims, dtype = DIMS[(n + m) % len(DIMS)], tuple(DTYPES)[(n + m) % 2]
            group = (4, 2, 1)[(n // 2 + m) % 3]
            found.append(Check(name, dtype, dims, lengths, group, "bshd"))
    return [x for x in found if not wanted or any(part in x.form for part in wanted)]


def build(check: Check) -> tuple[Check, str, float]:
    """In a worker, so that the kernel lies in the cache on disk."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    _, problem, (q, k, v, aux) = check.made("cpu")
    try:
        with check.tiles():
            key, built = load_first(keys_of(problem, layout_of(problem.spec, aux)))
    except KernelBuildError as error:
        return check, f"does not build: {error}"[:600], 0.0
    c = key.config
    said = f"{c.block_m}x{c.block_n} {built.registers} registers"
    if not built.healthy:
        said += f", spills {built.spill_bytes} B, serialised {built.serialised}"
    return check, said, time.perf_counter() - start


def build_all(
    wanted: Iterable[Check], build: Callable[[Check], tuple[Check, str, float]] = build
) -> dict[Check, str]:
    """What `build` says of each."""
    start = time.perf_counter()
    with ProcessPoolExecutor(WORKERS) as pool:
        results = list(pool.map(build, wanted, chunksize=1))
    seconds = sorted(s for *_, s in results)
    print(
        f"built {len(results)} kernels in {time.perf_counter() - start:.0f} s, median "
        f"{seconds[len(seconds) // 2]:.1f} s, slowest {seconds[-1]:.1f} s"
    )
    return {check: said for check, said, _ in results}


def check_all(wanted: list[str]) -> None:
    """Against float64, three times for the same bits, and with the default stream elsewhere."""
    todo = checks(wanted)
    built = build_all(todo)
    rows, failed = [], 0
    for check in todo:
        try:
            form, problem, (q, k, v, aux) = check.made("cuda")
            with check.tiles():
                kernel = CudaSm90()
                out, lse = kernel.run(problem, q, k, v, aux, form.sizes)
            torch.cuda.synchronize()
            wrong = compare(form, out, lse, q, k, v, aux)
            bound = next(reversed(kernel._bound.values()))
            if not isinstance(bound, Bound) and check.layout != "bhds":
                wrong = f"{wrong or ''} another kernel ran"
            again = [kernel.run(problem, q, k, v, aux, form.sizes) for _ in range(3)]
            if not all(
                torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
                for pair in again
                for a, b in zip(pair, (out, lse))
            ):
                wrong = f"{wrong or ''} not the same bits again"
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"[:500]
            if "CUDA" in wrong or "Accelerator" in wrong:
                print(f"FAIL {check} {wrong}", flush=True)
                raise
        failed += wrong is not None
        spilled = "spills" in built[check] or "build" in built[check]
        rows.append([*vars(check).values(), built[check], wrong or "ok"])
        if wrong or spilled:
            print(f"{'FAIL' if wrong else 'note'} {check} [{built[check]}] {wrong}", flush=True)
    print(f"{len(todo) - failed} of {len(todo)} right", flush=True)
    with open(OUT / "sm90_check.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


# ---- times ----

TOKENS, WIDTH = 16384, 2048


@dataclass(frozen=True)
class Timed:
    """A form of the benchmark: B*S = TOKENS, H*D = WIDTH, bf16. `share` of the work is left."""

    name: str
    fields: str
    dim: int
    length: int
    share: float
    aux: tuple[str, ...] = ()


def timed() -> list[Timed]:
    causal = "mask=(kv - q <= 0)"
    cases = []
    for dim in (64, 128, 256):
        scale = 1 / math.sqrt(dim)
        for length in (2048, 16384):
            cases.append(Timed("full", f"score={scale}*s", dim, length, 1.0))
            half = 0.5 + 0.5 / length
            cases.append(Timed("causal", f"score={scale}*s, {causal}", dim, length, half))
    s, n = f"{1 / math.sqrt(128)}*s", 8192
    window = 1024 / n - 0.5 * (1024 / n) ** 2
    cases += [
        Timed("causal", f"score={s}, {causal}", 128, n, 0.5),
        Timed("softcap", f"score=50.0*tanh({1 / math.sqrt(128) / 50}*s), {causal}", 128, n, 0.5),
        Timed("alibi", f"score={s} + load(0, 0, h, 0, 0)*(kv - q), {causal}", 128, n, 0.5,
              ("slopes",)),
        Timed("window1024", f"score={s}, mask=(kv - q <= 0) & (q - kv <= 1023)", 128, n, window),
        Timed("prefix1024", f"score={s}, mask=(kv - q <= 0) | (kv < 1024)", 128, n,
              0.5 + 0.5 * (1024 / n) ** 2),
        Timed("bias", f"score={s} + load(0, 0, h, q, kv)", 128, n, 1.0, ("bias_of_heads",)),
        Timed("documents", f"score={s}, mask=(load(0, b, q) == load(0, b, kv))", 128, n, 1 / 8,
              ("eighths",)),
        Timed("dense mask", f"score={s}, mask=(load(0, 0, 0, q, kv) != 0), dead=zero", 128, n, 0.5,
              ("lower_triangle",)),
        Timed("dropout", f"score={s}, {causal}, weight=where(uniform(load(0, 0), b, h, q, kv)"
              " < 0.1, 0, 1.1111111111111112)", 128, n, 0.5, ("seed",)),
        Timed("padded causal", f"score={s}, mask=(kv - q <= 0) & (load(0, b, kv) != 0), dead=score,"
              f" fill={s} - 3.3895313892515355e+38", 128, n, 0.5, ("ones",)),
    ]  # fmt: skip
    return cases


def made(case: Timed, device: str = "cuda"):
    """(spec, q, k, v, aux) of a case; on "meta" only what they look like."""
    batch, heads = TOKENS // case.length, WIDTH // case.dim
    q, k, v = (
        torch.randn(batch, case.length, heads, case.dim, device=device, dtype=torch.bfloat16)
        .transpose(1, 2)
        for _ in range(3)
    )  # fmt: skip
    aux = []
    for name in case.aux:
        if name == "slopes":
            aux.append(torch.exp2(-torch.arange(1.0, heads + 1, device=device) * 8 / heads)
                       .view(1, heads, 1, 1))  # fmt: skip
        elif name in ("bias_of_heads", "wide_bias_of_heads"):
            shape = (1, heads, case.length, case.length)
            dtype = torch.bfloat16 if name == "bias_of_heads" else torch.float32
            aux.append(torch.randn(shape, device=device, dtype=dtype))
        elif name == "lower_triangle":
            shape = (1, 1, case.length, case.length)
            aux.append(torch.ones(shape, device=device, dtype=torch.bool).tril())
        elif name == "seed":
            aux.append(torch.full((1,), 12345, device=device))
        else:
            at = torch.arange(case.length, device=device).expand(batch, -1)
            aux.append(at * 8 // case.length if name == "eighths" else torch.ones_like(at))
    kinds = ", ".join(
        "float" if x.is_floating_point() else "bool" if x.dtype == torch.bool else "int"
        for x in aux
    )
    spec = AttentionSpec.parse(f"attention({case.fields}{f', aux=[{kinds}]' if aux else ''})")
    return spec, q, k, v, aux


def interleaved(functions: list[Callable], rounds: int = 15) -> list[float]:
    """Median milliseconds of each, one call of each in turn."""
    for f in functions * 2:
        f()
    events = [[] for _ in functions]
    for _ in range(rounds):
        for f, record in zip(functions, events, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            f()
            end.record()
            record.append((start, end))
    torch.cuda.synchronize()
    return [sorted(a.elapsed_time(b) for a, b in record)[len(record) // 2] for record in events]


def bench(wanted: list[str]) -> None:
    """TFLOP/s of what the mask leaves, and the share of cuDNN's in the same process."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernel, rows = CudaSm90(), []
    for case in timed():
        if wanted and not any(part in case.name for part in wanted):
            continue
        spec, q, k, v, aux = made(case)
        problem = problem_of(spec, q, k, v, aux)

        def cudnn(q=q, k=k, v=v, causal=case.name != "full"):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

        def ours(problem=problem, q=q, k=k, v=v, aux=aux):
            return kernel.run(problem, q, k, v, aux, ())

        theirs, mine = interleaved([cudnn, ours])
        work = 4 * TOKENS * case.length * WIDTH
        rate = work * case.share / mine / 1e9
        base = work * (1.0 if case.name == "full" else 0.5) / theirs / 1e9
        bound = next(reversed(kernel._bound.values()))
        tile = f"{bound.config.block_m}x{bound.config.block_n}" if bound else "none"
        rows.append((case.name, case.dim, case.length, tile, f"{mine:.3f}", f"{rate:.0f}",
                     f"{base:.0f}", f"{rate / base:.3f}"))  # fmt: skip
        print(*rows[-1], flush=True)
        del q, k, v, aux, ours, cudnn
        torch.cuda.empty_cache()
    with open(OUT / "sm90_bench.csv", "w", newline="") as file:
        head = ("form", "dim", "length", "tile", "ms", "tflops", "cudnn", "share")
        csv.writer(file).writerows([head, *rows])


def host() -> None:
    """Microseconds of host time a call, warm; and a call captured in a CUDA graph."""
    import fa3_compile.runtime.op  # noqa: F401

    kernel = CudaSm90()
    shape = (2, 256, 8, 64)
    for fields, aux in (
        ("score=0.125*s, mask=(kv - q <= 0), out_order=bqhd", []),
        ("score=0.125*s, mask=(kv - q <= 0) & (load(0, b, kv) != 0), dead=score,"
         " fill=0.125*s - 3.3895313892515355e+38, aux=[int], out_order=bqhd",
         [torch.ones(2, 256, dtype=torch.int64, device="cuda")]),
    ):  # fmt: skip
        q, k, v = (torch.randn(shape, device="cuda").bfloat16().transpose(1, 2) for _ in range(3))
        text = f"attention({fields})"
        spec = AttentionSpec.parse(text)
        problem = problem_of(spec, q, k, v, aux)
        sdpa = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
        calls = {
            "run": partial(kernel.run, problem, q, k, v, aux, ()),
            "operator": partial(torch.ops.fa3.attention, q, k, v, aux, [], text),
            "sdpa": partial(sdpa, q, k, v),
        }
        with torch.no_grad():
            for name, call in calls.items():
                print(f"host {name}: {microseconds(call):.1f} us  {fields[:60]}", flush=True)
        graph = torch.cuda.CUDAGraph()
        expected, _ = kernel.run(problem, q, k, v, aux, ())
        with torch.cuda.graph(graph):
            out, _ = kernel.run(problem, q, k, v, aux, ())
        for _ in range(3):
            out.zero_()
            graph.replay()
        torch.cuda.synchronize()
        print("graph replay", torch.equal(out, expected), flush=True)
    compiled_graph()


def compiled_graph() -> None:
    """mode="reduce-overhead" on a small causal attention."""
    from fa3_compile.backend import fa3

    def attention(q, k, v):
        scores = q @ k.transpose(-1, -2) / 8
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        return torch.softmax(scores.masked_fill(hidden, float("-inf")), -1) @ v

    q, k, v = (torch.randn(2, 8, 300, 64, device="cuda").bfloat16() for _ in range(3))
    for mode in (None, "reduce-overhead"):
        torch._dynamo.reset()
        compiled = torch.compile(attention, backend=fa3, mode=mode)
        with torch.no_grad():
            for _ in range(4):
                out = compiled(q, k, v).clone()
            error = (out - attention(q, k, v)).abs().max().item()
            took = microseconds(partial(compiled, q, k, v))
        print(f"compiled, mode {mode}: error {error:.1e}, host {took:.1f} us", flush=True)


def microseconds(call: Callable, count: int = 200) -> float:
    """Median over batches of the time to queue one call."""
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count // 10):
            call()
        times.append((time.perf_counter() - start) / (count // 10) * 1e6)
    return sorted(times)[len(times) // 2]


def main() -> None:
    mode, wanted = (sys.argv[1:] + [""])[0], sys.argv[2:]
    if mode == "compile":
        for check, said in build_all(checks(wanted)).items():
            print(check.form, check.dtype, *check.dims, said)
    elif mode == "check":
        check_all(wanted)
    elif mode == "bench":
        bench(wanted)
    elif mode == "host":
        host()
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
