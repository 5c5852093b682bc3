"""What can go wrong with the kernels on a Hopper GPU beside their numbers, forward and backward.

    python benchmarks/kernels/sm90_checks.py JOB [NAME ...]

repeat      a thousand runs of each sample, the same bits
sizes       empty axes, more than 2^31 elements
sanitize    compute-sanitizer's memcheck and racecheck
all         the three of them

NAME is part of a sample's name, which is "forward", "backward" or "triton", a form and a head dim:
"backward: causal, D136". `cuda_sm90` backward adds to dQ in any order, so what repeats is the
Triton backward, which runs in its place in deterministic mode. Samples are dealt to processes;
BUDGET=seconds (default 600) ends all of them, and a sample that was not reached then counts as
wrong. Inputs have NaN beside every row (tests/numerics/forms.py). Logs go to $OUT (default: the
current directory). Exits with 1 where anything is wrong.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from benchmarks.kernels import sanitizer
from benchmarks.kernels.sm90_backward import compare as compare_gradients
from benchmarks.kernels.sm90_backward import gradients_of, last_bound, needs_of
from benchmarks.kernels.sm90_forward import OUT, WORKERS, problem_of
from fa3_compile.lower.binaries import build_nvrtc
from fa3_compile.lower.choose import Gradients, Problem
from fa3_compile.lower.kernels import (
    cuda_sm90_backward,
    cuda_sm90_parameters,
    triton_backward,
)
from fa3_compile.lower.kernels.cuda_sm90 import Bound, CudaSm90
from fa3_compile.lower.kernels.reference import attention, attention_backward
from fa3_compile.runtime.op import BackwardInputs
from fa3_compile.spec.attention import AttentionSpec
from tests.numerics.forms import BY_NAME, Form, Shape, compare, inputs, moved, shape_for

BF16 = torch.bfloat16
SPLIT = Shape(1, 4, 1, 5, 1500, 128, 128)  # packed heads against keys that are dealt out


@dataclass(frozen=True)
class Sample:
    """One form for one kernel.

    kernel  "forward", "backward" (both of cuda_sm90), or "triton" (the deterministic backward)
    shape   lengths where not those of `lengths`
    """

    kernel: str
    form: str
    dim: int = 64
    shape: Shape | None = None

    def __str__(self) -> str:
        return f"{self.kernel}: {self.form}, D{self.dim}{', split' if self.shape else ''}"

    def made(self, lengths: tuple[int, int]):
        """(form, problem, q, k, v, aux), tensors on the CPU."""
        form = BY_NAME[self.form]
        shape = self.shape or shape_for(form, self.dim, self.dim, *lengths, 2)
        q, k, v, aux = inputs(form, shape, BF16, "cpu")
        problem = problem_of(form.spec(), q, k, v, aux)
        needs = self.needs(form, aux)
        problem = replace(
            problem,
            needs_grad=any(needs),
            aux_needs_grad=tuple(needs[3:]),
            deterministic=self.kernel == "triton",
        )
        return form, problem, q, k, v, aux

    def needs(self, form: Form, aux: Sequence[Tensor]) -> list[bool]:
        """What has a gradient."""
        if self.kernel == "triton":
            return [True] * 3 + [x.is_floating_point() for x in aux]
        return needs_of(form, aux)


# Each part of a kernel once.
FORWARD = (
    "full", "causal", "window", "softcap", "alibi", "dense bias", "left padding", "documents",
    "dense mask", "sink, filled", "window, added", "dropout, causal", "static cache",
)  # fmt: skip
BACKWARD = (
    ("full", 64), ("causal", 128), ("window", 96), ("softcap", 64), ("alibi", 128),
    ("dense bias", 64), ("dense bias, one batch", 128), ("left padding", 64), ("documents", 128),
    ("dense mask", 64), ("sink", 64), ("window, nan", 64), ("dropout, causal", 64), ("full", 256),
    *(("causal", dim) for dim in (136, 160, 192, 224, 248, 256)),
)  # fmt: skip
TRITON = (
    ("causal", 128), ("softcap", 64), ("documents", 64), ("dense bias", 64), ("relative bias", 64),
    ("row and key bias", 64), ("left padding", 64), ("sink", 64), ("dropout, causal", 64),
    ("fill by key", 64),
)  # fmt: skip
FORWARD_SAMPLES = [Sample("forward", x) for x in FORWARD]
SPLIT_SAMPLES = [Sample("forward", x, 128, SPLIT) for x in FORWARD]
TRITON_SAMPLES = [Sample("triton", *x) for x in TRITON]
REPEATED = FORWARD_SAMPLES + SPLIT_SAMPLES + TRITON_SAMPLES
# A sanitizer takes a second or so to instrument a kernel.
SANITIZED = [
    *FORWARD_SAMPLES, *SPLIT_SAMPLES[::4], *(Sample("backward", *x) for x in BACKWARD),
    *TRITON_SAMPLES[::3],
]  # fmt: skip
LENGTHS = {"once": (150, 205), "repeated": (333, 421)}
SAMPLES = {"once": SANITIZED, "repeated": REPEATED}


@functools.cache
def kernel() -> CudaSm90:
    return CudaSm90()


def run(sample: Sample, lengths: tuple[int, int]) -> tuple[str | None, Callable]:
    """(what is wrong, the call). Expected values are computed on the CPU, away from the tools."""
    form, problem, q, k, v, aux = sample.made(lengths)
    there = [moved(x, "cuda") for x in (q, k, v)]
    aux_there = [moved(x, "cuda") for x in aux]

    def forward() -> tuple[Tensor, Tensor]:
        return kernel().run(problem, *there, aux_there, form.sizes)  # pyright: ignore

    out, lse = forward()
    if sample.kernel == "forward":
        said = compare(form, out.cpu(), lse.cpu(), q, k, v, aux)
        ours = isinstance(next(reversed(kernel()._bound.values())), Bound)
        return said if ours else f"another family ran; {said}", forward
    needs = sample.needs(form, aux)
    generator = torch.Generator().manual_seed(0)
    dout = torch.randn(out.shape, generator=generator).to(BF16)
    dlse = torch.randn(lse.shape, generator=generator)
    family = cuda_sm90_backward if sample.kernel == "backward" else triton_backward
    if reason := family.supports_backward(problem):
        return f"declined: {reason}", lambda: ()
    douts = dout.cuda(), dlse.cuda()
    given = BackwardInputs(*douts, *there, out, lse, aux_there, form.sizes, needs)  # pyright: ignore

    def backward() -> Gradients:
        return family.run_backward(problem, given)

    *three, captured = backward()
    three, captured = ([None if x is None else x.cpu() for x in xs] for xs in (three, captured))
    expected = gradients_of(problem.spec, dout, dlse, q, k, v, None, None, aux, form.sizes, needs)
    said, _ = compare_gradients((*three, captured), *expected)
    bound = list(triton_backward._launches.values())[-1:] or [None]
    ours = last_bound() if sample.kernel == "backward" else bound[0]
    return said if ours else f"another family ran; {said}", backward


def flat(found: Iterable) -> list[Tensor]:
    """The tensors of a result."""
    lists = [x if isinstance(x, list) else [x] for x in found]
    return [x for some in lists for x in some if x is not None]


def once(sample: Sample) -> str | None:
    return run(sample, LENGTHS["once"])[0]


def repeated(sample: Sample, runs: int = 1000) -> str | None:
    said, call = run(sample, LENGTHS["repeated"])
    if said:
        return said
    first = flat(call())
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(runs):
        for x, y in zip(flat(call()), first, strict=True):
            differing += (_bits(x) != _bits(y)).sum()
    return f"{int(differing)} elements differ" if int(differing) else None


def _bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


# ---- sizes ----


def made(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=BF16)


def sizes() -> int:
    """Empty axes; then tensors beyond 2^31 elements, the last heads against float64."""
    wrong, spec = 0, AttentionSpec.parse("attention(score=0.09*s)")
    for q_shape, kv_shape in (
        ((0, 4, 5, 64), (0, 2, 7, 64)), ((2, 4, 0, 64), (2, 2, 7, 64)),
        ((2, 4, 5, 64), (2, 2, 0, 64)),
    ):  # fmt: skip
        q, k, v = made(*q_shape), made(*kv_shape), made(*kv_shape)
        problem = replace(problem_of(spec, q, k, v, []), needs_grad=True)
        out, lse = kernel().run(problem, q, k, v, [], ())
        found = [out, lse, *flat(gradients(problem, out, q, k, v, out, lse))]
        needs = [True] * 3
        expected = [*attention(spec, q, k, v, [], ())]
        expected += flat(attention_backward(spec, out, None, q, k, v, [], (), needs))
        same = [torch.equal(x, y) for x, y in zip(found, expected, strict=True)]
        wrong += say(f"q {q_shape}, k {kv_shape}", None if all(same) else f"equal: {same}")
    for q_shape, kv_shape in (
        ((1, 64, 300_000, 128), (1, 64, 200, 128)), ((1, 64, 3, 128), (1, 64, 300_000, 128)),
        ((70, 64, 1, 128), (70, 8, 32_768, 128)),
    ):  # fmt: skip
        largest = max(torch.Size(q_shape).numel(), torch.Size(kv_shape).numel())
        name = f"{largest / 2**31:.2f} * 2^31 elements, {q_shape[2]} queries"
        wrong += say(name, large(spec, made(*q_shape), made(*kv_shape), made(*kv_shape)))
        torch.cuda.empty_cache()
    return wrong


def large(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """The last batch and KV head against float64."""
    problem = replace(problem_of(spec, q, k, v, []), needs_grad=True)
    out, lse = kernel().run(problem, q, k, v, [], ())
    dout = torch.randn_like(out)
    grads = flat(gradients(problem, dout, q, k, v, out, lse))
    if last_bound() is None:
        return "another family ran"
    group = q.shape[1] // k.shape[1]
    heads = (group, 1, 1, group, group, group, 1, 1)
    last = [x[-1:, -n:].double() for x, n in zip((q, k, v, dout, out, *grads), heads)]
    q, k, v, dout, *found = last
    expected = [attention(spec, q, k, v, [], ())[0]]
    expected += flat(attention_backward(spec, dout, None, q, k, v, [], (), [True] * 3))
    said = []
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        error = (x - y).abs().max().item()
        if not error < 2e-2 * y.abs().max().item() + 1e-3:
            said.append(f"{name} off by {error:.1e} of {y.abs().max().item():.1e}")
    return "; ".join(said) or None


def gradients(problem: Problem, dout, q, k, v, out, lse) -> Gradients:
    given = BackwardInputs(dout, None, q, k, v, out, lse, [], (), [True] * 3)
    return cuda_sm90_backward.run_backward(problem, given)


# ---- processes ----


def say(name: object, said: str | None) -> bool:
    """Prints one line; whether anything is wrong."""
    print(f"{name} -> {said or 'ok'}", flush=True)
    return said is not None


CHECKS = {"once": once, "repeated": repeated}


def share(check: str, names: Sequence[str], first: int, count: int) -> list[Sample]:
    """Every count-th sample of these names, all where there are none, which one process has."""
    named = [x for x in SAMPLES[check] if not names or any(part in str(x) for part in names)]
    return named[first::count]


def worker(check: str, first: str, count: str, *names: str) -> int:
    """A process's samples. Kernels for a sanitizer know the lines that they come from, which
    leaves their machine code as it is, and work a head after the other: those of a sample would all
    be of one section."""
    if check == "once":
        build_nvrtc.OPTIONS += ("--generate-line-info",)
        cuda_sm90_parameters.SECTION_BYTES = 1
    return sum([say(x, CHECKS[check](x)) for x in share(check, names, int(first), int(count))])


@dataclass
class Shard:
    """A process that has some samples to check; its output is in a file."""

    label: str
    samples: list[str]
    log: Path
    process: subprocess.Popen

    def wrong(self) -> dict[str, str]:
        """What was wrong with which sample, of those reached and those not."""
        said = dict(line.rsplit(" -> ", 1) for line in self.text().splitlines() if " -> " in line)
        found = {x: said.get(x, "not reached") for x in self.samples}
        if self.process.returncode and all(x == "ok" for x in found.values()):
            found["exit"] = f"{self.process.returncode}: {self.text()[-600:]}"
        return {x: y for x, y in found.items() if y != "ok"}

    def end(self) -> None:
        """Stops it; a sanitizer is given the time to write what it has found."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(3)
                return

    def text(self) -> str:
        return self.log.read_text(errors="replace")


