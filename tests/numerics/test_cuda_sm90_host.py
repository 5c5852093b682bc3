"""What a call of `cuda_sm90` does on the host, up to its launches, against a driver as strict as a
GPU's: allocations, tensor maps, parameters and grids, forward and backward."""

from __future__ import annotations

import functools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fa3_compile.lower.binaries.build_nvrtc import Built
from fa3_compile.lower.dispatch import make_problem
from fa3_compile.lower.kernels import (
    cuda_sm90,
    cuda_sm90_backward,
    cuda_sm90_lists,
    cuda_sm90_parameters,
)
from fa3_compile.lower.kernels.cuda_sm90_forward_parameters import ForwardParameters
from fa3_compile.lower.kernels.cuda_sm90_parameters import section_of
from fa3_compile.lower.launch import launch_calls, stream_reports, stream_scratch
from fa3_compile.lower.launch.launch_cuda import Launch, driver
from fa3_compile.runtime.launch import Attention, AttentionBackward
from tests.host_driver import (
    DEVICE,
    STREAM,
    Devices,
    OnDevice,
    allocations,
    captured,
    current_device,
    graphs_launched,
    kernels_of,
    launches,
    on_device,
    stream_of,
)
from tests.numerics.forms import BY_NAME, Shape, inputs

__all__ = ["launches"]

# The kernels that a form launches, forward and backward; "" where another family's gradients run.
FORMS = {
    "full": ("attention_fwd", "row_terms attention_bwd"),
    "causal": ("attention_fwd", "row_terms attention_bwd query_gradient"),
    "left padding": (
        "block_map attention_fwd dead_rows",
        "block_map row_terms attention_bwd",
    ),
    "documents": ("block_map attention_fwd", "block_map row_terms attention_bwd"),
    "dense bias": ("attention_fwd", "row_terms attention_bwd query_gradient nan_values"),
    "relative bias": ("distance_table attention_fwd", "row_terms attention_bwd nan_values"),
    "dense mask": ("block_map attention_fwd", "block_map row_terms attention_bwd"),
    "sink": ("attention_fwd", "row_terms attention_bwd"),
    "dropout, causal": ("attention_fwd", "row_terms attention_bwd query_gradient"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def kernels(monkeypatch, tmp_path, launches):
    """Kernels without effect in place of what NVRTC would build."""

    @functools.cache
    def built(key) -> Built:
        to = tmp_path / f"{key.digest}.so"
        return Built(bytes(kernels_of(key.source(), to)) + b"\0", "", 168, 0, False)

    for module, name in ((cuda_sm90, "load_first"), (cuda_sm90_backward, "load_best")):
        monkeypatch.setattr(module, name, lambda keys, **_: (keys[0], built(keys[0])))


def of_form(name: str, shape: Shape, gpu: int = 0):
    return on_device(inputs(BY_NAME[name], shape, torch.bfloat16, "cpu"), gpu)


@pytest.mark.parametrize("name", FORMS)
def test_forward_and_backward_reach_their_launches(name: str, launches) -> None:
    form, (forward, backward) = BY_NAME[name], FORMS[name]
    q, k, v, aux = of_form(name, Shape(2, 4, 2, 150, 150, 64, 64))
    text = f"{form.spec()} #;kernels=cuda_sm90"
    for _ in range(2):
        out, lse = Attention(text)(q, k, v, aux, form.sizes)
    assert [x.name for x in launches] == forward.split() * 2
    assert {x.stream for x in launches} == {STREAM}
    assert (out.shape, lse.shape, out.device) == (q.shape, q.shape[:3], DEVICE)
    launches.clear()
    scored = [x.is_floating_point() and x.dtype == q.dtype for x in aux]
    needs = [True, True, True, *scored]
    call = AttentionBackward(text, needs)
    for dlse in (None, torch.ones((), device=DEVICE).expand(lse.shape)):
        dq, dk, dv, daux = call(out, dlse, q, k, v, out, lse, aux, form.sizes)
    assert [x.name for x in launches] == backward.split() * 2
    assert [x.shape for x in (dq, dk, dv)] == [q.shape, k.shape, v.shape]
    assert [x.shape for x in daux] == [x.shape if n else (0,) for x, n in zip(aux, scored)]
    assert all(isinstance(x, OnDevice) for x in (dq, dk, dv, *daux))


def test_lists_that_lengths_decide_are_made_once(launches) -> None:
    q, k, v, _ = of_form("global and window", Shape(1, 2, 1, 200, 200, 64, 64))
    call = Attention(f"{BY_NAME['global and window'].spec()} #;kernels=cuda_sm90")
    for queries in (q, q, q.transpose(1, 2).contiguous().transpose(1, 2)):
        call(queries, k, v, [], [])
    assert [x.name for x in launches] == ["block_map"] + ["attention_fwd"] * 3


def of_no_grid(launch: Launch) -> Launch:
    """A launch that the driver refuses."""
    launch.arguments = (*launch.arguments[:1], 0, *launch.arguments[2:])
    return launch


def test_lists_whose_kernel_is_refused_leave_no_memory_behind(launches, monkeypatch) -> None:
    block_map = ForwardParameters.block_map
    monkeypatch.setattr(ForwardParameters, "block_map", lambda self: of_no_grid(block_map(self)))
    q, k, v, _ = of_form("global and window", Shape(1, 2, 1, 200, 200, 64, 64))
    call = Attention(f"{BY_NAME['global and window'].spec()} #;kernels=cuda_sm90")
    before = allocations()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="could not be launched: CUDA_ERROR_INVALID_VALUE"):
            call(q, k, v, [], [])
    assert allocations() == before and not cuda_sm90_lists._kept


def test_scratch_memory_is_the_streams_and_comes_back(launches, monkeypatch) -> None:
    """One piece for all shapes; a call that finds it taken, or is captured, has its own; a launch
    that is refused leaves it."""
    form = BY_NAME["left padding"]
    monkeypatch.setattr(launch_calls, "stream_scratch", lambda device: scratch)
    scratch = stream_scratch.StreamScratch(0)
    call = Attention(f"{form.spec()} #;kernels=cuda_sm90", fixed=True, lse=False)
    before = allocations()
    q, k, v, aux = of_form("left padding", Shape(2, 4, 2, 150, 150, 64, 64))
    call(q, k, v, aux, form.sizes)
    out, lse = call(q, k, v, aux, form.sizes)
    assert allocations() == before + 1 and lse is None and out.shape == q.shape
    [[address]] = scratch.values()
    scratch[STREAM].clear()  # as while another thread queues its kernels
    call(q, k, v, aux, form.sizes)
    assert scratch == {STREAM: []}
    scratch[STREAM].append(address)
    [bound] = call._calls.values()
    of_no_grid(bound.launches[-1])
    refused = bound.fixed(None, lse=False)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="could not be launched"):
            refused(q, k, v, aux)
    assert scratch == {STREAM: [address]} and allocations() == before + 1

    def no_memory(*_):
        raise MemoryError

    shared: list = []
    monkeypatch.setattr(launch_calls, "empty_cuda", no_memory)
    for _ in range(2):
        with pytest.raises(MemoryError):
            refused(q, k, v, aux, (), shared)
    assert scratch == {STREAM: [address]} and not shared


