"""Dropout in training, whole: seeds, checkpoints, partitioners, Hugging Face models."""

from __future__ import annotations

import pytest
import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fa3_compile.report import Report, collect
from tests.graph.harness import rewrite_only

REFERENCE = {"kernels": ["reference"]}


class Block(nn.Module):
    """An attention that drops, checkpointed or not; its last step is linear in `values`."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.projection = nn.Linear(16, 32)

    def attend(self, x: Tensor, values: Tensor) -> Tensor:
        q, k = self.projection(x).view(*x.shape[:2], 2, 2, 8).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
        return F.dropout(weights, 0.5, self.training) @ values

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.attend(x, values)
        out = checkpoint(self.attend, x, values, use_reentrant=self.reentrant)
        assert isinstance(out, Tensor)
        return out


def compiled(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend="fa3", options=REFERENCE)  # pyright: ignore


def step(model: nn.Module) -> tuple[Tensor, Tensor]:
    """(out, the gradient of the values), which have to agree on what was dropped."""
    generator = torch.Generator().manual_seed(7)
    x, values, cotangent = (
        torch.randn(size, generator=generator)
        for size in ((2, 12, 16), (2, 2, 12, 8), (2, 2, 12, 8))
    )
    x.requires_grad_()
    values.requires_grad_()
    out = model(x, values)
    [grad] = torch.autograd.grad((out * cotangent).sum(), values)
    torch.testing.assert_close((grad * values).sum(), (out * cotangent).sum())
    return out.detach(), grad


@pytest.mark.parametrize(
    ("reentrant", "budget"),
    [(None, 1.0), (None, 0.3), (False, 1.0), (True, 1.0)],
    ids=["plain", "recomputed by the partitioner", "checkpoint", "reentrant checkpoint"],
)
def test_the_backward_drops_what_the_forward_dropped(reentrant, budget) -> None:
    """By linearity in V. A memory budget of 0 would compute even the seed again, as it does with
    any random number of any model."""
    with functorch_config.patch(activation_memory_budget=budget), collect() as report:
        model = compiled(Block(reentrant).train())
        torch.manual_seed(1)
        first, second = step(model), step(model)
        torch.manual_seed(1)
        again = step(model)
    assert [r.fused for r in report.regions] == [True] and "uniform" in str(report.regions[0].spec)
    assert not torch.equal(first[0], second[0])
    assert all(map(torch.equal, first, again))


def test_each_block_and_each_call_has_numbers_of_its_own() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(False)

        def forward(self, x, values):
            return self.block(x, values), self.block(x, values)

    model = compiled(Stack().train())
    x, eye = torch.zeros(2, 12, 16), torch.eye(12).expand(2, 2, 12, 12)
    seen = [y != 0 for _ in range(2) for y in model(x, eye)]
    for i, a in enumerate(seen):
        for b in seen[:i]:
            assert 0.4 < (a != b).double().mean() < 0.6


def trained(model: nn.Module, **inputs) -> tuple[Report, list[Tensor]]:
    """The report, and losses from seeds 0, 0 and 1."""
    torch._dynamo.reset()
    run = torch.compile(model.train(), backend=rewrite_only)
    losses = []
    with collect() as report:
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            loss = run(**inputs).last_hidden_state[..., ::3].sum()
            loss.backward()
            losses.append(loss.detach())
    return report, losses


def model_of(name: str, attention: str, **dropout: float) -> nn.Module:
    """A model of two layers without its weights."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=32, attn_implementation=attention, **dropout,
    )  # fmt: skip
    config.use_cache = False
    return getattr(transformers, f"{name}Model")(config)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("name", "dropout"),
    [
        ("Bert", {"attention_probs_dropout_prob": 0.2, "hidden_dropout_prob": 0.0}),
        ("Llama", {"attention_dropout": 0.2}),
    ],
    ids=["bert", "llama"],
)
def test_a_model_of_hugging_face(name: str, dropout: dict, attention: str) -> None:
    model = model_of(name, attention, **dropout)
    report, losses = trained(model, input_ids=torch.arange(20).view(2, 10))
    assert [r.fused for r in report.regions] == [True, True], str(report)
    assert all("uniform" in str(r.spec) for r in report.regions)
    assert losses[0] == losses[1] != losses[2]
