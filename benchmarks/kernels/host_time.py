"""What a call costs the host: launches, binding, building, tuning.

    python benchmarks/kernels/host_time.py [calls] [parts] [cache] [build] [ahead] [tune] [dead]

on a CUDA GPU; all of them where none is named:

calls   microseconds a call, of each way to a kernel, against SDPA's
parts   microseconds of what a launch consists of
cache   a KV cache that grows by a token a call
build   a kernel from source, and from the cache on disk in a new process
ahead   what cold kernels add to a model's first step, where they are built while it is compiled
tune    autotune="quick" and "full"
dead    milliseconds of an attention in which some rows see no key, host and device
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from fa3_compile.backend import fa3
from fa3_compile.lower import dispatch
from fa3_compile.lower.binaries import build_ahead
from fa3_compile.lower.bound import BindingKernel
from fa3_compile.lower.choose import kernels
from fa3_compile.lower.inductor import install
from fa3_compile.lower.tiles.tune import seconds
from fa3_compile.runtime import op
from fa3_compile.runtime.launch import Attention

CAUSAL = "attention(score=0.125*s, mask=kv <= q, dead=nan, out_order=bqhd)"
PADDED = (
    "attention(score=0.125*s, mask=(kv <= q) & (load(0, b, kv) != 0), dead=score,"
    " fill=0.125*s - 3.3895313892515355e+38, aux=[int], out_order=bqhd)"
)
DOCUMENTS = (
    "attention(score=0.125*s, mask=(kv <= q) & (load(0, b, q) == load(0, b, kv)), dead=nan,"
    " aux=[int], out_order=bqhd)"
)
SPECS = (
    CAUSAL,
    "attention(score=20.0*tanh(0.00625*s), mask=kv <= q, dead=nan)",
    "attention(score=0.125*s + load(0, h)*(kv - q), mask=kv <= q, dead=nan, aux=[float])",
    "attention(score=0.125*s, mask=(kv <= q) & (q - kv < 100), dead=nan)",
    "attention(score=0.125*s + load(0, 0, h, q, kv), aux=[float])",
    "attention(score=0.125*s, mask=load(0, b, q) == load(0, b, kv), dead=zero, aux=[int])",
)
CHAIN = 9


def tensors(length: int = 256, keys: int = 256, heads: int = 8) -> list[Tensor]:
    return [
        torch.randn(2, n, heads, 64, device="cuda").bfloat16().transpose(1, 2)
        for n in (length, keys, keys)
    ]


def microseconds(call: Callable, count: int = 20, rounds: int = 15) -> float:
    """Lower quartile over rounds of the time to queue a call: Inductor's compile workers may start
    beside them. The device is idle when a round starts."""
    call()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - start) / count * 1e6)
    return sorted(times)[rounds // 4]


def in_chain(attention: Callable[[Tensor, Tensor, Tensor], Tensor], q, k, v, **options) -> float:
    """Microseconds that one more attention costs a compiled model."""

    def one(q, k, v):
        return attention(q, k, v)

    def many(q, k, v):
        for _ in range(CHAIN):
            q = attention(q, k, v)
        return q

    took = []
    for model in (one, many):
        torch._dynamo.reset()
        compiled = torch.compile(model, **options)
        took.append(microseconds(partial(compiled, q, k, v), rounds=31))
    return (took[1] - took[0]) / (CHAIN - 1)


def operator(aux: list[Tensor], text: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.fa3.attention(q, k, v, aux, [], text)[0]


def calls() -> None:
    install()
    sdpa = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    q, k, v = tensors()
    ones = torch.ones(2, 256, dtype=torch.int64, device="cuda")
    from_90 = (torch.arange(256, device="cuda") >= 90).long().expand(2, -1).contiguous()
    with torch.no_grad():
        print(f"sdpa: eager {microseconds(partial(sdpa, q, k, v)):.1f} us, "
              f"in a compiled model {in_chain(sdpa, q, k, v):.1f} us", flush=True)  # fmt: skip
        for name in ("cuda_sm90", "triton"):
            for form, spec, aux in (
                ("causal", CAUSAL, []), ("padded causal", PADDED, [ones]),
                ("left-padded causal", PADDED, [from_90]), ("documents", DOCUMENTS, [ones]),
            ):  # fmt: skip
                text = f"{spec} #;kernels={name}"
                problem = dispatch.make_problem(text, q, k, v, aux)
                kernel = next(x for x in kernels() if x.name == name)
                if not isinstance(kernel, BindingKernel) or kernel.supports(problem):
                    continue
                launch = kernel.bound(problem, q, k, v, aux, ())
                assert launch is not None

                attention = partial(operator, aux, text)
                fixed, keyed = Attention(text, fixed=True), Attention(text)
                unread = Attention(text, fixed=True, lse=False)
                for x in (fixed, unread):
                    x(q, k, v, aux, [])  # .call is another one from here on
                took = {
                    "launch alone": partial(launch, q, k, v, aux),
                    "fixed": partial(fixed.call, q, k, v, aux, []),
                    "without LSE": partial(unread.call, q, k, v, aux, []),
                    "looked up": partial(keyed, q, k, v, aux, []),
                    "run": partial(kernel.run, problem, q, k, v, aux, ()),
                    "operator": partial(attention, q, k, v),
                }
                line = ", ".join(f"{what} {microseconds(x):.1f}" for what, x in took.items())
                chain = in_chain(attention, q, k, v)
                print(f"{name}, {form}: {line}, "
                      f"in a compiled model {chain:.1f} us", flush=True)  # fmt: skip


def parts() -> None:
    """What lower/launch/launch_calls.py writes down, one thing at a time."""
    from fa3_compile.lower.launch.launch_cuda import NAMES, driver, empty_cuda

    q, k, v = tensors()
    problem = dispatch.make_problem(CAUSAL, q, k, v, [])
    kernel = next(x for x in kernels() if x.name == "cuda_sm90")
    assert isinstance(kernel, BindingKernel)
    bound: Any = kernel.bound(problem, q, k, v, [], ())
    launch = bound.launches[0]
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device="cuda")
    counter = torch.zeros(1, dtype=torch.int32, device="cuda")
    addresses = [x.data_ptr() for x in (q, k, v, out, lse, *[counter] * 3)]
    stream = torch._C._cuda_getCurrentRawStream(0)
    block = launch.block(dict(zip(NAMES, addresses)))
    arguments = (*launch.arguments, stream, block.pointer, 0)
    shape, strides = tuple(q.shape), tuple(q.stride())
    for name, call in {
        "a launch with its parameters": lambda: launch(stream, addresses),
        "cuLaunchKernel": lambda: driver().cuLaunchKernel(*arguments),
        "an output's memory": lambda: empty_cuda(shape, strides, torch.bfloat16),
        "the same by torch.empty": lambda: torch.empty(shape, dtype=q.dtype, device="cuda"),
        "current stream": lambda: torch._C._cuda_getCurrentRawStream(0),
        "current device": torch._C._cuda_getDevice,
        "whether capturing": torch._C._cuda_isCurrentStreamCapturing,
        "seven addresses": lambda: [x.data_ptr() for x in (q, k, v, q, k, v, v)],
    }.items():
        print(f"{name}: {microseconds(call):.2f} us", flush=True)


def cache() -> None:
    """The first call for each length, and the next."""
    for name in ("cuda_sm90", "triton"):
        call = Attention(f"attention(score=0.125*s) #;kernels={name}")
        other = Attention(f"attention(score=0.125*s) #;kernels={name}")
        q, k, v = tensors(1, 2048)
        first, second, again = [], [], []
        for length in range(1000, 1300):
            torch.cuda.synchronize()
            arguments = (q, k[:, :, :length], v[:, :, :length], [], [])
            for times, attention in ((first, call), (second, other), (again, call)):
                start = time.perf_counter()
                attention(*arguments)
                times.append((time.perf_counter() - start) * 1e6)
        middle = [sorted(x)[len(x) // 2] for x in (first, second, again)]
        print(f"{name}, growing cache: first call of a length {middle[0]:.0f} us, slowest "
              f"{max(first[1:]):.0f}; the next layer's {middle[1]:.0f} us; then {middle[2]:.1f} us",
              flush=True)  # fmt: skip


def captured(spec: str) -> list[Tensor]:
    if "load(0, h)" in spec:
        return [torch.rand(8, device="cuda")]
    if "load(0, 0, h, q, kv)" in spec:
        return [torch.rand(1, 8, 256, 256, device="cuda").bfloat16()]
    if "load(0, b" in spec:
        return [torch.zeros(2, 256, dtype=torch.int64, device="cuda")]
    return []


def build_each() -> None:
    """In a process of its own: milliseconds to the end of the first call of each spec, and where
    it is not one how many kernels it built or loaded until one did not spill."""
    from fa3_compile.lower.binaries.build_nvrtc import load

    q, k, v = tensors()
    torch.cuda.synchronize()
    took = []
    for spec in SPECS:
        aux = captured(spec)
        torch.cuda.synchronize()
        before, start = load.cache_info().misses, time.perf_counter()
        Attention(f"{spec} #;kernels=cuda_sm90", fixed=True)(q, k, v, aux, [])
        took.append(f"{(time.perf_counter() - start) * 1e3:.0f}")
        if (count := load.cache_info().misses - before) != 1:
            took[-1] += f" ({count})"
    print(", ".join(took))


def build() -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ, FA3_CACHE_DIR=folder)
        for what in ("cold", "warm", "warm"):
            command = [sys.executable, __file__, "build_each"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            print(f"{what}, ms: {done.stdout.strip() or done.stderr[-800:]}", flush=True)


def step_each() -> None:
    """In a process of its own: seconds of a block's first training step, forward and backward, and
    of those what was spent waiting for kernels."""
    from fa3_compile.lower.binaries import build_nvrtc

    waited, load_first = [0.0], build_nvrtc.load_first

    def timed(*arguments, **options):
        start = time.perf_counter()
        try:
            return load_first(*arguments, **options)
        finally:
            if threading.current_thread() is threading.main_thread():
                waited[-1] += time.perf_counter() - start

    def block(x, w_in, w_out, w_up, w_down):
        b, s, c = x.shape
        q, k, v = (y.view(b, s, -1, 64).transpose(1, 2) for y in (x @ w_in).split(c, dim=2))
        scores = (q @ k.mT * 0.125).masked_fill(causal == 0, float("-inf"))
        y = (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(b, s, c)
        x = torch.nn.functional.layer_norm(x + y @ w_out, (c,))
        return torch.nn.functional.layer_norm(x + torch.relu(x @ w_up) @ w_down, (c,))

    # Both look it up in their own module.
    from fa3_compile.lower.kernels import cuda_sm90, cuda_sm90_backward_keys

    cuda_sm90.load_first = cuda_sm90_backward_keys.load_first = timed
    if sys.argv[2] == "alone":
        build_ahead.begin = lambda build, problem: None
    causal = torch.ones(512, 512, device="cuda").tril()
    widths = ((512, 1536), (512, 512), (512, 2048), (2048, 512))
    options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    x = torch.randn(2, 512, 512, **options)
    weights = [torch.randn(shape, **options) for shape in widths]
    torch.cuda.synchronize()
    start = time.perf_counter()
    out = torch.compile(block, backend=fa3)(x, *weights)
    torch.cuda.synchronize()
    forward = time.perf_counter() - start
    waited.append(0.0)
    start = time.perf_counter()
    # autograd's own thread would not count as the one that waits
    with torch.autograd.set_multithreading_enabled(False):
        out.backward(torch.ones_like(out))
    torch.cuda.synchronize()
    backward = time.perf_counter() - start
    print(f"forward {forward:.2f} s, {waited[0]:.2f} of it for kernels; "
          f"backward {backward:.2f}, {waited[1]:.2f}")  # fmt: skip


def ahead() -> None:
    for what in ("alone", "ahead", "warm"):
        with tempfile.TemporaryDirectory() as folder:
            environment = dict(os.environ, FA3_CACHE_DIR=folder)
            for _ in range(1 + (what == "warm")):
                environment["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=folder)
                command = [sys.executable, __file__, "step_each", what]
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
        print(f"{what}: {done.stdout.strip() or done.stderr[-800:]}", flush=True)


def tune() -> None:
    q, k, v = tensors(2048, 2048, 16)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FA3_CACHE_DIR"] = folder
        for effort in ("quick", "full"):
            for _ in range(2):
                start = time.perf_counter()
                text = f"{CAUSAL} #;autotune={effort};kernels=cuda_sm90"
                Attention(text, fixed=True)(q, k, v, [], [])
                print(f"autotune={effort}: {time.perf_counter() - start:.2f} s", flush=True)
                for kernel in kernels():
                    getattr(kernel, "_bound", {}).clear()
        for record in Path(folder).glob("tuned/*/config.json"):
            print(record.read_text().replace("\n", "")[:1500], flush=True)


def dead() -> None:
    for batch, heads, length, dim in ((2, 8, 256, 64), (8, 16, 2048, 64), (2, 16, 8192, 128)):
        q, k, v = (
            torch.randn(batch, length, heads, dim, device="cuda").bfloat16().transpose(1, 2)
            for _ in range(3)
        )
        took = []
        for padded in (0, length // 2):
            keep = (torch.arange(length, device="cuda") >= padded).long().expand(batch, -1)
            call = Attention(f"{PADDED} #;kernels=cuda_sm90", fixed=True, lse=False)
            shared: list = []
            arguments = (q, k, v, [keep.contiguous()], [])
            call(*arguments)
            launch = partial(call.call, *arguments, shared)
            launch()
            torch.cuda.synchronize()
            took.append(f"{padded} padded: host {microseconds(launch):.1f} us, "
                        f"device {seconds(launch, 50) * 1e3:.4f} ms")  # fmt: skip
        print(f"B{batch} H{heads} S{length} D{dim}: {'; '.join(took)}", flush=True)


def main() -> None:
    assert op.LIBRARY is not None
    if sys.argv[1:2] == ["step_each"]:
        return step_each()
    for name in sys.argv[1:] or ["calls", "parts", "cache", "build", "ahead", "tune", "dead"]:
        globals()[name]()


if __name__ == "__main__":
    main()
