"""Launches on a GPU: CUDA graphs, streams, growing caches, tuning, several devices."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fa3_compile.backend import fa3
from fa3_compile.lower.binaries import build_ahead
from fa3_compile.lower.binaries.build_nvrtc import load
from fa3_compile.options import Options
from fa3_compile.pipeline import rewrite_attention
from fa3_compile.runtime.launch import Attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA GPU is needed"),
]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
each_family = pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            "cuda_sm90", marks=pytest.mark.skipif(not HOPPER, reason="a Hopper GPU is needed")
        ),
        "triton",
    ],
)


def attention(q, k, v, keep):
    """Causal, with key padding: the kernel needs a counter, lists of key blocks and row fills."""
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    hidden = hidden | (keep[:, None, None, :] == 0)
    scores = (q @ k.transpose(-1, -2) / 8).masked_fill(hidden, torch.finfo(q.dtype).min)
    return torch.softmax(scores, -1) @ v


# The same as a spec: three kernels of cuda_sm90, two of the Triton family from 1024 keys on.
PADDED = (
    "attention(score=0.125*s, mask=(kv <= q) & (load(0, b, kv) != 0), dead=score,"
    " fill=0.125*s - 3.3895313892515355e+38, aux=[int])"
)


def inputs(length: int = 300, device: str = "cuda"):
    q, k, v = (torch.randn(2, 4, length, 64, device=device).bfloat16() for _ in range(3))
    keep = torch.ones(2, length, dtype=torch.int64, device=device)
    keep[1, : length // 3] = 0
    return q, k, v, keep


def assert_right(got, arguments) -> None:
    q, k, v, keep = arguments
    want = attention(q.double(), k.double(), v.double(), keep)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=0.02)


@each_family
def test_cuda_graphs_replay_with_new_inputs(family):
    def backend(gm, example_inputs):
        return fa3(gm, example_inputs, mode="reduce-overhead", options={"kernels": family})

    compiled = torch.compile(attention, backend=backend, dynamic=False)
    with torch.no_grad():
        for _ in range(5):
            arguments = inputs()
            torch.compiler.cudagraph_mark_step_begin()
            assert_right(compiled(*arguments).clone(), arguments)


@each_family
def test_the_stream_is_the_current_one(family):
    compiled = torch.compile(attention, backend=fa3, options={"kernels": family})
    arguments = inputs()
    with torch.no_grad():
        compiled(*arguments)
        torch.cuda.synchronize()
        for _ in range(3):
            stream = torch.cuda.Stream()
            q, k, v, keep = inputs()
            late = torch.zeros_like(q)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)
                late.copy_(q)  # on another stream the kernel would read zeros
                out = compiled(late, k, v, keep)
            stream.synchronize()
            assert_right(out, (q, k, v, keep))


def different_calls(family: str, count: int):
    """A bound call, and arguments and outputs of several whose lists of blocks differ."""
    call = Attention(f"{PADDED} #;kernels={family}", fixed=True, lse=False)
    arguments = []
    for i in range(count):
        q, k, v, keep = inputs(1024)
        keep[0, 128 * i : 128 * i + 300] = 0
        assert_right(call(q, k, v, [keep], [])[0], (q, k, v, keep))
        arguments.append((q, k, v, [keep], []))
    return call, arguments, [call(*x)[0].clone() for x in arguments]


@each_family
@pytest.mark.parametrize("streams", [1, 4])
def test_threads(family, streams):
    """Each call's kernels see what its own kernels before them have left."""
    call, arguments, wanted = different_calls(family, 4)
    made = [torch.cuda.Stream() for _ in range(streams)]
    torch.cuda.synchronize()

    def work(i: int) -> bool:
        with torch.cuda.stream(made[i % streams]):
            found = [call(*arguments[i])[0] for _ in range(100)]
            made[i % streams].synchronize()
        return all(torch.equal(x, wanted[i]) for x in found)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))


@each_family
def test_a_graph_beside_other_calls(family):
    call, arguments, wanted = different_calls(family, 2)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        captured, _ = call(*arguments[0])
    for _ in range(30):
        with torch.cuda.stream(stream):
            graph.replay()
        out, _ = call(*arguments[1])
        torch.cuda.synchronize()
        assert torch.equal(captured, wanted[0]) and torch.equal(out, wanted[1])
        captured.zero_()


@each_family
def test_layers_that_share_their_lists(family):
    def layers(q, k, v, keep):
        for _ in range(4):
            q = attention(q, k, v, keep)
        return q

    compiled = torch.compile(layers, backend=fa3, options={"kernels": family}, dynamic=False)
    left, right = slice(0, 300), slice(900, None)
    with torch.no_grad():
        # Other lists in each run; on the left there are rows without a key, which layers look for
        # until they know of none.
        for hidden in (left, right, right, slice(0, 500), right, left):
            q, k, v, keep = inputs(1024)
            keep[:] = 1
            keep[0, hidden] = 0
            want = layers(q.double(), k.double(), v.double(), keep)
            got = compiled(q, k, v, keep)
            torch.testing.assert_close(got.double(), want, rtol=0, atol=0.03)


