"""Training through compiled models: autocast, checkpointing, accumulation, compiled autograd."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fa3_compile.lower import dispatch
from fa3_compile.report import collect
from tests.integration.gpt import (
    GPT,
    assert_same_gradients,
    batch,
    checkpointed,
    compiled,
    gradients,
)


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """How often the operators ran."""
    counts = {"forward": 0, "backward": 0}

    def counted(name, function):
        def call(*args):
            counts[name] += 1
            return function(*args)

        return call

    for name in counts:
        monkeypatch.setattr(dispatch, name, counted(name, getattr(dispatch, name)))
    return counts


class TestAutocast:
    @pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
    def test_bfloat16(self, inside):
        class Wrapped(GPT):
            def forward(self, tokens):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    return super().forward(tokens)

        tokens = batch()
        models = [Wrapped() if inside else GPT() for _ in range(3)]

        def step(model, call):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
                loss = call(tokens)
            loss.backward()
            return loss

        with collect() as report:
            ours = step(models[0], compiled(models[0]))
        eager = step(models[1], models[1])
        GPT.forward(models[2], tokens).backward()
        assert len(report.fused) == len(report.regions) == 1
        assert ours.dtype == eager.dtype
        torch.testing.assert_close(ours, eager, atol=0.01, rtol=0.01)
        # Not further from float32 than eager under autocast is.
        for name, exact in gradients(models[2]).items():
            off, allowed = (
                (gradients(m)[name].float() - exact).abs().max() for m in (models[0], models[1])
            )
            assert off <= 2 * allowed + 0.01 * exact.abs().max(), name


class TestCheckpointing:
    def step(self, wrapped):
        """One training step, its gradients compared with those of a model without checkpoints."""
        ours, eager = GPT(wrapped=wrapped), GPT()
        with collect() as report:
            compiled(ours)(batch()).backward()
        eager(batch()).backward()
        assert_same_gradients(ours, eager)
        assert len(report.fused) == len(report.regions) == 1

    def test_none(self, calls):
        self.step(None)
        assert calls == {"forward": 1, "backward": 1}

    def test_full_recomputes_the_attention(self, calls):
        self.step(checkpointed)
        assert calls == {"forward": 2, "backward": 1}

    @pytest.mark.parametrize("saved", [True, False], ids=["saved", "recomputed"])
    def test_selective(self, saved, calls):
        kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
        kept += [torch.ops.fa3.attention.default] if saved else []

        def policy(ctx, op, *args, **kwargs):
            save = CheckpointPolicy.MUST_SAVE
            return save if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = functools.partial(create_selective_checkpoint_contexts, policy)

        def wrapped(block, x):
            return checkpoint(block, x, use_reentrant=False, context_fn=contexts)

        self.step(wrapped)
        assert calls == {"forward": 1 if saved else 2, "backward": 1}


def test_gradients_accumulate():
    ours, eager = GPT(), GPT()
    call = compiled(ours)
    for seed in range(3):
        call(batch(seed=seed)).backward()
        eager(batch(seed=seed)).backward()
    assert_same_gradients(ours, eager)


def test_ten_steps_of_an_optimizer():
    losses = []
    for wrap in (compiled, lambda model: model):
        model = GPT()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        call = wrap(model)
        losses.append([])
        for seed in range(10):
            loss = call(batch(seed=seed % 2))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1][-1] < losses[1][0] - 0.3
    torch.testing.assert_close(losses[0], losses[1], atol=1e-3, rtol=1e-3)


def test_frozen_parameters():
    ours, eager = GPT(), GPT()
    for model in (ours, eager):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("qkv" not in name)
    compiled(ours)(batch()).backward()
    eager(batch()).backward()
    assert_same_gradients(ours, eager)


def test_compiled_autograd():
    ours, eager = GPT(), GPT()
    eager(batch()).backward()
    call = compiled(ours)
    with collect() as report:
        # Around the call alone: a step that is compiled as a whole would take the model with it.
        with compiled_autograd._enable(lambda gm: gm):
            call(batch()).backward()
    assert len(report.fused) == len(report.regions) == 1
    assert_same_gradients(ours, eager)


def attention_with_bias(q, k, v, bias):
    return (q @ k.mT * 0.25 + bias).softmax(-1) @ v


def hooked(q, k, v, bias):
    y = attention_with_bias(q, k, v, bias)
    y.register_hook(lambda grad: grad.clamp(-0.5, 0.5))
    return y


def leaves() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 2, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8), (2, 9, 9))
    return [torch.randn(x, generator=generator).requires_grad_() for x in shapes]


def twice(out, xs):
    out.square().sum().backward(retain_graph=True)
    out.sum().backward()


WAYS = {
    "retained graph": (attention_with_bias, twice),
    "two of the inputs": (
        attention_with_bias,
        lambda out, xs: out.square().sum().backward(inputs=[xs[1], xs[3]]),
    ),
    "expanded cotangent": (
        attention_with_bias, lambda out, xs: out.backward(torch.ones(1).expand_as(out)),
    ),
    "transposed cotangent": (
        attention_with_bias,
        lambda out, xs: out.backward(torch.randn(9, 8, 2, 2, generator=torch.Generator()).permute(3, 2, 0, 1)),
    ),
    "hook on the result": (hooked, lambda out, xs: out.square().sum().backward()),
    "graph of the gradient, unused": (
        attention_with_bias,
        lambda out, xs: torch.autograd.backward(out.square().sum(), create_graph=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:Using backward")
def test_ways_to_ask_for_gradients(way):
    function, ask = WAYS[way]
    found = []
    with collect() as report:
        for call in (compiled(function), function):
            xs = leaves()
            ask(call(*xs), xs)
            found.append([x.grad if x.grad is None else x.grad.detach() for x in xs])
    assert len(report.fused) == len(report.regions) == 1
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_a_bias_is_saved_for_the_backward():
    """Eager adds it and forgets it; here it is read again, and a write in between is an error."""
    q, k, v, bias = leaves()
    out = compiled(attention_with_bias)(q, k, v, bias)
    with torch.no_grad():
        bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_second_derivatives_are_refused_in_words():
    model = GPT()
    loss = compiled(model)(batch())
    weight = model.head.weight
    with pytest.raises(RuntimeError, match="second derivative|double backward|create_graph"):
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        first.square().sum().backward()


def test_gradient_of_the_input_alone():
    q = torch.randn(2, 2, 16, 8, requires_grad=True)

    def attention(q):
        return (q @ q.mT).softmax(-1) @ q

    (ours,) = torch.autograd.grad(compiled(attention)(q).square().sum(), q)
    (eager,) = torch.autograd.grad(attention(q).square().sum(), q)
    torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-5)


def test_evaluation_between_training_steps():
    ours, eager = GPT(), GPT()
    call = compiled(ours)
    for model, forward in ((ours, call), (eager, eager)):
        forward(batch()).backward()
        with torch.no_grad():
            model.score = forward(batch(seed=5)).item()
        forward(batch(seed=1)).backward()
    assert ours.score == pytest.approx(eager.score, abs=1e-5)
    assert_same_gradients(ours, eager)
