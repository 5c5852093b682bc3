"""What to put beside your model's tests, so that CI fails when a change loses its fused attention.

python -m pytest examples/test_fused_attention.py
"""

import torch
from expecttest import assert_expected_inline
from transformers import AutoModel, MistralConfig

from fa3_compile.testing import assert_fused, assert_matches_eager, snapshot


def tiny_mistral():
    """Your model with your masks, in a size that a CI machine runs in a second."""
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        use_cache=False,
    )
    torch.manual_seed(0)
    return AutoModel.from_config(config, attn_implementation="eager").eval()


def tokens():
    return torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))


def test_every_layer_is_fused():
    assert_fused(tiny_mistral(), tokens(), regions=2, forms="causal + window(8)")


def test_the_attention_is_what_it_was():
    # Run pytest with EXPECTTEST_ACCEPT=1 to write a new snapshot into this file.
    assert_expected_inline(
        snapshot(tiny_mistral(), tokens()),
        """\
2 of 2 regions fused
0, 1: causal + window(8) | score 0.3535533905932738*s | mask (kv <= q) & (kv >= q - 7)""",
    )


def test_outputs_and_gradients_are_eagers():
    assert_matches_eager(tiny_mistral(), tokens(), training=True)
