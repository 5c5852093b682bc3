"""timm's attention classes, with SDPA and without, and whole models of a few blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.coverage.package_case import Case, block, found, normal

TOKENS = (2, 16, 32)
IMAGE = (2, 32, 8, 8)
HEADS: dict[str, Any] = {"dim": 32, "num_heads": 4}


def _relative(path: str, *inputs: Any, **fields: Any) -> Case:
    """A class that is given a table of relative positions of a 4 x 4 window."""

    def made():
        table = partial(found("timm.layers:RelPosBias"), window_size=(4, 4))
        return block(path, *inputs, rel_pos_cls=table, **fields)()

    return made


def _rotary(path: str, *, width: int = 16, **fields: Any) -> Case:
    """A class that is given rotary sines and cosines, as timm keeps them side by side."""
    return block(path, TOKENS, call={"rope": lambda: torch.randn(16, width)}, **fields)


def _image_model(name: str, size: int = 64, **fields: Any) -> Case:
    def made():
        model = found("timm:create_model")(name, num_classes=3, **fields)
        return model, (normal(1, 3, size, size),), {}

    return made


def _fused(case: Case, on: bool) -> Case:
    """The case with timm's own use of SDPA on or off."""

    def made():
        found("timm.layers:set_fused_attn")(on)
        return case()

    return made


