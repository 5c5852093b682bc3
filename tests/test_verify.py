"""`options={"verify": True}` sees a wrong kernel on the inputs that it runs on."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

from fa3_compile.backend import fa3
from fa3_compile.lower import choose
from fa3_compile.lower.kernels.cpu import Cpu

LOGGER = "fa3_compile.lower.verify"


class SlightlyWrong(Cpu):
    """The cpu kernel, one row of its output off by 2%."""

    def run(self, problem, q, k, v, aux, sizes):
        out, lse = super().run(problem, q, k, v, aux, sizes)
        out = out.clone()
        out[:, :, 3] *= 1.02
        return out, lse


def attention(q, k, v):
    return F.softmax(q @ k.transpose(-2, -1) * 0.25, -1) @ v


def run():
    q, k, v = (torch.randn(2, 4, 9, 16) for _ in range(3))
    with torch.no_grad():
        torch.compile(attention, backend=fa3, options={"verify": True})(q, k, v)


def test_a_right_kernel_is_said_to_be_right(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        run()
    assert [r.levelname for r in caplog.records if r.name == LOGGER] == ["INFO"]


def test_a_wrong_kernel_is_seen(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fa3_compile.lower import dispatch

    choose.kernels()
    monkeypatch.setitem(choose._kernels, "cpu", SlightlyWrong())
    dispatch.built.cache_clear()
    try:
        with caplog.at_level(logging.INFO, LOGGER):
            run()
    finally:
        dispatch.built.cache_clear()
    records = [r for r in caplog.records if r.name == LOGGER]
    assert [r.levelname for r in records] == ["WARNING"]
    assert "cpu: output of plain: largest error" in records[0].getMessage()


def test_a_kernel_that_does_not_build_is_replaced_in_the_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fa3_compile.explaining import explain
    from fa3_compile.lower import dispatch
    from fa3_compile.lower.choose import KernelBuildError

    class DoesNotBuild(Cpu):
        def prepare(self, problem):
            raise KernelBuildError("no compiler")

    choose.kernels()
    monkeypatch.setitem(choose._kernels, "cpu", DoesNotBuild())
    dispatch.built.cache_clear()
    try:
        report = explain(attention, *(torch.randn(2, 4, 9, 16) for _ in range(3)))
    finally:
        dispatch.built.cache_clear()
    assert [region.kernel for region in report.regions] == ["reference"]


class WrongGradient(Cpu):
    """The cpu kernel, the gradient of its keys 2% too large."""

    def run_backward(self, *arguments):
        dq, dk, dv, daux = super().run_backward(*arguments)
        return dq, dk * 1.02, dv, daux


@pytest.mark.parametrize("kernel, wrong", [(Cpu(), []), (WrongGradient(), ["dk"])])
def test_gradients_are_verified_and_the_report_notes_a_wrong_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, kernel: Cpu, wrong: list
) -> None:
    from fa3_compile.explaining import explain
    from fa3_compile.lower import dispatch

    choose.kernels()
    monkeypatch.setitem(choose._kernels, "cpu", kernel)
    for cached in (dispatch.built, dispatch.built_backward):
        cached.cache_clear()
    inputs = [torch.randn(2, 4, 9, 16, requires_grad=True) for _ in range(3)]
    try:
        with caplog.at_level(logging.INFO, LOGGER):
            report = explain(attention, *inputs, options={"verify": True}, training=True)
    finally:
        for cached in (dispatch.built, dispatch.built_backward):
            cached.cache_clear()
    said = [r.getMessage() for r in caplog.records if r.name == LOGGER]
    assert [line.split(" ")[1] for line in said] == ["output", "dq", "dk", "dv"]
    assert [note.split(" ")[2] for note in report.notes] == wrong
