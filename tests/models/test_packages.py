"""timm's models and diffusers' attention block as those packages write them, where installed.

Neither is required: without them these tests are skipped. Attention through
`scaled_dot_product_attention` is turned off in both, so that what runs is their plain PyTorch.
"""

from __future__ import annotations

import math

import pytest
import torch

from fa3_compile.testing import assert_matches_eager
from tests.graph.harness import rewrite_only

SMALL = {"img_size": 64, "depth": 2}
NARROW = {**SMALL, "embed_dim": 48, "num_heads": 4}
WINDOWS = {
    "img_size": 64,
    "window_size": 4,
    "embed_dim": 24,
    "depths": (2, 2),
    "num_heads": (2, 2),
}
# name -> (arguments, attention regions in one forward pass)
TIMM = {
    "vit_tiny_patch16_224": (SMALL, 2),
    "eva02_tiny_patch14_224": ({"img_size": 56, "depth": 2}, 2),
    "beit_base_patch16_224": (NARROW, 2),
    "swin_tiny_patch4_window7_224": (WINDOWS, 4),
    "swinv2_tiny_window8_256": (WINDOWS, 4),
    "swinv2_cr_tiny_224": (WINDOWS, 4),
    "samvit_base_patch16_224": ({**NARROW, "window_size": 2}, 2),
    "vit_relpos_small_patch16_224": (SMALL, 2),
    "vit_base_patch16_siglip_224": (NARROW, 3),  # and one that pools
    "tnt_s_patch16_224": (SMALL, 4),  # pixels and patches
    "cait_xxs24_224": (SMALL, 2),  # class attention; its talking heads mix heads, and are left
    "xcit_nano_12_p16_224": (SMALL, 4),  # over channels, and class attention
}


def sharpened(model: torch.nn.Module) -> torch.nn.Module:
    """Weights under which scores are of size one, the same in every run."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                scale = 1 / math.sqrt(max(parameter[0].numel(), 1))
                parameter.copy_(torch.randn_like(parameter) * scale)
    return model.eval()


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    arguments, regions = TIMM[name]
    timm.layers.set_fused_attn(False)
    try:
        model = sharpened(timm.create_model(name, pretrained=False, num_classes=3, **arguments))
    finally:
        timm.layers.set_fused_attn(True)
    image = torch.randn(1, 3, arguments["img_size"], arguments["img_size"])
    report = assert_matches_eager(model, image, backend=rewrite_only)
    assert len(report.fused) == regions, str(report)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("upcast", [False, True])
def test_diffusers(cross, upcast):
    attention = pytest.importorskip(
        "diffusers.models.attention_processor", reason="diffusers is not installed"
    )
    block = attention.Attention(
        query_dim=32,
        cross_attention_dim=24 if cross else None,
        heads=4,
        dim_head=8,
        upcast_attention=upcast,
        upcast_softmax=upcast,
        processor=attention.AttnProcessor(),
    )
    hidden = torch.randn(2, 16, 32)
    context = torch.randn(2, 7, 24) if cross else None
    report = assert_matches_eager(
        sharpened(block), hidden, context, backend=rewrite_only, training=True
    )
    assert len(report.fused) == len(report.regions) == 1, str(report)
