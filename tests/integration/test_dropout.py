"""Dropout in training, whole: seeds, checkpoints, partitioners, Hugging Face models."""

from __future__ import annotations

import pytest
import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fa3_compile.report import Report, collect

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
    """(out, what <out, cotangent> is when computed from the gradient of the values)"""
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


@pytest.mark.parametrize("budget", [1.0, 0.3, 0.0], ids="budget {}".format)
@pytest.mark.parametrize("reentrant", [None, False, True], ids="reentrant {}".format)
def test_the_backward_drops_what_the_forward_dropped(reentrant, budget) -> None:
    """By linearity in V, with checkpoints in the model and with recomputation by the partitioner."""
    if reentrant is not None and budget < 1:
        pytest.skip("a checkpoint already says what is computed again")
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


def trained(model, name: str, **inputs) -> tuple[Report, list[Tensor]]:
    """The report, and losses from seeds 0, 0 and 1."""
    pytest.importorskip("transformers")
    losses = []
    with collect() as report:
        run = compiled(model.train())
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            loss = run(**inputs)[name].square().mean()
            loss.backward()
            losses.append(loss.detach())
    return report, losses


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bert(attention: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, attention_probs_dropout_prob=0.2, hidden_dropout_prob=0.0,
        attn_implementation=attention,
    )  # fmt: skip
    ids = torch.arange(20).view(2, 10)
    report, losses = trained(transformers.BertModel(config), "last_hidden_state", input_ids=ids)
    assert [r.fused for r in report.regions] == [True, True], str(report)
    assert all("uniform" in str(r.spec) for r in report.regions)
    assert losses[0] == losses[1] != losses[2]


def test_llama_with_attention_dropout() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=32, attention_dropout=0.2, use_cache=False,
        attn_implementation="eager",
    )  # fmt: skip
    ids = torch.arange(20).view(2, 10)
    report, losses = trained(transformers.LlamaModel(config), "last_hidden_state", input_ids=ids)
    assert [r.fused for r in report.regions] == [True, True], str(report)
    assert all("uniform" in str(r.spec) for r in report.regions)
    assert losses[0] == losses[1] != losses[2]
