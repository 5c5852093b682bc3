"""What a call of the Triton kernels does on the host, up to the launch: Triton's own driver, on a
CUDA driver as strict as a GPU's, takes what we give it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fa3_compile.lower.binaries import build
from fa3_compile.lower.dispatch import make_problem
from fa3_compile.lower.kernels import triton_backward, triton_forward, triton_split
from fa3_compile.lower.kernels.triton_forward import TritonForward
from fa3_compile.lower.kernels.triton_launch import Launch
from fa3_compile.lower.launch.launch_calls import Launches
from fa3_compile.lower.tiles import tune_forward
from fa3_compile.lower.tiles.config import TritonConfig
from fa3_compile.lower.tiles.tune_backward import Configs
from fa3_compile.runtime.launch import Attention, AttentionBackward
from tests.host_driver import (
    STREAM,
    OnDevice,
    captured,
    current_device,
    launches,
    on_device,
    stream_of,
    triton_driver,
)
from tests.numerics.forms import BY_NAME, Shape, inputs

__all__ = ["launches", "triton_driver"]

# What a form launches, forward and backward.
FORMS = {
    "causal": ("attention_forward", "row_terms query_blocks key_blocks"),
    "documents": (
        "block_lists attention_forward",
        "row_terms block_lists query_blocks block_lists key_blocks",
    ),
    "relative bias": ("attention_forward", "row_terms query_blocks dense0"),
}
# A small tile is built in a quarter of the time of those that run.
TILE = TritonConfig(16, 16, 4, 1)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, triton_driver):
    monkeypatch.setattr(tune_forward, "table_config", lambda _: TILE)
    monkeypatch.setattr(triton_backward, "table_configs", lambda _: Configs(TILE, TILE))
    monkeypatch.setattr(triton_backward, "ROW_TERMS", TILE)


@pytest.mark.parametrize("name", FORMS)
def test_forward_and_backward_reach_their_launches(name: str, launches, caplog) -> None:
    form, (forward, backward) = BY_NAME[name], FORMS[name]
    length = 1024 if "block_lists" in forward else 70
    shape = Shape(1, 2, 1, length, length, 16, 16)
    q, k, v, aux = on_device(inputs(form, shape, torch.bfloat16, "cpu"))
    text = f"{form.spec()} #;kernels=triton"
    call = Attention(text)
    for _ in range(2):
        out, lse = call(q, k, v, aux, form.sizes)
    assert not caplog.messages
    assert [x.name for x in launches] == forward.split() * 2
    assert {x.stream for x in launches} == {STREAM}
    launches.clear()
    captured = [x.is_floating_point() for x in aux]
    call = AttentionBackward(text, [not any(captured)] * 3 + captured)
    grads = call(out, lse, q, k, v, out, lse, aux, form.sizes)
    assert not caplog.messages
    assert [x.name for x in launches] == backward.split()
    assert all(isinstance(x, OnDevice) for x in (*grads[:3], *grads[3]))


@pytest.mark.parametrize("name", FORMS)
def test_the_report_names_the_files_of_what_runs(name: str, launches) -> None:
    form = BY_NAME[name]
    length = 1024 if "block_lists" in FORMS[name][0] else 70
    q, k, v, aux = on_device(
        inputs(form, Shape(1, 2, 1, length, length, 16, 16), torch.bfloat16, "cpu")
    )
    text, needs = f"{form.spec()} #;kernels=triton", [True] * 3 + [False] * len(aux)
    problem = make_problem(text, q, k, v, aux, needs)
    kernel = TritonForward()
    build.load.cache_clear()
    out, lse = Attention(text)(q, k, v, aux, form.sizes)
    AttentionBackward(text, needs)(out, lse, q, k, v, out, lse, aux, form.sizes)
    ran = build.load.cache_info().misses
    kernel.prepare(problem)
    sources = [Path(kernel.source(problem)), Path(kernel.backward_source(problem))]
    assert build.load.cache_info().misses == ran
    assert "def attention_forward(" in sources[0].read_text()
    assert "def row_terms(" in sources[1].read_text()


@pytest.mark.parametrize("joint", [True, False])
def test_parts_of_a_split_and_values_in_keys(joint: bool, launches, monkeypatch, caplog) -> None:
    """One head of wide keys: what knows that V begins where K does is called for nothing else."""
    packed = replace(TILE, packed=True)
    monkeypatch.setattr(tune_forward, "table_config", lambda *_, **__: packed)
    q, k, v, w = on_device(
        [torch.randn(x).bfloat16() for x in ((1, 8, 1, 264), *[(1, 1, 2048, 264)] * 3)]
    )
    call = Attention("attention(score=0.1*s) #;kernels=triton", fixed=True, lse=False)
    values = (k, v, k) if joint else (v, w)
    for x in values:
        out, _ = call(q, k, x, [], [])
        assert out.shape == (1, 8, 1, 264)
    assert not caplog.messages
    assert [x.name for x in launches] == ["attention_forward", "attention_combine"] * len(values)
    assert len(call._calls) == (2 if joint else 1)


def test_parts_of_a_split_are_float32_whatever_the_default_is() -> None:
    parts = triton_split.Parts(2, 3, 16, 1, combine=Launch((), lambda _: None))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        tensors = parts.tensors(torch.device("cpu"))
    finally:
        torch.set_default_dtype(default)
    assert {x.dtype for x in tensors.values()} == {torch.float32}


def test_tensor_descriptors_have_scratch_memory(launches, monkeypatch) -> None:
    monkeypatch.setattr(tune_forward, "table_config", lambda _: replace(TILE, tma=True))
    form = BY_NAME["full"]
    shape = Shape(1, 1, 1, 20, 20, 64, 64)
    q, k, v, _ = on_device(inputs(form, shape, torch.bfloat16, "cpu"))
    call = Attention(f"{form.spec()} #;kernels=triton")
    call(q, k, v, [], [])
    [bound] = call._calls.values()
    assert isinstance(bound, Launches) and bound.scratch > 0 and len(launches) == 1
    # One launch by itself, as tuning measures it, and a backward's is.
    problem = make_problem(str(form.spec()), q, k, v, [])
    config = tune_forward.table_config(problem)
    alone = triton_forward.bind_config(problem, config, q, k, v, [], [])
    alone.launch([q, k, v, *triton_forward.outputs(problem, q, v)])
    assert len(launches) == 2


def test_a_kernel_that_is_built_leaves_captures_of_other_threads_alone(launches) -> None:
    form = BY_NAME["causal"]
    q, k, v, _ = on_device(inputs(form, Shape(1, 1, 1, 40, 40, 16, 16), torch.bfloat16, "cpu"))
    with captured():
        Attention(f"{form.spec()} #;kernels=triton")(q, k, v, [], [])
    assert [x.name for x in launches] == ["attention_forward"]


@pytest.mark.parametrize("current", [0, 1])
def test_the_second_device(current: int, launches) -> None:
    """Kernels are loaded and launched there, and the current device stays what it was."""
    form = BY_NAME["relative bias"]
    found = inputs(form, Shape(1, 1, 1, 40, 40, 16, 16), torch.bfloat16, "cpu")
    q, k, v, aux = on_device(found, gpu=1)
    text = f"{form.spec()} #;kernels=triton"
    forward = Attention(text, fixed=True)
    backward = AttentionBackward(text, [True] * 4, fixed=True)
    with torch.cuda.device(current):
        for _ in range(2):
            out, lse = forward.call(q, k, v, aux, [])
            dq, *_, [dbias] = backward(out, None, q, k, v, out, lse, aux, [])
            assert current_device() == current
    assert {x.get_device() for x in (out, lse, dq, dbias)} == {1}
    assert {(x.device, x.stream) for x in launches} == {(1, stream_of(1))}


def test_integers_too_large_for_32_bits_are_left_to_others(launches) -> None:
    form = BY_NAME["dynamic prefix"]
    q, k, v, _ = on_device(inputs(form, Shape(1, 2, 1, 20, 24, 16, 16), torch.bfloat16, "cpu"))
    asked = make_problem(str(form.spec()), q, k, v, [])
    assert triton_forward.TritonForward().bind(asked, q, k, v, [], [2**30 - 1]) is not None
    assert triton_forward.TritonForward().bind(asked, q, k, v, [], [2**30]) is None
