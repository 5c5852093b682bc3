"""`nn.TransformerEncoderLayer` in inference, which is one operator of PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fa3_compile.testing import assert_matches_eager
from tests.graph.harness import check, rewrite_only, specs
from tests.graph.inputs import normal

WIDTH, LENGTH = 16, 6
ROWS, KEYS = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
PADDED = torch.tensor([[False] * 4 + [True] * 2, [False] * 6])
NO_KEYS = torch.tensor([[True] * 6, [False] * 6])


def layer(**settings):
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(WIDTH, 2, 24, batch_first=True, **settings).eval()


def inference(model, *args, **settings):
    return check(model, normal(2, LENGTH, WIDTH), *args, training=False, **settings)


@pytest.mark.parametrize("settings", [{}, {"norm_first": True}, {"activation": "gelu"}], ids=str)
def test_plain(settings):
    report = inference(layer(**settings))
    assert specs(report) == "attention(score=0.3535533905932738*s, out_order=bqhd)"


# name -> (src_mask, src_key_padding_mask, the spec's mask)
MASKS = {
    "padding": (None, PADDED, "load(0, b, kv) == 0"),
    "rows without keys": (None, NO_KEYS, "load(0, b, kv) == 0"),
    "causal": (KEYS > ROWS, None, "load(0, q, kv) == 0"),
    "both": (KEYS > ROWS, PADDED, "load("),
    "of each head": ((KEYS > ROWS).repeat(4, 1, 1), None, "load("),
    # As the operator has it: what is not 0 hides.
    "of numbers": (torch.where(KEYS > ROWS, -2.0, 0.0), None, "load(0, q, kv) == 0"),
    "padding of numbers": (None, PADDED * 1.0, "load(0, b, kv) == 0"),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    mask, padding, read = MASKS[name]
    report = inference(layer(), mask, padding)
    assert "mask=" in specs(report) and read in specs(report)


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="with such lengths Dynamo leaves it out of the graph"
)
def test_lengths_that_change():
    assert inference(layer(), dynamic=True).fused


def test_a_stack_of_layers():
    report = inference(nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False).eval())
    assert len(report.fused) == 2


def test_left_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = assert_matches_eager(
            layer(), normal(2, LENGTH, WIDTH), backend=rewrite_only, dtype=torch.bfloat16
        )
    assert not report.fused