def test_lists_are_made_once_for_calls_that_share_them(launches, monkeypatch) -> None:
    form = BY_NAME["left padding"]
    q, k, v, aux = of_form("left padding", Shape(2, 4, 2, 150, 150, 64, 64))
    call = Attention(f"{form.spec()} #;kernels=cuda_sm90", fixed=True, lse=False)
    call(q, k, v, aux, form.sizes)
    launches.clear()
    shared: list = []
    for _ in range(2):
        call.call(q, k, v, aux, form.sizes, shared)
    both = ["attention_fwd", "dead_rows"]
    assert [x.name for x in launches] == ["block_map", *both, *both]
    launches.clear()
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 7)
    [bound] = call._calls.values()
    bound.fixed(None)(q, k, v, aux, form.sizes, shared)  # another stream
    assert [x.name for x in launches] == ["block_map", *both]


def test_rows_without_a_key_are_looked_for_until_there_are_known_to_be_none(
    launches, monkeypatch
) -> None:
    form = BY_NAME["left padding"]
    q, k, v, aux = of_form("left padding", Shape(2, 4, 2, 150, 150, 64, 64))
    call = Attention(f"{form.spec()} #;kernels=cuda_sm90", fixed=True, lse=False)
    call(q, k, v, aux, form.sizes)
    _, told = stream_reports.stream_reports(0)[STREAM]
    [bound] = call._calls.values()

    def names(shared: list | None = None) -> list[str]:
        launches.clear()
        bound.fixed(None)(q, k, v, aux, form.sizes, shared)
        return [x.name for x in launches]

    shared, other, both = [], [], ["attention_fwd", "dead_rows"]
    assert names(shared) == names(other) == ["block_map", *both]
    told[0] = other[3]
    assert names(shared) == both
    assert names(other) == both[:1]
    told[0] = shared[3]
    assert names(shared) == both[:1]
    assert names(other) == both
    assert names() == ["block_map", *both]
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: True)
    assert names(shared) == both
    inside: list = []
    assert names(inside) == ["block_map", *both] and inside[3] == 0
    told[0] = 0
    assert names(inside) == both


