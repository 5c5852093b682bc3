"""Kernels that are built while the rest of a model is compiled."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from torch._inductor import compile_fx

from fa3_compile.backend import rewritten
from fa3_compile.lower import choose, dispatch
from fa3_compile.lower.binaries import build_ahead, build_nvrtc
from fa3_compile.lower.binaries.build_nvrtc import Built
from fa3_compile.spec.attention import AttentionSpec

SPEC = AttentionSpec.parse("attention(score=0.25*s, out_order=bqhd)")
CPU = torch.device("cpu")
PROBLEM = choose.Problem(SPEC, torch.float32, CPU, None, 1, 2, 2, 8, 8, 16, 16)


class Begun(choose.Kernel):
    """The reference, and what was asked of it before anything was compiled."""

    name = "begun"
    priority = 1000
    inline = True

    def __init__(self) -> None:
        self.asked: list[tuple[str, choose.Problem]] = []

    def supports(self, problem):
        return None

    def supports_backward(self, problem):
        return None

    def begin(self, problem):
        self.asked.append(("forward", problem))

    def begin_backward(self, problem):
        self.asked.append(("backward", problem))

    def run(self, *arguments):
        return choose.reference().run(*arguments)

    def run_backward(self, *arguments):
        return choose.reference().run_backward(*arguments)


@pytest.fixture
def family():
    found = Begun()
    choose.register(found)
    for cached in (dispatch.built, dispatch.built_backward):
        cached.cache_clear()
    yield found
    del choose._kernels["begun"]
    for cached in (dispatch.built, dispatch.built_backward):
        cached.cache_clear()


def attention(q, k, v):
    return torch.softmax(q @ k.mT / 4, dim=-1) @ v


@pytest.mark.parametrize("grad", [False, True])
def test_what_will_run_is_begun_once(grad: bool, family: Begun, monkeypatch) -> None:
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, **_: gm)
    q, k, v = (torch.randn(1, 2, 8, 16, requires_grad=grad) for _ in range(3))
    options: dict[str, Any] = {"deterministic": True}
    out = torch.compile(attention, backend="fa3", options=options)(q, k, v)
    assert [x for x, _ in family.asked] == ["forward", "backward"][: 1 + grad]
    assert {(str(x.spec), x.deterministic, x.needs_grad) for _, x in family.asked} == {
        (str(SPEC), True, grad)
    }
    torch.testing.assert_close(out, attention(q, k, v))


def test_what_is_only_rewritten_is_not_built(family: Begun) -> None:
    q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    calls = []

    def rewrites(gm, inputs):
        gm = rewritten(gm, inputs)
        calls.extend(x.target for x in gm.graph.nodes if "fa3" in str(x.target))
        return gm

    torch.compile(attention, backend=rewrites)(q, k, v)
    assert calls == [torch.ops.fa3.attention.default] and not family.asked


@dataclass(frozen=True)
class Config:
    tile: int = 1


@dataclass(frozen=True)
class Key:
    """One that NVRTC is not asked for."""

    digest: str = "0"
    spec: AttentionSpec = SPEC
    config: Any = Config()

    def source(self) -> str:
        return ""


def test_who_needs_a_kernel_waits_for_the_thread_that_builds_it(monkeypatch, tmp_path) -> None:
    started, go_on, builds = threading.Event(), threading.Event(), []

    def build(source, headers):
        builds.append(threading.current_thread().name)
        started.set()
        assert go_on.wait(60)
        return Built(b"cubin", "", 168, 0, False)

    monkeypatch.setenv("FA3_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build_nvrtc, "build", build)
    monkeypatch.setattr(build_nvrtc, "compiler", lambda: "none")
    free = threading.BoundedSemaphore(2)
    monkeypatch.setattr(build_ahead, "_free", free)
    key = cast("build_nvrtc.Key", Key())

    def load(problem):
        return build_nvrtc.load(key)

    build_ahead.begin(load, PROBLEM)
    assert started.wait(60)
    build_ahead.begin(load, PROBLEM)  # another layer's
    build_ahead.begin(load, replace(PROBLEM, batch=2))
    build_ahead.begin(builds.append, PROBLEM)  # no processor is free
    with ThreadPoolExecutor(1) as threads:
        waits = threads.submit(build_nvrtc.load, key)
        go_on.set()
        assert waits.result().cubin == b"cubin"
    assert free.acquire(timeout=60) and free.acquire(timeout=60)  # both threads have ended
    assert builds == ["fa3-build"] and not build_nvrtc._being_built and not build_ahead._running
    build_nvrtc.load.cache_clear()


def test_what_cannot_be_built_is_left_to_who_needs_it(monkeypatch) -> None:
    free = threading.BoundedSemaphore(1)
    monkeypatch.setattr(build_ahead, "_free", free)

    def fails(problem) -> None:
        raise RuntimeError

    for _ in range(2):
        build_ahead.begin(fails, PROBLEM)
        assert free.acquire(timeout=60)
        free.release()
