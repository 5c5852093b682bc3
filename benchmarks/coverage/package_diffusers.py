"""diffusers' attention with each of its processors, and small models of most kinds."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.coverage.package_case import Case, found, normal

TOKENS, CONTEXT, IMAGE = (2, 16, 32), (2, 7, 24), (2, 32, 4, 4)
PROCESSORS = "diffusers.models.attention_processor"
ADDED: dict[str, Any] = {"added_kv_proj_dim": 24, "norm_num_groups": 8}
JOINT: dict[str, Any] = {
    "added_kv_proj_dim": 32,
    "context_pre_only": False,
    "bias": True,
    "qk_norm": "rms_norm",
}


def _attention(
    processor: str,
    *shapes: tuple[int, ...],
    fuse: bool = False,
    made_of: dict[str, Any] | None = None,
    call: dict[str, Any] | None = None,
    of: str = f"{PROCESSORS}:Attention",
    **fields: Any,
) -> Case:
    """`Attention` with a processor, called with hidden states and, where given, a context."""

    def made():
        kept = {"query_dim": 32, "heads": 4, "dim_head": 8, **fields}
        module = found(of)(**kept, processor=found(f"{PROCESSORS}:{processor}")(**(made_of or {})))
        if fuse:
            module.fuse_projections()
        called = {name: make() for name, make in (call or {}).items()}
        return module, tuple(normal(*shape) for shape in shapes), called

    return made


def _rotary() -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.randn(16, 4).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def _mask() -> torch.Tensor:
    """Additive, of a context of 7."""
    return torch.where(torch.arange(7) < torch.tensor([[7], [4]]), 0.0, -10000.0)[:, None]


_ATTENTION: dict[str, Case] = {
    "AttnProcessor": _attention("AttnProcessor", TOKENS),
    "AttnProcessor upcast": _attention(
        "AttnProcessor", TOKENS, upcast_attention=True, upcast_softmax=True
    ),
    "AttnProcessor cross, mask": _attention(
        "AttnProcessor", TOKENS, CONTEXT, cross_attention_dim=24, call={"attention_mask": _mask}
    ),
    "AttnProcessor of images": _attention(
        "AttnProcessor", IMAGE, norm_num_groups=8, residual_connection=True
    ),
    "AttnProcessor2_0": _attention("AttnProcessor2_0", TOKENS),
    "AttnProcessor2_0 cross, mask": _attention(
        "AttnProcessor2_0", TOKENS, CONTEXT, cross_attention_dim=24, call={"attention_mask": _mask}
    ),
    "FusedAttnProcessor2_0": _attention("FusedAttnProcessor2_0", TOKENS, fuse=True),
    "SlicedAttnProcessor": _attention("SlicedAttnProcessor", TOKENS, made_of={"slice_size": 2}),
    **{
        name: _attention(name, IMAGE, CONTEXT, **fields)
        for name, fields in {
            "AttnAddedKVProcessor": ADDED,
            "AttnAddedKVProcessor2_0": ADDED,
            "SlicedAttnAddedKVProcessor": {**ADDED, "made_of": {"slice_size": 2}},
        }.items()
    },
    **{
        name: _attention(
            *(name, TOKENS, CONTEXT),
            made_of={"train_kv": True, "hidden_size": 32, "cross_attention_dim": 24},
            cross_attention_dim=24,
        )
        for name in ("CustomDiffusionAttnProcessor", "CustomDiffusionAttnProcessor2_0")
    },
    **{
        name: _attention(
            *(name, TOKENS),
            made_of={"hidden_size": 32, "cross_attention_dim": 24},
            cross_attention_dim=24,
            call={"encoder_hidden_states": lambda: (normal(*CONTEXT), [normal(2, 1, 4, 24)])},
        )
        for name in ("IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0")
    },
    **{
        name: _attention(name, TOKENS, (2, 7, 32), fuse=name.startswith("Fused"), **JOINT)
        for name in (
            *("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0", "AuraFlowAttnProcessor2_0"),
            "FusedAuraFlowAttnProcessor2_0",
        )
    },
    **{
        name: _attention(name, (6, 16, 32), (6, 7, 32), **JOINT)
        for name in ("PAGJointAttnProcessor2_0", "PAGCFGJointAttnProcessor2_0")
    },
    **{
        name: _attention(name, (6, 16, 32))
        for name in (
            *("PAGHunyuanAttnProcessor2_0", "PAGCFGHunyuanAttnProcessor2_0"),
            *("PAGIdentitySelfAttnProcessor2_0", "PAGCFGIdentitySelfAttnProcessor2_0"),
            *("PAGIdentitySanaLinearAttnProcessor2_0", "PAGCFGSanaLinearAttnProcessor2_0"),
        )
    },
    **{
        name: _attention(
            *(name, TOKENS, (2, 7, 32)),
            fuse=name.startswith("Fused"),
            bias=True,
            qk_norm="layer_norm",
        )
        for name in ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0")
    },
    "HunyuanAttnProcessor2_0": _attention(
        "HunyuanAttnProcessor2_0", TOKENS, call={"image_rotary_emb": _rotary}, qk_norm="layer_norm"
    ),
    "LuminaAttnProcessor2_0": _attention(
        *("LuminaAttnProcessor2_0", TOKENS, (2, 16, 32)),
        kv_heads=2,
        qk_norm="layer_norm_across_heads",
        call={"attention_mask": lambda: torch.arange(16) < torch.tensor([[16], [9]])},
    ),
    "StableAudioAttnProcessor2_0": _attention("StableAudioAttnProcessor2_0", TOKENS, kv_heads=2),
    "MochiVaeAttnProcessor2_0": _attention("MochiVaeAttnProcessor2_0", TOKENS, is_causal=True),
    "SanaLinearAttnProcessor2_0": _attention("SanaLinearAttnProcessor2_0", TOKENS),
}


def _model(path: str, *args: Any, call: dict[str, Any] | None = None, **config: Any) -> Case:
    """A model; shapes stand for normal numbers, a number for a time step."""

    def value(x):
        if isinstance(x, tuple):
            return normal(*x)
        return x() if callable(x) else x

    def made():
        module = found(path if ":" in path else f"diffusers:{path}")(**config)
        called = {name: value(x) for name, x in (call or {}).items()}
        return module, tuple(map(value, args)), {**called, "return_dict": False}

    return made


def _step() -> torch.Tensor:
    return torch.tensor([3, 7])


def _ids(n: int) -> torch.Tensor:
    return torch.arange(3 * n).reshape(n, 3) % 5


_HEADS: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 8}
_MODELS: dict[str, Case] = {
    "UNet2DConditionModel": _model(
        *("UNet2DConditionModel", (2, 4, 16, 16), _step, CONTEXT),
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        norm_num_groups=8,
        attention_head_dim=4,
    ),
    "UNet2DModel": _model(
        *("UNet2DModel", (2, 3, 16, 16), _step),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ),
    "AutoencoderKL": _model(
        *("AutoencoderKL", (1, 3, 16, 16)),
        block_out_channels=(16, 32),
        norm_num_groups=8,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ),
    "DiTTransformer2DModel": _model(
        *("DiTTransformer2DModel", (2, 4, 8, 8), _step, lambda: torch.tensor([1, 2])),
        **{**_HEADS, "sample_size": 8, "in_channels": 4, "num_layers": 1},
        norm_num_groups=8,
        num_embeds_ada_norm=8,
    ),
    "PixArtTransformer2DModel": _model(
        *("PixArtTransformer2DModel", (2, 4, 8, 8), CONTEXT, _step),
        **{**_HEADS, "sample_size": 8, "num_layers": 1, "caption_channels": 24},
        cross_attention_dim=32,
        norm_num_groups=8,
        use_additional_conditions=False,
        call={"encoder_attention_mask": lambda: torch.arange(7) < torch.tensor([[7], [4]])},
    ),
    "Transformer2DModel": _model(
        *("Transformer2DModel", IMAGE, CONTEXT),
        **{**_HEADS, "in_channels": 32, "norm_num_groups": 8, "cross_attention_dim": 24},
    ),
    "TransformerTemporalModel": _model(
        *(
            "diffusers.models.transformers.transformer_temporal:TransformerTemporalModel",
            (6, 32, 4, 4),
        ),
        **{**_HEADS, "in_channels": 32, "norm_num_groups": 8},
        call={"num_frames": 3},
    ),
    "FluxTransformer2DModel": _model(
        "FluxTransformer2DModel",
        call={
            "hidden_states": (2, 16, 4),
            "encoder_hidden_states": (2, 7, 24),
            "pooled_projections": (2, 24),
            "timestep": lambda: torch.tensor([0.3, 0.7]),
            "img_ids": lambda: _ids(16),
            "txt_ids": lambda: _ids(7),
        },
        **{**_HEADS, "in_channels": 4, "num_layers": 1, "num_single_layers": 1},
        joint_attention_dim=24,
        pooled_projection_dim=24,
        axes_dims_rope=[2, 2, 4],
    ),
    "SD3Transformer2DModel": _model(
        *("SD3Transformer2DModel", (2, 4, 8, 8), CONTEXT, (2, 24), _step),
        **{**_HEADS, "sample_size": 8, "in_channels": 4, "num_layers": 2, "patch_size": 2},
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=24,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    ),
    "CogVideoXTransformer3DModel": _model(
        *("CogVideoXTransformer3DModel", (1, 2, 4, 8, 8), (1, 7, 24), lambda: torch.tensor([3])),
        **{**_HEADS, "in_channels": 4, "out_channels": 4, "text_embed_dim": 24, "num_layers": 1},
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=7,
        time_embed_dim=8,
    ),
    "SanaTransformer2DModel": _model(
        *("SanaTransformer2DModel", (2, 4, 8, 8), CONTEXT, _step),
        **{**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "sample_size": 8},
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=24,
        patch_size=1,
    ),
    "LTXVideoTransformer3DModel": _model(
        *("LTXVideoTransformer3DModel", (2, 16, 4), CONTEXT, _step),
        call={
            "encoder_attention_mask": lambda: torch.arange(7) < torch.tensor([[7], [4]]),
            "num_frames": 1,
            "height": 4,
            "width": 4,
        },
        **{**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1},
        cross_attention_dim=32,
        caption_channels=24,
    ),
    "WanTransformer3DModel": _model(
        *("WanTransformer3DModel", (1, 4, 1, 8, 8), lambda: torch.tensor([3]), (1, 7, 24)),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=1,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=32,
    ),
    "AuraFlowTransformer2DModel": _model(
        *("AuraFlowTransformer2DModel", (2, 4, 8, 8), CONTEXT, _step),
        **{**_HEADS, "sample_size": 8, "in_channels": 4, "num_mmdit_layers": 1},
        num_single_dit_layers=1,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    ),
    "HunyuanVideoTransformer3DModel": _model(
        "HunyuanVideoTransformer3DModel",
        *((1, 4, 1, 8, 8), lambda: torch.tensor([3]), (1, 7, 24)),
        *(lambda: torch.arange(7)[None] < 5, (1, 24)),
        call={"guidance": lambda: torch.tensor([6.0])},
        **{**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1},
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=24,
        pooled_projection_dim=24,
        rope_axes_dim=(2, 2, 4),
    ),
    "PriorTransformer": _model(
        *("PriorTransformer", (2, 8), _step, (2, 8), (2, 7, 8)),
        **{**_HEADS, "num_layers": 1, "embedding_dim": 8, "num_embeddings": 7},
        additional_embeddings=4,
    ),
    "StableAudioDiTModel": _model(
        *("StableAudioDiTModel", (1, 4, 16), lambda: torch.tensor([3]), (1, 7, 24), (1, 1, 32)),
        call={"rotary_embedding": lambda: tuple(torch.randn(17, 4) for _ in range(2))},
        **{**_HEADS, "sample_size": 16, "in_channels": 4, "num_layers": 1, "out_channels": 4},
        num_key_value_attention_heads=2,
        cross_attention_input_dim=24,
        cross_attention_dim=32,
        global_states_input_dim=32,
        time_proj_dim=8,
    ),
}
CASES: dict[str, Case] = {**_ATTENTION, **_MODELS}