def test_only_streams_that_last_have_memory_of_their_own(launches, monkeypatch) -> None:
    """CUDA gives the handle of a stream that was destroyed to another one."""
    form = BY_NAME["left padding"]
    scratch = stream_scratch.StreamScratch(0)
    monkeypatch.setattr(launch_calls, "stream_scratch", lambda device: scratch)
    handle = 0x7F00
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: handle)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentStream", lambda index: (handle, index, 1))
    q, k, v, aux = of_form("left padding", Shape(2, 4, 2, 150, 150, 64, 64))
    call = Attention(f"{form.spec()} #;kernels=cuda_sm90", fixed=True, lse=False)
    for _ in range(2):
        call(q, k, v, aux, form.sizes)
    assert [x.stream for x in launches] == [handle] * 6 and not scratch
    [bound] = call._calls.values()
    assert not bound.counters and handle not in stream_reports.stream_reports(0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentStream", lambda index: (7, index, 1))
    call(q, k, v, aux, form.sizes)
    assert scratch.keys() == {handle} == bound.counters.keys()


@pytest.mark.parametrize("own", [False, True], ids=["of another thread", "its own"])
@pytest.mark.parametrize("name", ["left padding", "global and window"])
def test_the_first_call_ends_no_capture(name: str, own: bool, launches, monkeypatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: own)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: own)
    form = BY_NAME[name]
    q, k, v, aux = of_form(name, Shape(1, 2, 1, 200, 200, 64, 64))
    text = f"{form.spec()} #;kernels=cuda_sm90"
    with captured():
        out, lse = Attention(text)(q, k, v, aux, form.sizes)
        backward = AttentionBackward(text, [True] * 3 + [False] * len(aux))
        backward(out, None, q, k, v, out, lse, aux, form.sizes)
    with pytest.raises(AssertionError, match="the capture was ended"), captured():
        driver().cuMemAlloc(1)


def test_kernels_that_follow_each_other_are_one_graph(launches, monkeypatch) -> None:
    """Of each stream that lasts; a capture, a stream that may be destroyed and a driver that
    refuses it get them one by one."""
    stream, number, capturing = STREAM, STREAM | 1, False
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: stream)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentStream", lambda index: (number, index, 1))
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: capturing)
    form = BY_NAME["left padding"]
    q, k, v, aux = of_form("left padding", Shape(2, 4, 2, 150, 150, 64, 64))
    call = Attention(f"{form.spec()} #;kernels=cuda_sm90", fixed=True, lse=False)
    call(q, k, v, aux, form.sizes)

    def called() -> int:
        before = graphs_launched()
        launches.clear()
        call(q, k, v, aux, form.sizes)
        assert [x.name for x in launches] == ["block_map", "attention_fwd", "dead_rows"]
        return graphs_launched() - before

    assert [called() for _ in range(3)] == [1, 1, 1]
    stream, capturing = STREAM + 2, True
    assert called() == 0
    stream, capturing = STREAM + 4, False
    assert called() == called() == 1
    stream, number = STREAM + 6, STREAM + 6
    assert called() == called() == 0
    stream, number = STREAM, STREAM | 1
    assert called() == 1
    monkeypatch.setattr(driver(), "cuGraphInstantiate", lambda *_: (driver().CUresult(801), None))
    call = Attention(f"{form.spec()} #;kernels=cuda_sm90", fixed=True)
    call(q, k, v, aux, form.sizes)
    assert called() == 0


def test_few_queries_are_dealt_out_and_combined(launches) -> None:
    q, k, v, _ = of_form("full", Shape(1, 2, 1, 3, 9000, 128, 128))
    Attention(f"{BY_NAME['full'].spec()} #;kernels=cuda_sm90")(q, k, v, [], [])
    assert [x.name for x in launches] == ["attention_fwd", "combine"]


def test_what_tma_cannot_describe_is_copied(launches) -> None:
    q, k, v, _ = of_form("causal", Shape(1, 2, 1, 20, 24, 64, 64))
    odd = on_device(torch.zeros(1, 2, 64, 20).bfloat16()).transpose(2, 3)
    text = f"{BY_NAME['causal'].spec()} #;kernels=cuda_sm90"
    out, lse = Attention(text)(odd, k, v, [], [])
    AttentionBackward(text, [True] * 3)(out, None, odd, k, v, out, lse, [], [])
    assert len(launches) == 4


def test_a_graph_that_is_captured_has_a_counter_of_its_own(launches, monkeypatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: True)
    q, k, v, _ = of_form("causal", Shape(1, 2, 1, 200, 200, 64, 64))
    Attention(f"{BY_NAME['causal'].spec()} #;kernels=cuda_sm90")(q, k, v, [], [])
    assert len(launches) == 1