_BLOCKS: dict[str, Case] = {
    "Attention": block("timm.layers:Attention", TOKENS, **HEADS),
    "Attention norms, gate": block(
        *("timm.layers:Attention", TOKENS),
        **{**HEADS, "qk_norm": True, "scale_norm": True, "gated": True},
        norm_layer=torch.nn.LayerNorm,
    ),
    "Attention mask": block(
        "timm.layers:Attention",
        TOKENS,
        call={"attn_mask": lambda: torch.ones(16, 16, dtype=torch.bool).tril()},
        **HEADS,
    ),
    "Attention causal": block("timm.layers:Attention", TOKENS, call={"is_causal": True}, **HEADS),
    "AttentionRope": _rotary("timm.layers:AttentionRope", num_prefix_tokens=0, **HEADS),
    "AttentionRope halves, groups": _rotary(
        *("timm.layers:AttentionRope",),
        **{**HEADS, "num_kv_heads": 2, "qkv_fused": False, "rotate_half": True},
        num_prefix_tokens=0,
    ),
    "EvaAttention": _rotary(
        "timm.models.eva:EvaAttention", num_prefix_tokens=0, scale_norm=False, **HEADS
    ),
    "DiffAttention": block("timm.layers:DiffAttention", TOKENS, **HEADS),
    "DiffAttention dual": block("timm.layers:DiffAttention", TOKENS, dual_lambda=True, **HEADS),
    "Attention2d": block("timm.layers.attention2d:Attention2d", (2, 32, 4, 4), **HEADS),
    "MultiQueryAttentionV2": block("timm.layers:MultiQueryAttentionV2", (2, 32, 4, 4), **HEADS),
    "MultiQueryAttention2d": block("timm.layers:MultiQueryAttention2d", (2, 32, 4, 4), **HEADS),
    "MultiQueryAttention2d strides": block(
        "timm.layers:MultiQueryAttention2d", IMAGE, query_strides=2, kv_stride=2, **HEADS
    ),
    "AttentionPoolLatent": block(
        "timm.layers:AttentionPoolLatent", TOKENS, in_features=32, num_heads=4, latent_len=3
    ),
    "AttentionPoolPrr": block("timm.layers.attention_pool:AttentionPoolPrr", TOKENS, **HEADS),
    "AttentionPool2d": block(
        "timm.layers:AttentionPool2d", (2, 32, 4, 4), in_features=32, feat_size=4, head_dim=8
    ),
    "RotAttentionPool2d": block(
        "timm.layers:RotAttentionPool2d", (2, 32, 4, 4), in_features=32, ref_feat_size=4, head_dim=8
    ),
    "BottleneckAttn": block(
        "timm.layers.bottleneck_attn:BottleneckAttn", (2, 32, 4, 4), dim=32, feat_size=(4, 4)
    ),
    "HaloAttn": block("timm.layers.halo_attn:HaloAttn", IMAGE, block_size=4, halo_size=1, **HEADS),
    "LambdaLayer": block(
        "timm.layers.lambda_layer:LambdaLayer", IMAGE, dim=32, feat_size=(8, 8), r=None
    ),
    "LambdaLayer local": block("timm.layers.lambda_layer:LambdaLayer", IMAGE, dim=32, r=3),
    "NonLocalAttn": block("timm.layers:NonLocalAttn", IMAGE, in_channels=32, rd_ratio=0.5),
    "BatNonLocalAttn": block("timm.layers:BatNonLocalAttn", IMAGE, in_channels=32, block_size=4),
    "beit.Attention": block("timm.models.beit:Attention", (2, 17, 32), window_size=(4, 4), **HEADS),
    "cait.ClassAttn": block("timm.models.cait:ClassAttn", TOKENS, **HEADS),
    "cait.TalkingHeadAttn": block("timm.models.cait:TalkingHeadAttn", TOKENS, **HEADS),
    "cpubone.ConvAttention": block("timm.models.cpubone:ConvAttention", IMAGE, input_dim=32),
    "crossvit.CrossAttention": block("timm.models.crossvit:CrossAttention", TOKENS, **HEADS),
    "csatv2.SpatialAttention": block("timm.models.csatv2:SpatialAttention", IMAGE),
    "davit.ChannelAttention": block("timm.models.davit:ChannelAttention", TOKENS, **HEADS),
    "davit.ChannelAttentionV2": block("timm.models.davit:ChannelAttentionV2", TOKENS, **HEADS),
    "davit.WindowAttention": block(
        "timm.models.davit:WindowAttention", TOKENS, window_size=4, **HEADS
    ),
    "edgenext.CrossCovarianceAttn": block(
        "timm.models.edgenext:CrossCovarianceAttn", TOKENS, **HEADS
    ),
    "efficientformer.Attention": block(
        "timm.models.efficientformer:Attention", TOKENS, key_dim=8, resolution=4, **HEADS
    ),
    "efficientformer_v2.Attention2d": block(
        "timm.models.efficientformer_v2:Attention2d",
        (2, 32, 4, 4),
        key_dim=8,
        resolution=4,
        **HEADS,
    ),
    "efficientformer_v2.Attention2dDownsample": block(
        *("timm.models.efficientformer_v2:Attention2dDownsample", IMAGE),
        **{**HEADS, "key_dim": 8, "resolution": 8, "out_dim": 32},
    ),
    "efficientvit_msra.CascadedGroupAttention": block(
        *("timm.models.efficientvit_msra:CascadedGroupAttention", (2, 32, 4, 4)),
        **{**HEADS, "key_dim": 8, "attn_ratio": 1, "resolution": 4},
    ),
    "fastvit.Attention": block("timm.models.fastvit:Attention", (2, 32, 4, 4), dim=32, head_dim=8),
    "gcvit.WindowAttentionGlobal": block(
        *("timm.models.gcvit:WindowAttentionGlobal", TOKENS, TOKENS),
        **{**HEADS, "window_size": (4, 4)},
    ),
    "gcvit.WindowAttentionGlobal local": block(
        *("timm.models.gcvit:WindowAttentionGlobal", TOKENS),
        **{**HEADS, "window_size": (4, 4), "use_global": False},
    ),
    "gemma4_vit.Gemma4Attention": block(
        *("timm.models.gemma4_vit:Gemma4Attention", TOKENS, (2, 16, 8), (2, 16, 8)),
        **{**HEADS, "head_dim": 8, "num_kv_heads": 2},
    ),
    "hiera.MaskUnitAttention": block(
        *("timm.models.hiera:MaskUnitAttention", TOKENS),
        dim=32,
        dim_out=32,
        heads=4,
        q_stride=2,
        window_size=4,
        use_mask_unit_attn=True,
    ),
    "hiera.MaskUnitAttention global": block(
        "timm.models.hiera:MaskUnitAttention", TOKENS, dim=32, dim_out=32, heads=4, q_stride=2
    ),
    "hieradet_sam2.MultiScaleAttention": block(
        *("timm.models.hieradet_sam2:MultiScaleAttention", (2, 4, 4, 32)),
        **{**HEADS, "dim_out": 32, "q_pool": torch.nn.MaxPool2d(2)},
    ),
    "levit.Attention": block(
        "timm.models.levit:Attention", TOKENS, key_dim=8, resolution=(4, 4), **HEADS
    ),
    "levit.AttentionDownsample": block(
        *("timm.models.levit:AttentionDownsample", TOKENS),
        in_dim=32,
        out_dim=32,
        key_dim=8,
        num_heads=4,
        resolution=(4, 4),
    ),
    "lowformer.ConvAttention": block("timm.models.lowformer:ConvAttention", IMAGE, input_dim=32),
    "maxxvit.Attention2d": block(
        "timm.models.maxxvit:Attention2d", (2, 32, 4, 4), dim=32, dim_head=8
    ),
    "maxxvit.Attention2d relative": _relative(
        "timm.models.maxxvit:Attention2d", (2, 32, 4, 4), dim=32, dim_head=8, head_first=False
    ),
    "maxxvit.AttentionCl": _relative(
        "timm.models.maxxvit:AttentionCl", (2, 4, 4, 32), dim=32, dim_head=8
    ),
    "metaformer.Attention": block("timm.models.metaformer:Attention", TOKENS, dim=32, head_dim=8),
    "mobilevit.LinearSelfAttention": block(
        "timm.models.mobilevit:LinearSelfAttention", (2, 32, 4, 16), embed_dim=32
    ),
    "mvitv2.MultiScaleAttention": block(
        *("timm.models.mvitv2:MultiScaleAttention", (2, 17, 32), [4, 4]),
        **{**HEADS, "dim_out": 32, "feat_size": (4, 4)},
        kernel_q=(3, 3),
        kernel_kv=(3, 3),
        stride_q=(1, 1),
        stride_kv=(2, 2),
    ),
    "nest.Attention": block("timm.models.nest:Attention", (2, 4, 16, 32), **HEADS),
    "nextvit.EfficientAttention": block(
        "timm.models.nextvit:EfficientAttention", TOKENS, dim=32, head_dim=8, sr_ratio=2
    ),
    "pvt_v2.Attention": block("timm.models.pvt_v2:Attention", TOKENS, [4, 4], sr_ratio=2, **HEADS),
    "pvt_v2.Attention linear": block(
        "timm.models.pvt_v2:Attention", TOKENS, [4, 4], linear_attn=True, **HEADS
    ),
    "swiftformer.EfficientAdditiveAttention": block(
        "timm.models.swiftformer:EfficientAdditiveAttention", IMAGE, in_dims=32, token_dim=32
    ),
    "swin_transformer.WindowAttention": block(
        *("timm.models.swin_transformer:WindowAttention", (4, 16, 32), (2, 16, 16)),
        **{**HEADS, "window_size": 4},
    ),
    "swin_transformer_v2.WindowAttention": block(
        *("timm.models.swin_transformer_v2:WindowAttention", (4, 16, 32), (2, 16, 16)),
        **{**HEADS, "window_size": (4, 4)},
    ),
    "swin_transformer_v2_cr.WindowMultiHeadAttention": block(
        *("timm.models.swin_transformer_v2_cr:WindowMultiHeadAttention", (4, 16, 32), (2, 16, 16)),
        **{**HEADS, "window_size": (4, 4)},
    ),
    "swin_transformer_v2_cr.WindowMultiHeadAttention sequential": block(
        *("timm.models.swin_transformer_v2_cr:WindowMultiHeadAttention", (4, 16, 32)),
        **{**HEADS, "window_size": (4, 4), "sequential_attn": True},
    ),
    "tiny_vit.Attention": block(
        "timm.models.tiny_vit:Attention",
        TOKENS,
        key_dim=8,
        attn_ratio=1,
        resolution=(4, 4),
        **HEADS,
    ),
    "tnt.Attention": block("timm.models.tnt:Attention", TOKENS, hidden_dim=16, **HEADS),
    "twins.LocallyGroupedAttn": block(
        "timm.models.twins:LocallyGroupedAttn", TOKENS, [4, 4], ws=2, **HEADS
    ),
    "twins.GlobalSubSampleAttn": block(
        "timm.models.twins:GlobalSubSampleAttn", TOKENS, [4, 4], sr_ratio=2, **HEADS
    ),
    "visformer.Attention": block("timm.models.visformer:Attention", (2, 32, 4, 4), **HEADS),
    "vision_transformer_relpos.RelPosAttention": _relative(
        "timm.models.vision_transformer_relpos:RelPosAttention", TOKENS, **HEADS
    ),
    "vision_transformer_sam.Attention": block(
        *("timm.models.vision_transformer_sam:Attention", (2, 4, 4, 32)),
        **{**HEADS, "use_rel_pos": True, "input_size": (4, 4)},
    ),
    "volo.OutlookAttention": block("timm.models.volo:OutlookAttention", (2, 4, 4, 32), **HEADS),
    "volo.Attention": block("timm.models.volo:Attention", (2, 4, 4, 32), **HEADS),
    "volo.ClassAttention": block("timm.models.volo:ClassAttention", TOKENS, **HEADS),
    "xcit.XCA": block("timm.models.xcit:XCA", TOKENS, **HEADS),
    "convit.GPSA": block("timm.models.convit:GPSA", TOKENS, **HEADS),
    "convit.MHSA": block("timm.models.convit:MHSA", TOKENS, **HEADS),
    "mobilevit.MobileVitBlock": block(
        "timm.models.mobilevit:MobileVitBlock", IMAGE, in_chs=32, transformer_dim=32, num_heads=4
    ),
}
_MODELS: dict[str, Case] = {
    "convit_tiny": _image_model("convit_tiny", img_size=64, depth=2, local_up_to_layer=1),
    "crossvit_9_240": _image_model("crossvit_9_240", 240, depth=[[1, 1, 0], [1, 1, 0], [1, 1, 0]]),
    "pit_ti_224": _image_model("pit_ti_224", img_size=64, depth=[1, 1, 1]),
    "coat_tiny": _image_model(
        "coat_tiny", img_size=64, serial_depths=[1, 1, 1, 1], parallel_depth=1
    ),
    "swin_tiny": _image_model(
        *("swin_tiny_patch4_window7_224", 64),
        img_size=64,
        window_size=4,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(2, 2),
    ),
    "levit_128s": _image_model("levit_128s", 128, img_size=128, depth=(1, 1, 1)),
    "hiera_tiny_224": _image_model("hiera_tiny_224", 224, stages=(1, 1, 1, 1)),
    "mvitv2_tiny": _image_model("mvitv2_tiny", 64, img_size=64),
}
CASES: dict[str, Case] = {
    **{
        f"{name} ({'SDPA' if on else 'plain'})": _fused(case, on)
        for name, case in {**_BLOCKS, **_MODELS}.items()
        for on in (False, True)
    },
}
