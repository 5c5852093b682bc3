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
    """name: the `model_type` in transformers. batch x length: the tokens of one call."""

    name: str
    config: Mapping[str, Any]
    batch: int
    length: int


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
}


def large(
    name: str,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    batch: int | None = None,
    length: int | None = None,
) -> tuple[nn.Module, Inputs]:
    """The model `LARGE[name]` in eval mode and its inputs, both on `device`.

    There is no padding mask: every row is full. `batch` and `length` override the entry's.
    """
    entry = LARGE[name]
    config = AutoConfig.for_model(
        entry.name, vocab_size=VOCABULARY, pad_token_id=0, use_cache=False, **entry.config
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModel.from_config(config, attn_implementation="eager", dtype=dtype)
        shape = (batch or entry.batch, length or entry.length)
        tokens = torch.randint(FIRST_ORDINARY_TOKEN, VOCABULARY, shape)
    return model.eval(), {"input_ids": tokens}
