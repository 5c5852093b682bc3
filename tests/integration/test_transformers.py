"""transformers with attn_implementation="flex_attention": its BlockMasks are read as masks."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from transformers import LlamaConfig, LlamaForCausalLM

from fa3_compile.report import collect
from tests.graph.harness import rewrite_only, specs

LENGTH = 140


@pytest.fixture(scope="module")
def models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """With flex_attention, and the same written out."""
    torch.manual_seed(0)
    flex, eager = (
        LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=32,
                attn_implementation=name,
            )
        ).eval()
        for name in ("flex_attention", "eager")
    )
    eager.load_state_dict(flex.state_dict())
    return flex, eager


def logits(model, padding=None):
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH) % 31
    with torch.no_grad():
        return model(tokens, attention_mask=padding, use_cache=False).logits


def test_causal(models):
    llama, eager = models
    with collect() as report:
        ours = logits(torch.compile(llama, backend=rewrite_only))
    torch.testing.assert_close(ours, logits(eager), atol=1e-5, rtol=1e-5)
    assert_expected_inline(
        specs(report),
        """attention(score=0.3535533905932738*s, mask=(kv <= q) & (load(0, b, q) == load(0, b, kv)), dead=nan, aux=[int], out_order=bqhd)""",
    )


def test_padding(models):
    llama, eager = models
    padding = torch.ones(2, LENGTH, dtype=torch.long)
    padding[1, :9] = 0
    with collect() as report:
        ours = logits(torch.compile(llama, backend=rewrite_only), padding)
    seen = padding.bool()
    torch.testing.assert_close(ours[seen], logits(eager, padding)[seen], atol=1e-5, rtol=1e-5)
    assert_expected_inline(
        specs(report),
        """attention(score=0.3535533905932738*s, mask=(kv <= q) & (load(0, b, kv) != 0), dead=zero, aux=[bool], out_order=bqhd)""",
    )
