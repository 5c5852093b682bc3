"""`fa3::attention` in compiled programs: inlined by Inductor, under autocast and checkpoints."""

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fa3_compile.lower.inductor import install
from tests.numerics.cases import CASES, Case, dense

attention = torch.ops.fa3.attention


@pytest.fixture
def no_failed_lowering(caplog):
    install()
    yield
    assert not [r for r in caplog.records if "could not be lowered" in r.getMessage()]


COMPILED = [
    ("bias", "reference", True),
    ("bias", "cpu", False),
    ("sinks", "reference", False),
    ("documents", "cpu", True),
    ("dead-uniform", "cpu", False),
    ("v-narrower", "cpu", False),
    ("guarded-load", "reference", False),
    ("relative-bias", "reference", False),
]


@pytest.mark.parametrize("name, kernel, dynamic", COMPILED)
def test_compiled(name, kernel, dynamic, no_failed_lowering):
    case = CASES[name]
    text = case.text(kernel)

    def model(q, k, v, aux, sizes):
        out, _ = attention(2 * q, k, v, aux, sizes, text)
        return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1).sin()

    results = []
    for function in (model, torch.compile(model, dynamic=dynamic, fullgraph=True)):
        q, k, v, aux = case.tensors(requires_grad=True)
        if kernel == "cpu":
            aux = [x.detach() for x in aux]
        inputs = [x for x in (q, k, v, *aux) if x.requires_grad]
        out = function(q, k, v, aux, list(case.sizes))
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_compiled_for_other_lengths(no_failed_lowering):
    case = CASES["causal"]
    function = torch.compile(
        lambda q, k, v: attention(q, k, v, [], [q.shape[2]], case.text("cpu"))[0], dynamic=True
    )
    for length in (19, 33, 64):
        q, k, v, _ = Case(case.fields, shape=(2, 4, 2, length, length + 3)).tensors()
        want, _ = attention(q, k, v, [], [length], case.text("reference"))
        torch.testing.assert_close(function(q, k, v), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_and_checkpoint(compiled, no_failed_lowering):
    case = CASES["causal"]

    def model(q, k, v):
        return attention(q, k, v, [], [], case.text())[0]

    function = torch.compile(model) if compiled else model
    q, k, v, _ = case.tensors(requires_grad=True)
    want = torch.autograd.grad(model(q, k, v).sum(), [q, k, v])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = checkpoint(function, q, k, v, use_reentrant=False)
        assert out.dtype == torch.float32
        got = torch.autograd.grad(out.sum(), [q, k, v])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_lowering_that_fails_leaves_the_call(monkeypatch, caplog):
    """A backward lowering that raised would raise at `.backward()`."""
    from fa3_compile.lower import inductor

    def fail(*_):
        raise RuntimeError("no program")

    install()
    monkeypatch.setattr(inductor, "_inline", fail)
    case = CASES["causal"]
    q, k, v, _ = case.tensors(requires_grad=True)
    function = torch.compile(lambda q, k, v: attention(q, k, v, [], [], case.text())[0])
    out = function(q, k, v)
    out.sum().backward()
    np.testing.assert_allclose(out.detach().numpy(), dense(case)[0], rtol=2e-5, atol=2e-5)
    assert len([r for r in caplog.records if "could not be lowered" in r.getMessage()]) == 2
