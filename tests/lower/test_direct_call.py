"""What Inductor's code calls for a kernel that the host launches, and how it finds the kernel."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from fa3_compile.lower import choose, dispatch
from fa3_compile.lower.bound import LARGEST, BindingKernel
from fa3_compile.lower.inductor import install
from fa3_compile.runtime import launch, op

SPEC = "attention(score=0.25*s, mask=kv <= q, dead=nan, out_order=bqhd)"
BIASED = "attention(score=0.25*s + load(0, b, kv), aux=[float])"


class Counting(BindingKernel):
    """A family for the CPU that is bound and launched as those of GPUs are."""

    name = "counting"
    priority = -1

    def __init__(self) -> None:
        super().__init__()
        self.binds = self.calls = 0
        self.prepared: list[bool] = []  # whether the LSE is read, of each problem

    def supports(self, problem):
        return None

    def supports_backward(self, problem):
        return None

    def prepare(self, problem):
        self.prepared.append(problem.wants_lse)

    def bind(self, problem, q, k, v, aux, sizes):
        self.binds += 1
        expected = launch.layout_key((q, k, v, *aux), sizes)

        def call(q, k, v, aux):
            self.calls += 1
            assert launch.layout_key((q, k, v, *aux), sizes) == expected
            out, lse = choose.reference().run(problem, q, k, v, aux, sizes)
            return op.outputs_as_declared(q, v, out, lse, problem.spec.out_order)

        return call

    def run_backward(self, problem, *arguments):
        self.calls += 1
        return choose.reference().run_backward(problem, *arguments)


@pytest.fixture
def family():
    install()
    found = Counting()
    choose.register(found)
    for cached in (dispatch.built, dispatch.built_backward):
        cached.cache_clear()
    yield found
    del choose._kernels["counting"]


def attention(q, k, v, *aux, text: str = SPEC, options: str = ""):
    return torch.ops.fa3.attention(q, k, v, aux, [], f"{text} #;{options}kernels=counting")[0]


def inputs(length=16, batch=2, heads=2, **options) -> Any:
    return [torch.randn(batch, heads, length, 8, **options) for _ in range(3)]


def code_of(function, *arguments) -> str:
    _, codes = run_and_get_code(function, *arguments)
    return "\n".join(codes)


def test_generated_code_calls_the_launch_and_not_the_operator(family):
    def model(q, k, v):
        plain = functools.partial(attention, text="attention(score=0.25*s)")
        return plain(plain(q, k, v), k, v) + plain(q[:, :, :8], k, v).sum()

    arguments = inputs()
    code = code_of(torch.compile(model), *arguments)
    assert "torch.ops.fa3" not in code.replace("'torch.ops.fa3", "")  # names in assertions
    # One object for the two calls of a layout, one for the other.
    assert code.count("fa3_launch.Attention(") == 2 and code.count("fixed=True") == 2
    assert code.count("= fa3_attention_0.call(") == 2
    assert code.count("= fa3_attention_1.call(") == 1 and code.count("lse=False") == 2
    assert (family.binds, family.calls) == (2, 3)
    torch.testing.assert_close(torch.compile(model)(*arguments), model(*arguments))


def test_dynamic_lengths_are_looked_up(family):
    compiled = torch.compile(attention, dynamic=True)
    code = code_of(compiled, *inputs())
    assert "fixed=False" in code
    for length in (24, 33, 24, 33):
        arguments = inputs(length)
        torch.testing.assert_close(compiled(*arguments), attention(*arguments))
    assert family.binds == 5  # two for the operator, whose LSE may be read


@torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)
@pytest.mark.parametrize("what", ["a length", "an index"])
def test_lengths_that_are_read_from_a_tensor_stay_the_operator(what, caplog):
    install()

    def model(q, k, v, kept):
        part = kept if what == "an index" else slice(kept.sum().item())
        arguments = (q[:, :, part], k[:, :, part], v[:, :, part], [], [], f"{SPEC} #;kernels=cpu")
        return torch.ops.fa3.attention(*arguments)[0]

    def results(function, length):
        out = function(*arguments, torch.arange(16) < length)
        return out, *(torch.autograd.grad(out.sum(), arguments) if learned else ())

    # Inductor has no gradient of a slice to a length that it does not know.
    learned = what == "an index"
    arguments = inputs(requires_grad=learned)
    compiled = torch.compile(model)
    for length in (9, 4, 0):
        torch.testing.assert_close(results(compiled, length), results(model, length))
    assert not caplog.records


def test_the_kernel_is_told_whether_the_lse_is_read(family):
    def both(q, k, v):
        return torch.ops.fa3.attention(q, k, v, [], [], f"{SPEC} #;kernels=counting")

    compiled = torch.compile(attention)
    compiled(*inputs())
    assert family.prepared == [False]  # as it is lowered, and when it is bound
    compiled(*inputs(requires_grad=True))
    torch.compile(both)(*inputs(batch=3))
    assert family.prepared == [False, True, True]


def test_gradients_go_directly_too(family):
    def gradients(function: Any):
        torch.manual_seed(0)
        arguments = inputs(requires_grad=True)
        return torch.autograd.grad(function(*arguments).square().sum(), arguments)

    compiled = torch.compile(attention)
    _, codes = run_and_get_code(lambda: gradients(compiled))
    assert "fa3_launch.AttentionBackward(" in codes[-1] and "[True, True, True]" in codes[-1]
    assert "torch.ops.fa3.attention_backward.default(" not in codes[-1]
    torch.testing.assert_close(gradients(compiled), gradients(attention))


@pytest.mark.parametrize("options, aux", [("verify=True;", ()), ("", (torch.uint8,))], ids=str)
def test_what_needs_more_than_a_launch_stays_the_operator(family, options, aux):
    text = SPEC if not aux else "attention(score=s, mask=load(0, b, kv) != 0, dead=nan, aux=[int])"
    captured = [torch.ones(2, 16, dtype=x) for x in aux]
    compiled = torch.compile(functools.partial(attention, text=text, options=options))
    code = code_of(compiled, *inputs(), *captured)
    assert "torch.ops.fa3.attention.default(" in code and "fa3_launch" not in code


def test_the_c_wrapper_keeps_the_operator(family):
    from torch._inductor.virtualized import V

    from fa3_compile.lower.launch.direct_call import DirectCall

    seen = []
    original = DirectCall.codegen_args

    def spy(self):
        seen.append((V.graph.cpp_wrapper, original(self)))
        V.graph.cpp_wrapper = False
        return seen[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DirectCall, "codegen_args", spy)
        torch.compile(attention)(*inputs())
    assert seen and not any("attention(" in x for x in seen[0][1])


def test_addresses_that_are_not_aligned_are_bound_apart(family):
    call = launch.Attention(f"{SPEC} #;kernels=counting", fixed=True)
    q, k, v = inputs()
    odd = torch.randn(q.numel() + 1)[1:].view(q.shape)
    want = attention(q, k, v)
    for x in (q, odd, q, odd):
        out, _ = call(x, k, v, [], [])
        torch.testing.assert_close(out, want if x is q else attention(odd, k, v))
    assert family.binds == 2


def test_the_first_layout_keeps_the_call_that_shares_lists(monkeypatch):
    """Another layout's blocks are of another size: it must never read what the first one left."""
    handed_on = []

    def bind(self, q, k, v, aux, sizes):
        def call(q, k, v, aux):
            return q, v

        def fixed(otherwise, lse):
            def at_once(q_, k_, v_, aux, sizes, shared=None):
                if v_.shape != v.shape:
                    return otherwise(q_, k_, v_, aux, sizes, shared)
                handed_on.append((v.shape, shared))
                return call(q_, k_, v_, aux)

            return at_once

        call.fixed = fixed
        return call

    monkeypatch.setattr(launch.Attention, "_bind", bind)
    attention = launch.Attention(f"{SPEC} #;kernels=counting", fixed=True)
    (q, k, v), shared = inputs(), []
    for values in (v, v, v[..., :4].contiguous(), v):
        attention.call(q, k, values, [], [], shared)
    assert [x for x, _ in handed_on] == [v.shape] * 2
    assert all(x is shared for _, x in handed_on)


