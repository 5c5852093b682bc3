"""Attention in regions of a program that Dynamo keeps whole, or leaves out of its graphs."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch._higher_order_ops.scan import scan

from fa3_compile.report import Report, collect
from tests.integration.gpt import GPT, assert_same_gradients, batch, compiled

SHAPE = (2, 2, 16, 8)


def attention(q, k, v) -> Any:
    return (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator).requires_grad_() for _ in range(3)]


def check(function, tolerance: float = 1e-5, **kwargs) -> Report:
    """The report of a function of q, k, v whose outputs and gradients are eager's."""
    results = []
    with collect() as report:
        for call in (compiled(function, **kwargs), function):
            leaves = inputs()
            out = call(*leaves)
            out.square().sum().backward()
            results.append((out, [x.grad for x in leaves]))
    torch.testing.assert_close(*results, atol=tolerance, rtol=tolerance)
    return report


def became(report: Report) -> list[str]:
    return [region.form if region.fused else region.code for region in report.regions]


class TestHigherOrder:
    def test_scan(self):
        def function(q, k, v):
            def step(carry, x):
                y = attention(carry, x, x)
                return y, y.clone()

            return scan(step, q[0], k)[1] + v

        assert became(check(function)) == ["plain"]

    def test_cond(self):
        def function(q, k, v):
            return torch.cond(q.sum() > 0, attention, lambda q, k, v: q + k + v, (q, k, v))

        assert became(check(function)) == ["plain"]

    def test_map(self):
        from torch._higher_order_ops.map import map as map_over

        def function(q, k, v):
            return map_over(lambda q, keys: attention(q, *keys), q, (k[0], v[0]))

        assert became(check(function)) == ["plain"]

    def test_nested_compile_region(self):
        region = torch.compiler.nested_compile_region(attention)

        def function(q, k, v):
            return region(region(q, k, v), k, v)

        assert set(became(check(function))) == {"plain"}

    def test_autograd_function(self):
        class Attention(torch.autograd.Function):
            @staticmethod
            def forward(ctx, q, k, v):
                ctx.save_for_backward(v)
                return attention(q, k, v)

            @staticmethod
            def backward(ctx, g):
                (v,) = ctx.saved_tensors
                return g * 2, g * v, g

        # torch 2.11 makes outputs of everything that the forward computes, the scores too.
        assert became(check(lambda *x: Attention.apply(*x))) in (["plain"], ["gradient-stopped"])


class TestOutside:
    def test_disabled(self):
        hidden = torch.compiler.disable(attention)
        report = check(lambda q, k, v: hidden(q, k, v) + attention(q, k, v))
        assert became(report) == ["plain"]

    def test_graph_break_before(self):
        def function(q, k, v):
            q = q * 2
            torch._dynamo.graph_break()
            return attention(q, k, v)

        assert became(check(function)) == ["plain"]

    def test_exported_program(self):
        class Module(torch.nn.Module):
            def forward(self, q, k, v):
                return attention(q, k, v)

        exported = torch.export.export(Module(), tuple(inputs())).module()
        assert became(check(lambda q, k, v: exported(q, k, v))) == ["plain"]

    def test_export_of_a_compiled_module_is_eager_code(self):
        class Module(torch.nn.Module):
            def forward(self, q, k, v):
                return compiled(attention)(q, k, v)

        exported = torch.export.export(Module(), tuple(inputs()))
        targets = {str(node.target) for node in exported.graph.nodes}
        assert not any("fa3" in target for target in targets)


class TestSeveral:
    def test_fullgraph(self):
        ours, eager = GPT(), GPT()
        compiled(ours, fullgraph=True)(batch()).backward()
        eager(batch()).backward()
        assert_same_gradients(ours, eager)

    def test_models_side_by_side(self):
        def doubled(q, k, v):
            return attention(q * 2, k, v)

        calls = [compiled(attention), compiled(doubled), compiled(attention)]
        for _ in range(2):
            for call, function in zip(calls, (attention, doubled, attention)):
                torch.testing.assert_close(call(*inputs()), function(*inputs()))

    @pytest.mark.skipif(
        torch.__version__ < "2.13",
        reason="torch 2.11 crashes when threads compile at once, with backend='eager' too",
    )
    def test_threads(self):
        expected = attention(*inputs())
        call = compiled(attention)
        found: list = [None] * 4

        def work(i):
            with collect() as report:
                found[i] = call(*inputs()), len(report.regions)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(found))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result, _ in found:
            torch.testing.assert_close(result, expected)
        # Each that compiled has its own report, and no other's.
        assert {1} <= {regions for _, regions in found} <= {0, 1}

    @pytest.mark.parametrize("length", [16, 24])
    def test_recompiled_for_another_length(self, length):
        call = compiled(attention)
        call(*inputs())
        q = torch.randn(2, 2, length, 8)
        torch.testing.assert_close(call(q, q, q), attention(q, q, q))