@pytest.mark.skipif(not HOPPER, reason="a Hopper GPU is needed")
def test_a_growing_cache_builds_nothing_new():
    call = Attention("attention(score=0.125*s) #;kernels=cuda_sm90")
    q, k, v, _ = inputs(400)
    for length in range(300, 400):
        if length == 301:
            built = load.cache_info().misses
        keys, values = k[:, :, :length], v[:, :, :length]
        out, _ = call(q[:, :, :1], keys, values, [], [])
        want = torch.nn.functional.scaled_dot_product_attention(q[:, :, :1], keys, values)
        torch.testing.assert_close(out, want, rtol=0, atol=0.02)
    assert load.cache_info().misses == built


def biased(q, k, v, keep, bias):
    return torch.softmax(q @ k.mT / 8 + bias, -1) @ v


def softcapped(q, k, v, keep):
    return torch.softmax(torch.tanh(q @ k.mT / 80) * 10, -1) @ v


@pytest.mark.skipif(not HOPPER, reason="a Hopper GPU is needed")
@pytest.mark.parametrize("form", [attention, softcapped, biased])
def test_what_is_built_ahead_is_what_runs(form, monkeypatch):
    monkeypatch.setattr(build_ahead, "begin", lambda build, problem: begun.append(build(problem)))
    begun, loaded = [], []

    def backend(gm, example_inputs):
        rewrite_attention(gm, Options(), build=True)
        loaded.append(load.cache_info().misses)
        return gm

    arguments = inputs()
    if form is biased:
        arguments += (torch.randn(2, 4, 300, 304, device="cuda").bfloat16()[..., :300],)
    for x in arguments:
        x.requires_grad_(x.is_floating_point())
    with torch.autograd.set_multithreading_enabled(False):
        torch.compile(form, backend=backend)(*arguments).float().sum().backward()
    assert len(begun) == 2 and loaded == [load.cache_info().misses]


@pytest.mark.skipif(not HOPPER, reason="a Hopper GPU is needed")
@pytest.mark.parametrize("effort", ["quick", "full"])
def test_tuned_kernels_are_right_and_kept(effort, tmp_path, monkeypatch):
    monkeypatch.setenv("FA3_CACHE_DIR", str(tmp_path))
    text = f"attention(score=0.125*s, mask=kv <= q, dead=nan) #;autotune={effort};kernels=cuda_sm90"
    q, k, v, _ = inputs(700)
    out, _ = Attention(text, fixed=True)(q, k, v, [], [])
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, want, rtol=0, atol=0.02)
    assert len(list(tmp_path.glob("tuned/*/config.json"))) == 1


@each_family
def test_a_thread_that_never_called_cuda(family):
    """Its memory comes from PyTorch's cache, so that the kernel is its first call."""
    call = Attention(f"attention(score=0.125*s) #;kernels={family}")
    q, k, v, _ = inputs()
    want, _ = call(q, k, v, [], [])
    del _
    kept = [torch.empty_like(want) for _ in range(4)]
    torch.cuda.synchronize()
    del kept
    with ThreadPoolExecutor(1) as threads:
        out, _ = threads.submit(call, q, k, v, [], []).result()
    assert torch.equal(out, want)


@each_family
def test_a_call_on_another_device_than_the_current_one(family):
    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")
    compiled = torch.compile(attention, backend=fa3, options={"kernels": family})
    with torch.no_grad():
        for index in (0, 1, 0, 1):
            arguments = inputs(device=f"cuda:{index}")
            assert_right(compiled(*arguments), arguments)
            assert torch.cuda.current_device() == 0


def test_nothing_of_a_call_stays_behind():
    """No memory of the device is kept by bound kernels."""
    call = Attention("attention(score=0.125*s)")
    q, k, v, _ = inputs(400)
    call(q, k, v, [], [])
    before = torch.cuda.memory_allocated()
    for length in range(200, 300):
        call(q[:, :, :length], k, v, [], [])
    assert torch.cuda.memory_allocated() == before


# The last ones: a capture that fails leaves PyTorch's generator unusable.


@each_family
def test_a_first_call_while_another_thread_captures(family):
    """Its kernels are built and loaded, and its stream is new; later ones are graphs. PyTorch's
    allocator would end the capture: what it gives is freed within, as `torch.cuda.graph` empties
    its cache."""
    captured = Attention(f"{PADDED} #;kernels={family}", fixed=True, lse=False)
    other = Attention(PADDED.replace("0.125", "0.25") + f" #;kernels={family}", fixed=True)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    q, k, v, keep = inputs(1024)
    want, _ = captured(q, k, v, [keep], [])
    with torch.cuda.stream(stream):
        kept = [torch.empty(size, device="cuda") for size in (2**10, 2**18, 2**22) * 8]
    torch.cuda.synchronize()

    def work():
        with torch.cuda.stream(stream):
            return [other(q, k, v, [keep], [])[0] for _ in range(3)]

    with ThreadPoolExecutor(1) as threads, torch.cuda.graph(graph):
        out, _ = captured(q, k, v, [keep], [])
        del kept
        found = threads.submit(work).result()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want)
    want, _ = other(q, k, v, [keep], [])
    assert all(torch.equal(x, want) for x in found)


@each_family
def test_a_first_call_that_a_graph_captures(family):
    """Built, loaded and bound within the capture."""
    call = Attention(PADDED.replace("0.125", "0.2") + f" #;kernels={family}", fixed=True)
    q, k, v, keep = inputs(1024)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = call(q, k, v, [keep], [])
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, call(q, k, v, [keep], [])[0])