MASKED = "attention(score=0.25*s, mask=load(0, b, kv) != 0, dead=nan, aux=[int])"


def test_layers_with_one_mask_share_its_lists_of_blocks(family):
    def model(q, k, v, keep):
        masked = functools.partial(attention, text=MASKED)
        q = masked(masked(q, k, v, keep), k, v, keep)
        other = keep + 1
        return masked(q, k, v, other) + attention(q, k, v, other.float(), text=BIASED)

    keep = torch.ones(2, 16, dtype=torch.int64)
    code = code_of(torch.compile(model), *inputs(), keep.clone())
    assert code.count("fa3_lists_1 = []") == 1 and code.count("[], fa3_lists_1)") == 2
    assert code.count("fa3_lists_") == 3 and family.calls == 4


def test_captured_tensors_are_part_of_the_layout(family):
    call = launch.Attention(f"{BIASED} #;kernels=counting")
    q, k, v = inputs()
    for bias in (torch.randn(2, 16), torch.randn(16, 2).T, torch.randn(2, 16).double()):
        want = attention(q, k, v, bias, text=BIASED)
        torch.testing.assert_close(call(q, k, v, [bias], [])[0], want)
    assert family.binds == 3


def test_a_growing_cache_leaves_nothing_behind(family, monkeypatch):
    monkeypatch.setattr(launch, "LARGEST", 8)
    monkeypatch.setattr("fa3_compile.lower.bound.LARGEST", 8)
    call = launch.Attention("attention(score=s) #;kernels=counting")
    q, k, v = inputs(40, 1, 1)
    for length in range(1, 41):
        call(q[:, :, :1], k[:, :, :length], v[:, :, :length], [], [])
    assert len(call._calls) <= 8 and len(family._bound) <= 8
    assert family.binds == 40 and LARGEST > 8


