"""PyTorch's deterministic switch decides anew in every call which family computes gradients."""

from __future__ import annotations

import pytest
import torch

from fa3_compile.lower import choose, dispatch
from fa3_compile.lower.choose import Kernel, choose_backward
from fa3_compile.runtime.op import BackwardInputs

SPEC = "attention(score=0.25*s)"


class Unordered(Kernel):
    """A family that sums in any order, as the Hopper backward does."""

    name = "unordered"
    priority = 100

    def __init__(self) -> None:
        self.calls = 0

    def supports(self, problem):
        return None

    def supports_backward(self, problem):
        return "it sums in any order" if problem.deterministic else None

    def run_backward(self, problem, given):
        self.calls += 1
        return choose.reference().run_backward(problem, given)


@pytest.fixture
def family():
    family = Unordered()
    choose.register(family)
    dispatch.built_backward.cache_clear()
    yield family
    del choose._kernels[family.name]
    dispatch.built_backward.cache_clear()


@pytest.mark.parametrize("direct", [False, True], ids=["operator", "direct call"])
def test_the_switch_may_be_turned_between_two_calls(family, direct: bool) -> None:
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    out, lse = choose.reference().run(dispatch.make_problem(SPEC, q, k, v, []), q, k, v, [], [])
    needs = [True, True, True]
    given = BackwardInputs(torch.randn_like(out), None, q, k, v, out, lse, [], [], needs)
    call = dispatch.bound_backward(SPEC, q, k, v, [], needs)
    counts = []
    try:
        for deterministic in (False, True, False, True):
            torch.use_deterministic_algorithms(deterministic)
            call(given) if direct else dispatch.backward(given, SPEC)
            counts.append(family.calls)
    finally:
        torch.use_deterministic_algorithms(False)
    assert counts == [1, 1, 2, 2]


def test_what_comes_after_a_family(family) -> None:
    q = torch.randn(1, 2, 5, 8)
    problem = dispatch.make_problem(SPEC, q, q, q, [], [True] * 3)
    assert choose_backward(problem).name == "unordered"
    following = choose_backward(problem, after="unordered")
    assert following.priority < family.priority
    assert choose_backward(problem, ("reference",)).name == "reference"