def test_sections_have_about_as_many_heads(monkeypatch) -> None:
    monkeypatch.setattr(cuda_sm90_parameters, "SECTION_BYTES", 32)
    assert [section_of(x, 1) for x in (1, 32, 33, 40, 72, 100)] == [1, 32, 17, 20, 24, 25]
    assert section_of(40, 33) == 1  # more than L2 has for one


def test_a_section_has_whole_groups_and_turns(launches, monkeypatch) -> None:
    """Of 18 heads, three on one of keys, and two batches side by side beside their dense bias."""
    found, section = [], ForwardParameters._section
    monkeypatch.setattr(ForwardParameters, "_section", lambda x: found.append(section(x)) or 1)
    monkeypatch.setattr(cuda_sm90_parameters, "SECTION_BYTES", 8 * 2 * 64 * 256)
    q, k, v, _ = of_form("full", Shape(2, 18, 6, 100, 64, 128, 128))
    bias = on_device(torch.zeros(1, 18, 100, 64).bfloat16())
    text = "attention(score=0.1*s + load(0, 0, h, q, kv), mask=kv <= q, aux=[float])"
    Attention(f"{text} #;kernels=cuda_sm90")(q, k, v, [bias], [])
    assert found == [3 * 3 * 2]


@pytest.mark.parametrize("bound", [False, True], ids=["new", "bound"])
def test_a_thread_that_never_called_cuda(bound: bool, launches) -> None:
    q, k, v, _ = of_form("causal", Shape(1, 2, 1, 200, 200, 64, 64))
    text = f"{BY_NAME['causal'].spec()} #;kernels=cuda_sm90"
    forward, backward = Attention(text), AttentionBackward(text, [True] * 3)

    def train() -> None:
        with Devices():
            out, lse = forward(q, k, v, [], [])
            backward(out, None, q, k, v, out, lse, [], [])

    if bound:
        train()
    with ThreadPoolExecutor(1) as threads:
        threads.submit(train).result()
    assert len(launches) == (8 if bound else 4)


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("name", ["left padding", "global and window"])
def test_the_second_device(name: str, current: int, launches) -> None:
    """Kernels are loaded and launched there, and the current device stays what it was."""
    form = BY_NAME[name]
    q, k, v, aux = of_form(name, Shape(1, 2, 1, 200, 200, 64, 64), gpu=1)
    text = f"{form.spec()} #;kernels=cuda_sm90"
    forward = Attention(text, fixed=True)
    backward = AttentionBackward(text, [True] * 3 + [False] * len(aux), fixed=True)
    with torch.cuda.device(current):
        for _ in range(2):
            out, lse = forward.call(q, k, v, aux, form.sizes)
            grads = backward(out, None, q, k, v, out, lse, aux, form.sizes)
            assert current_device() == current
    assert {x.get_device() for x in (out, lse, *grads[:3])} == {1}
    assert {(x.device, x.stream) for x in launches} == {(1, stream_of(1))}
    [bound] = forward._calls.values()
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_HANDLE"):
        bound.launches[-1](stream_of(0), [0] * 16)


def test_tuning_measures_each_tile_and_keeps_the_choice(launches, monkeypatch, tmp_path) -> None:
    def load_all(keys):
        return {x: cuda_sm90.load_first([x])[1] for x in keys}

    monkeypatch.setenv("FA3_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_sm90, "load_all", load_all)
    call = Attention(f"{BY_NAME['causal'].spec()} #;autotune=quick;kernels=cuda_sm90")
    q, k, v, _ = of_form("causal", Shape(1, 2, 1, 200, 200, 64, 64))
    with captured():
        call(q, k, v, [], [])
    [found] = (tmp_path / "cache").glob("tuned/*/config.json")
    measured = json.loads(found.read_text())["measured"]
    assert len(measured) > 1 and {x["ms"] for x in measured} == {1.0}
    launches.clear()
    call(q[:, :, :180], k, v, [], [])  # lengths of one power of two share a choice
    assert len(launches) == 1


def test_integers_too_large_for_32_bits_are_left_to_others(launches, caplog) -> None:
    form = BY_NAME["dynamic prefix"]
    q, k, v, _ = of_form(form.name, Shape(1, 2, 1, 20, 24, 64, 64))
    asked = make_problem(f"{form.spec()} #;kernels=cuda_sm90", q, k, v, [])
    assert cuda_sm90.CudaSm90().bind(asked, q, k, v, [], [2**30 - 1]) is not None
    assert cuda_sm90.CudaSm90().bind(asked, q, k, v, [], [2**30]) is None
    assert "1073741824" in caplog.text