def dealt(
    check: str, names: Sequence[str], count: int, folder: Path, tool: str = ""
) -> list[Shard]:
    """`count` processes, under a sanitizer's tool if need be, that share the samples of a check."""
    environment = dict(os.environ)
    if check == "once":
        environment["FA3_CACHE_DIR"] = str(folder / "kernels")
    if tool:
        # Every tensor in an allocation of its own, so that reads beside one are found.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    shards = []
    for i in range(min(count, len(share(check, names, 0, 1)))):
        program = [__file__, "worker", check, str(i), str(count), *names]
        command = sanitizer.command(tool, program) if tool else [sys.executable, *program]
        log = folder / f"{tool or check}{i}.txt"
        process = subprocess.Popen(
            command, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        samples = [str(x) for x in share(check, names, i, count)]
        shards.append(Shard(log.stem, samples, log, process))
    return shards


def finish(shards: list[Shard], deadline: float) -> int:
    """Waits for them; how many samples are wrong, each of them printed."""
    wrong = 0
    for shard in shards:
        try:
            shard.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            shard.end()
        found = shard.wrong()
        done = len(shard.samples) - len(found.keys() & set(shard.samples))
        print(f"{shard.label}: {done} of {len(shard.samples)} right", flush=True)
        for name, said in found.items():
            say(f"  {name}", said)
        if "not reached" in found.values():
            print(shard.text()[-1500:], flush=True)
        wrong += len(found)
    return wrong


def reported(tool: str, shards: list[Shard]) -> int:
    """Prints a sanitizer's findings, and keeps its log; how many are errors."""
    log = "".join(x.text() for x in shards)
    (OUT / f"sm90_{tool}.txt").write_text(log)
    found = sanitizer.findings(log)
    for kind, said in found.items():
        print(f"{tool}, {kind}: {sum(said.values())}")
        print("".join(f"  {n} x {x}\n" for x, n in said.most_common(12)), end="", flush=True)
    return sum(found["error"].values())


def check(wanted: Sequence[str], names: Sequence[str]) -> int:
    deadline = time.monotonic() + float(os.environ.get("BUDGET", "600"))
    begun, wrong = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        half = max(1, WORKERS // 2)
        shards = dealt("repeated", names, half, folder) if "repeat" in wanted else []
        if "sanitize" in wanted:  # NVRTC and Triton would be slow under a tool
            shards += dealt("once", names, half, folder)
        if "sizes" in wanted:
            wrong += sizes()
        wrong += finish(shards, deadline)
        print(f"{time.monotonic() - begun:.0f} s", flush=True)
        if "sanitize" in wanted:
            tools = {x: dealt("once", names, half, folder, x) for x in ("memcheck", "racecheck")}
            for tool, under in tools.items():
                wrong += finish(under, deadline)
                wrong += reported(tool, under)
            print(f"{time.monotonic() - begun:.0f} s", flush=True)
    print("all right" if not wrong else f"{wrong} wrong", flush=True)
    return wrong


def main() -> int:
    mode, *rest = sys.argv[1:] or [""]
    if mode == "worker":
        return worker(*rest)
    modes = ("repeat", "sizes", "sanitize")
    if mode not in (*modes, "all"):
        raise SystemExit(__doc__)
    if not all(any(part in str(x) for x in SANITIZED + REPEATED) for part in rest):
        raise SystemExit(f"no sample is called so: {rest}")
    return check(modes if mode == "all" else [mode], rest)


if __name__ == "__main__":
    raise SystemExit(1 if main() else 0)
