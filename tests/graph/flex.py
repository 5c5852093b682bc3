"""What the tests of flex_attention share."""

from __future__ import annotations

import pytest
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from tests.graph.inputs import S

MARKS = [
    pytest.mark.usefixtures("flex_gradients_on_the_cpu"),
    pytest.mark.filterwarnings("ignore:.*flex_attention.*", "ignore:.*return_lse.*"),
]


def block_mask(mask_mod, q_len=S, kv_len=S, batch=None, heads=None, block=8) -> BlockMask:
    return create_block_mask(mask_mod, batch, heads, q_len, kv_len, "cpu", block)


def causal(b, h, q, kv):
    return q >= kv
