"""What a call of `cuda_sm90`'s backward does on the host: when it binds, adapts, and leaves."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from fa3_compile.lower import choose
from fa3_compile.lower.kernels import cuda_sm90_backward as backward
from fa3_compile.lower.kernels import cuda_sm90_backward_captured
from fa3_compile.runtime.op import BackwardInputs
from fa3_compile.spec.attention import AttentionSpec
from tests.numerics.test_cuda_sm90_backward_compile import training


@pytest.fixture
def binds(monkeypatch) -> list[tuple[torch.Tensor, ...]]:
    """The (q, k, v, dout, out) of every `bind`; what it gives computes by the reference."""
    found = []

    def bind(problem, given):
        found.append((given.q, given.k, given.v, given.dout, given.out))
        return choose.reference().run_backward

    monkeypatch.setattr(backward, "bind", bind)
    monkeypatch.setattr(backward, "_bound", {})
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    return found


def arguments(dim: int = 16):
    """The arguments of run_backward, with tensors that TMA can describe."""
    q, k, v, dout = (torch.randn(1, 2, 5, dim).bfloat16() for _ in range(4))
    problem = training("full", dim, dim)
    out, lse = choose.reference().run(problem, q, k, v, [], [])
    return problem, BackwardInputs(dout, None, q, k, v, out, lse.float(), [], [], [True] * 3)


def test_a_layout_is_bound_once(binds) -> None:
    problem, given = arguments()
    first = backward.run_backward(problem, given)
    again = backward.run_backward(problem, given)
    assert len(binds) == 1
    assert all(torch.equal(x, y) for x, y in zip(first[:3], again[:3]))  # pyright: ignore
    backward.run_backward(problem, given._replace(dlse=torch.ones(()).expand(1, 2, 5)))
    assert len(binds) == 2


def test_what_tma_cannot_describe_is_copied(binds) -> None:
    problem, given = arguments()
    given = given._replace(dout=torch.randn(1, 2, 16, 5).bfloat16().transpose(2, 3))
    expected = choose.reference().run_backward(problem, given)
    for _ in range(2):
        found = backward.run_backward(problem, given)
    assert len(binds) == 1 and binds[0][3].is_contiguous()
    assert all(torch.equal(x, y) for x, y in zip(expected[:3], found[:3]))  # pyright: ignore


def test_no_keys_and_the_deterministic_switch_leave_it_to_others(binds) -> None:
    problem, given = arguments()
    torch.use_deterministic_algorithms(True)
    try:
        backward.run_backward(problem, given)
    finally:
        torch.use_deterministic_algorithms(False)
    empty = torch.empty(1, 2, 0, 16).bfloat16()
    grads = backward.run_backward(problem, given._replace(k=empty, v=empty))
    assert not binds and torch.equal(grads[0], torch.zeros_like(given.q))  # pyright: ignore


DISTANCE = "load(0, h, kv - q + 4) + s"


@pytest.mark.parametrize("frozen", [False, True])
def test_tables_by_the_distance_are_left_to_triton_alone(binds, monkeypatch, frozen: bool) -> None:
    triton_backward = pytest.importorskip("fa3_compile.lower.kernels.triton_backward")
    asked = []

    def run_backward(problem, given):
        asked.append((problem.aux_needs_grad, list(given.needs)))
        return choose.reference().run_backward(problem, given)

    monkeypatch.setattr(triton_backward, "run_backward", run_backward)
    q, k, v, dout = (torch.randn(1, 2, 5, 16).bfloat16() for _ in range(4))
    aux = [torch.randn(2, 9), torch.randn(2)]
    spec = AttentionSpec.parse(
        f"attention(score={DISTANCE}, sinks=[load(1, h)], aux=[float, float])"
    )
    problem = replace(
        training("full", 16, 16), spec=spec, batch=1, heads=2, kv_heads=2, q_len=5, kv_len=5,
        aux_dtypes=(torch.float32,) * 2, aux_needs_grad=(True, not frozen),
    )  # fmt: skip
    out, lse = choose.reference().run(problem, q, k, v, aux, [])
    needs = [*[not frozen] * 3, True, not frozen]
    given = BackwardInputs(dout, None, q, k, v, out, lse.float(), aux, [], needs)
    found = cuda_sm90_backward_captured.run_backward(problem, given)
    expected = choose.reference().run_backward(problem, given)
    for x, y in zip((*found[:3], *found[3]), (*expected[:3], *expected[3])):
        assert (x is None and y is None) or torch.equal(x, y)  # pyright: ignore
    assert asked == [((True, False), [False, False, False, True, False])]
    assert len(binds) == (0 if frozen else 1)
    assert cuda_sm90_backward_captured.supports_backward(problem) is None


@pytest.mark.parametrize(
    "fields",
    [
        "score=load(0, h, max(min(kv - q, 7), -7) + 7) + s, aux=[float]",  # keys share it
        "score=load(0, h)*s, aux=[float]",
        f"score={DISTANCE}, sinks=[load(0, h, 0)], aux=[float]",
        f"score={DISTANCE}, weight=load(0, h, kv - q + 4), aux=[float]",
        f"score=load(1, h, kv)*({DISTANCE}), aux=[float, float]",
        f"score={DISTANCE}, mask=kv <= q - 1, dead=score, fill=load(0, h, kv - q + 4), aux=[float]",
    ],
)
def test_gradients_that_are_left_with_all_others(fields: str) -> None:
    spec = AttentionSpec.parse(f"attention({fields})")
    kinds = (torch.bfloat16,) * len(spec.aux)
    problem = replace(
        training("full", 64, 64), spec=spec, aux_dtypes=kinds, aux_needs_grad=(True,) * len(kinds)
    )
    reason = cuda_sm90_backward_captured.supports_backward(problem) or ""
    assert "no gradient of captured tensor" in reason
