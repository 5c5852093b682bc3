"""Models of a size that says something about speed: for one H100, inference and training.

Layers have the published models' shapes; the vocabulary is small and the layers are few, so that
time and memory go to attention. The initialisation is transformers' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from tests.models.inputs import FIRST_ORDINARY_TOKEN, Inputs

VOCABULARY = 1024
LAYERS = 4


@dataclass(frozen=True)
class LargeModel:
    """name: the `model_type` in transformers. batch x length: the tokens of one call.

    padded   rows of half to full length, padded on the right
    decoder  there is a decoder too, of as many tokens
    """

    name: str
    config: Mapping[str, Any]
    batch: int
    length: int
    padded: bool = False
    decoder: bool = False


LARGE: dict[str, LargeModel] = {
    "llama": LargeModel(  # Llama-3-8B's layer
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
        },
        batch=2,
        length=8192,
    ),
    "gemma2": LargeModel(  # Gemma-2-2B's layer: heads of 256, softcap 50, every other window 4096
        "gemma2",
        {
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "attn_logit_softcapping": 50.0,
            "sliding_window": 4096,
            "max_position_embeddings": 8192,
        },
        batch=2,
        length=8192,
    ),
    "bloom": LargeModel(  # Bloom-1b7's layer
        "bloom",
        {"hidden_size": 2048, "n_layer": LAYERS, "n_head": 16},
        batch=2,
        length=4096,
    ),
    "mistral": LargeModel(  # Mistral-7B's layer, with a window of 1024
        "mistral",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "sliding_window": 1024,
            "max_position_embeddings": 8192,
        },
        batch=2,
        length=8192,
    ),
    "gpt2": LargeModel(  # GPT-2 medium's layer, for longer texts
        "gpt2",
        {
            "n_embd": 1024,
            "n_layer": LAYERS,
            "n_head": 16,
            "n_positions": 4096,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        },
        batch=4,
        length=4096,
    ),
    "bert": LargeModel(  # BERT-large's layer, for longer texts
        "bert",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 16,
            "max_position_embeddings": 2048,
            **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
        },
        batch=8,
        length=2048,
        padded=True,
    ),
    "gpt_oss": LargeModel(  # gpt-oss-20b's layer with a quarter of its experts: sinks, windows of 128
        "gpt_oss",
        {
            "num_hidden_layers": LAYERS,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "experts_implementation": "grouped_mm",
        },
        batch=2,
        length=4096,
    ),
    "t5": LargeModel(  # T5-large's layer: a learned bias of relative positions
        "t5",
        {
            "d_model": 1024,
            "d_kv": 64,
            "d_ff": 4096,
            "num_heads": 16,
            "num_layers": LAYERS // 2,
            "num_decoder_layers": LAYERS // 2,
            "dropout_rate": 0.0,
        },
        batch=4,
        length=2048,
        decoder=True,
    ),
}


def large(
    name: str,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    batch: int | None = None,
    length: int | None = None,
    attention: str = "eager",
) -> tuple[nn.Module, Inputs]:
    """The model `LARGE[name]` in eval mode and its inputs, both on `device`.

    `batch` and `length` override the entry's; `attention` is transformers' attn_implementation.
    Raises ValueError where transformers has no such implementation for the model.
    """
    entry = LARGE[name]
    config = AutoConfig.for_model(
        entry.name, vocab_size=VOCABULARY, pad_token_id=0, use_cache=False, **entry.config
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModel.from_config(config, attn_implementation=attention, dtype=dtype)
        shape = (batch or entry.batch, length or entry.length)
        inputs = {"input_ids": torch.randint(FIRST_ORDINARY_TOKEN, VOCABULARY, shape)}
        if entry.padded:
            kept = torch.linspace(shape[1] / 2, shape[1], shape[0])
            inputs["attention_mask"] = (torch.arange(shape[1]) < kept[:, None]).long()
        if entry.decoder:
            inputs["decoder_input_ids"] = torch.randint(FIRST_ORDINARY_TOKEN, VOCABULARY, shape)
    return model.eval(), inputs