def test_another_kernel_runs_where_none_can_be_bound(family, monkeypatch):
    monkeypatch.setattr(family, "bind", lambda *_: None)
    monkeypatch.setattr("fa3_compile.lower.bound.next_after", lambda *_: choose.reference())
    q, k, v = inputs()
    want = torch.ops.fa3.attention(q, k, v, [], [], f"{SPEC} #;kernels=reference")[0]
    call = launch.Attention(f"{SPEC} #;kernels=counting", fixed=True)
    torch.testing.assert_close(call(q, k, v, [], [])[0], want)


PROGRAM = """
import torch
from fa3_compile import collect
from fa3_compile.backend import fa3
from torch._dynamo.utils import counters

def model(q, k, v):
    scores = (q @ k.transpose(-2, -1) / 4).masked_fill(
        torch.ones(16, 16, dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1) @ v

torch.manual_seed(0)
q, k, v = (torch.randn(1, 1, 16, 16, requires_grad=True) for _ in range(3))
compiled = torch.compile(model, backend=fa3, options={"kernels": "triton"})
with collect() as report:
    out = compiled(q, k, v)
    out.sum().backward()
torch.testing.assert_close(out, model(q, k, v))
print(counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"])
for region in report.regions:
    for path in (region.kernel_source, region.gradients_source):
        print(path.rsplit("/")[-1])
"""


def test_a_second_process_runs_what_the_first_one_cached(tmp_path):
    pytest.importorskip("triton")
    environment = dict(os.environ, TRITON_INTERPRET="1", FA3_CACHE_DIR=str(tmp_path / "fa3"))
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "inductor")
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    environment |= {f"TORCHINDUCTOR_{x}_CACHE": "1" for x in ("FX_GRAPH", "AUTOGRAD")}
    said = []
    for _ in range(2):
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split())
    # What was cached is not lowered, and no report hears of it.
    assert said[0] == ["0", "0", "kernel.py", "kernel.py"] and "1" in said[1] and len(said[1]) == 2
    codes = [x.read_text() for x in (tmp_path / "inductor").glob("*/*.py")]
    assert any("fa3_launch.Attention(" in x for x in codes)
