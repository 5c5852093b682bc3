"""The whole way through Inductor: modes, flex_attention taken and left, regions and checkpoints.

What the other tests show of the pass and of AOTAutograd holds below them. FA3_ALL_MODELS=1 adds
what takes long to compile.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch._inductor import config as inductor_config
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from fa3_compile.backend import fa3
from fa3_compile.report import collect
from tests.integration.gpt import GPT, assert_same_gradients, batch, checkpointed

LONG = pytest.mark.skipif("FA3_ALL_MODELS" not in os.environ, reason="FA3_ALL_MODELS is not set")
REFERENCE = {"kernels": "reference"}


def through(function, *args, options=REFERENCE, **kwargs):
    """(what became of each region, the result)."""
    with collect() as report:
        result = torch.compile(function, backend=fa3, options=options, **kwargs)(*args)
    return [r.form if r.fused else r.code for r in report.regions], result


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 32, 16, generator=generator) for _ in range(3)]


def causal(b, h, q, kv):
    return q >= kv


class TestFlex:
    def test_fused(self):
        made = create_block_mask(causal, None, None, 32, 32, "cpu", 16)

        def attention(q, k, v):
            return flex_attention(q, k, v, lambda s, b, h, q, kv: torch.tanh(s), made) + 1

        became, ours = through(attention, *inputs())
        assert became == ["softcap(1) + causal"]
        torch.testing.assert_close(ours, attention(*inputs()), atol=1e-5, rtol=1e-5)

    def test_left_to_inductors_own_lowering(self):
        counts = torch.ones(1, 1, 2, dtype=torch.int32)
        indices = torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32)
        made = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=16)

        def attention(q, k, v):
            return flex_attention(q, k, v, block_mask=made)

        # Inductor has a kernel of its own for it, written for vectors.
        with inductor_config.patch({"cpp.simdlen": None}):
            became, ours = through(attention, *inputs())
        assert became == ["block-lists"]
        # Its compiled code follows the lists, its eager code does not.
        parts = [
            torch.softmax(q @ k.mT / 4, -1) @ v
            for q, k, v in zip(*(x.split(16, 2) for x in inputs()))
        ]
        torch.testing.assert_close(ours, torch.cat(parts, 2), atol=1e-5, rtol=1e-5)


def test_checkpointed_training_step():
    ours, eager = GPT(wrapped=checkpointed), GPT()
    became, loss = through(ours, batch())
    loss.backward()
    eager(batch()).backward()
    assert became == ["bias + causal"]
    assert_same_gradients(ours, eager)


def test_a_graph_that_comes_again_is_reported_once():
    def attention(q, k, v, scale):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)

    # PyTorch compiles this operator's scale in, and finds out when it has traced the graph.
    with collect() as report:
        ours = torch.compile(attention, backend=fa3, dynamic=True)(*inputs(), 0.3)
    torch.testing.assert_close(ours, attention(*inputs(), 0.3), atol=1e-5, rtol=1e-5)
    assert [r.score for r in report.fused] == ["0.3*s"] and report.graphs == 1


class TestModes:
    @pytest.fixture
    def told(self, monkeypatch) -> list:
        """What Inductor is told, instead of compiling."""
        from torch._inductor import compile_fx as module

        given = []

        def compile_fx(gm, inputs, config_patches=None):
            given.append(config_patches or {})
            return gm

        monkeypatch.setattr(module, "compile_fx", compile_fx)
        return given

    def run(self, **kwargs) -> str:
        """The operator's spec text."""

        def attention(q, k, v):
            return (q @ k.mT).softmax(-1) @ v

        with collect() as report:
            torch.compile(attention, backend=fa3, **kwargs)(*inputs())
        return report.regions[0].kernel

    @pytest.mark.parametrize("mode", ["max-autotune", "max-autotune-no-cudagraphs"])
    def test_max_autotune(self, told, mode):
        self.run(mode=mode)
        assert told[0]["max_autotune"] is True

    def test_reduce_overhead(self, told):
        self.run(mode="reduce-overhead")
        assert told[0] == {"triton.cudagraphs": True}

    @LONG
    @pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead"])
    def test_training_step(self, mode):
        ours, eager = GPT(), GPT()
        torch.compile(ours, backend=fa3, mode=mode)(batch()).backward()
        eager(batch()).backward()
        assert_same_gradients(ours, eager)


def test_scores_divided_by_an_integer_train_where_they_are_left():
    """Inductor's own pattern takes the integer for a length, of which it then finds no source."""

    def attention(q, k, v):
        return torch.softmax(q @ k.mT / 4, -1) @ v

    ours, eager = ([x.requires_grad_() for x in inputs()] for _ in range(2))
    became, out = through(attention, *ours, options={"fuel": 0})
    assert became == ["fuel"]
    out[..., 0].sum().backward()
    attention(*eager)[..., 0].sum().backward()
    for got, want in zip(ours, eager):
        torch.testing.assert_close(got.grad, want.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("copied", ["dropout", "clone"])
def test_returned_weights_are_not_written_over_in_the_backward(copied: str):
    """Inductor leaves out the copy, and may have been given the weights' memory for the backward."""
    copy = {"dropout": lambda x: F.dropout(x, 0.0, True), "clone": torch.clone}[copied]

    def attention(q, k, v):
        q, k, v = (x.unflatten(-1, (4, 8)).transpose(1, 2) for x in (q, k, v))
        weights = copy(torch.softmax(q @ k.mT / 3, -1))
        return weights @ v, weights.squeeze(2)

    torch.manual_seed(0)
    leaves = [torch.randn(2, n, 32, requires_grad=True) for n in (1, 8, 8)]
    became, (out, weights) = through(attention, *leaves)
    assert became == ["plain"]
    torch.autograd.backward([out, weights], [torch.ones_like(x) for x in (out, weights)])
    torch.testing.assert_close(weights, attention(*leaves)[1], atol=1e-5, rtol=1e-5)
