"""What the rules of tiny_config.py and tiny_inputs.py do not guess, by model_type.

FIELDS   configuration fields that depend on one another
INPUTS   model -> keyword arguments
CLASSES  the class to take where AutoModel gives none that can be called
GAINS    see tests/models/architecture.py's sharpen: for models in which 1.5 multiplies rounding
         errors a thousandfold on the way to the gradients, eager's as well as ours
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Model = Any
BATCH = 2

CLASSES: dict[str, str] = {"funnel": "FunnelModel"}
GAINS: dict[str, float] = dict.fromkeys(
    ("blip_2_qformer", "detr", "fastspeech2_conformer", "mobilebert", "sam3"), 1.0
)


def _rotation(section: list[int], **more: float) -> dict[str, Any]:
    made = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section, **more}
    return {"rope_parameters": made}


_QWEN_VL = _rotation([2, 3, 3])
_GLM_V = _rotation([1, 1, 2], partial_rotary_factor=0.5)
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
}
_ROUTED = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "n_routed_experts": 4}
_RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 32, 64],
    "depths": [1, 1, 1, 1],
}
_DETR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_queries": 7,
    "d_model": 64,
    "num_feature_levels": 3,
    "encoder_n_points": 2,
    "decoder_n_points": 2,
}
_ONE_SCALE = {**_DETR, "backbone_config": {**_RESNET, "out_features": ["stage4"]}}
_THREE_SCALES = {
    **_DETR,
    "backbone_config": {**_RESNET, "out_features": ["stage2", "stage3", "stage4"]},
}
_SERIES = {
    "prediction_length": 8,
    "context_length": 16,
    "lags_sequence": [1, 2],
    "num_time_features": 2,
}

FIELDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("paddleocr_vl", "qwen2_5_vl", "qwen2_vl"), {"text_config": _QWEN_VL}),
    **dict.fromkeys(("paddleocr_vl_text", "qwen2_5_vl_text", "qwen2_vl_text"), _QWEN_VL),
    **dict.fromkeys(
        ("glm46v", "glm4v", "glm4v_moe", "glm_image", "glm_ocr"), {"text_config": _GLM_V}
    ),
    **dict.fromkeys(("glm4v_text", "glm4v_moe_text", "glm_image_text", "glm_ocr_text"), _GLM_V),
    **dict.fromkeys(("informer", "autoformer", "time_series_transformer"), _SERIES),
    **dict.fromkeys(("codegen", "gptj"), {"rotary_dim": 8}),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), {"head_dim": 16}),
    **dict.fromkeys(("nemotron", "hunyuan_vl_text"), {"head_dim": 16, "num_key_value_heads": 2}),
    **dict.fromkeys(("esmc", "glm5_next_text"), {"num_key_value_heads": 4}),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "axk1", "axk2"), _ROUTED),
    **dict.fromkeys(("minicpm3", "glm4_moe_lite", "glm_moe_dsa"), _ROUTED),
    **dict.fromkeys(("detr", "conditional_detr", "dab-detr", "table-transformer"), _ONE_SCALE),
    "dots1": {**_ROUTED, "n_shared_experts": 1},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "kimi_k25": {"text_config": _ROUTED},
    "deformable_detr": _THREE_SCALES,
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "falcon_h1": _MAMBA,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 8},
    "esm": {"vocab_size": 96, "mask_token_id": 3, "pad_token_id": 0},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 2, "block_repeats": [1, 1]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
    },
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16},
    "lilt": {"hidden_size": 48},
    "markuplm": {"max_xpath_tag_unit_embeddings": 256, "max_xpath_subs_unit_embeddings": 1024},
    "sam2_hiera_det_model": {"hidden_size": 16},
    "sam2_vision_model": {"backbone_config": {"hidden_size": 16}},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "decision_transformer": {"hidden_size": 64},
    "led": {"attention_window": [8, 8]},
    "sam": {"vision_config": {"output_channels": 64, "num_pos_feats": 32}},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "moe_layers": [],
    },
}


def _series(model: Model) -> dict[str, Tensor]:
    config = model.config
    past, ahead = config.context_length + max(config.lags_sequence), config.prediction_length
    return {
        "past_values": torch.randn(BATCH, past),
        "past_time_features": torch.randn(BATCH, past, config.num_time_features),
        "past_observed_mask": torch.ones(BATCH, past),
        "future_values": torch.randn(BATCH, ahead),
        "future_time_features": torch.randn(BATCH, ahead, config.num_time_features),
    }


def _decisions(model: Model) -> dict[str, Tensor]:
    return {
        "states": torch.randn(BATCH, 8, model.config.state_dim),
        "actions": torch.randn(BATCH, 8, model.config.act_dim),
        "rewards": torch.randn(BATCH, 8, 1),
        "returns_to_go": torch.randn(BATCH, 8, 1),
        "timesteps": torch.arange(8).repeat(BATCH, 1),
        "attention_mask": torch.ones(BATCH, 8),
    }


def _words_and_regions(model: Model) -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(4, 88, (BATCH, 24)),
        "attention_mask": torch.ones(BATCH, 24).long(),
        "visual_feats": torch.randn(BATCH, 6, model.config.visual_feat_dim),
        "visual_pos": torch.rand(BATCH, 6, 4),
    }


def _queries(model: Model) -> dict[str, Tensor]:
    return {
        "query_embeds": torch.randn(BATCH, 6, model.config.hidden_size),
        "encoder_hidden_states": torch.randn(BATCH, 9, model.config.encoder_hidden_size),
    }


def _patches(model: Model) -> dict[str, Tensor]:
    side = model.config.patch_size
    return {
        "pixel_values": torch.randn(BATCH, 16, 3 * side * side),
        "pixel_attention_mask": torch.ones(BATCH, 16).long(),
        "spatial_shapes": torch.tensor([[4, 4], [2, 8]]),
    }


def _frames(model: Model) -> dict[str, Tensor]:
    config = model.config
    shape = (BATCH, config.num_frames, 3, config.image_size, config.image_size)
    return {"pixel_values": torch.randn(shape)}


def _history(model: Model) -> dict[str, Tensor]:
    config = model.config
    return {"past_values": torch.randn(BATCH, config.context_length, config.num_input_channels)}


def _words_and_picture(model: Model) -> dict[str, Tensor]:
    side = model.config.vision_config.image_size
    return {
        "input_ids": torch.randint(4, 88, (BATCH, 16)),
        "attention_mask": torch.ones(BATCH, 16).long(),
        "pixel_values": torch.randn(BATCH, 3, side, side),
    }


def _latents(model: Model) -> dict[str, Tensor]:
    return {
        "inputs": torch.randn(BATCH, 24, model.config.d_model),
        "attention_mask": torch.ones(BATCH, 24),
    }


def _image_of(side: int) -> Callable[[Model], dict[str, Tensor]]:
    return lambda model: {"pixel_values": torch.randn(1, 3, side, side)}


INPUTS: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {
    **dict.fromkeys(("informer", "autoformer", "time_series_transformer"), _series),
    **dict.fromkeys(("blip_2_qformer", "instructblip_qformer"), _queries),
    **dict.fromkeys(("videomae", "vivit", "timesformer"), _frames),
    **dict.fromkeys(("patchtst", "patchtsmixer"), _history),
    **dict.fromkeys(("owlvit", "owlv2", "align"), _words_and_picture),
    "siglip2_vision_model": _patches,
    "decision_transformer": _decisions,
    "lxmert": _words_and_regions,
    "perceiver": _latents,
    # Their last stage sees a 32nd of an image: more than one pixel of it.
    **dict.fromkeys(("detr", "conditional_detr", "dab-detr"), _image_of(128)),
    **dict.fromkeys(("table-transformer", "deformable_detr"), _image_of(128)),
    **dict.fromkeys(("segformer", "glpn", "mobilevit"), _image_of(256)),
}
