"""Any configuration class of transformers with every size tiny, by the names of its fields."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from typing import Any

# The first pattern that a field's name matches says what it becomes, if it was larger.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(^|_)pad_token_id$|^padding_idx$|^pad_index$", 0),
    (r"(^|_)bos_token_id$|decoder_start_token_id|cls_token_id|^bos_index", 1),
    (r"(^|_)eos_token_id$|sep_token_id|^eos_index", 2),
    (r"mask_token_id", 3),
    (r"(token|_start|_end)_(id|index)$", 90),
    (r"vocab_size|n_tokens|num_embeddings$", 96),
    (r"codebook_size", 64),
    (r"num_codebooks|n_codes_total|num_quantizers|num_residual", 2),
    (r"(num_)?key_value_heads?$|kv_heads?$|multi_query_group_num", 2),
    (r"qk_rope_head_dim", 8),
    (r"head_dim|d_head|d_kv|head_size|kv_channels|key_length|dim_head|qk_nope|v_head", 16),
    (r"heads?$|n_head|num_heads", 4),
    (r"lora_rank", 32),
    (r"n_group$|expert_group$|topk_group|first_k_dense|n_shared|num_shared", 1),
    (r"experts_per_tok|top_?k|num_selected_experts|moe_k", 2),
    (r"experts?$|n_routed_experts", 4),
    (r"layers?$|n_layer|num_layers|depth$|num_blocks|n_blocks|_blocks$", 2),
    (r"num_hidden_groups|inner_group_num", 1),
    (r"ffn|intermediate|inner|mlp_dim|feed_?forward_(size|proj_dim)|hidden_dim$|d_ff$", 96),
    (r"max_position|n_positions|max_seq|n_ctx|max_length|max_source|max_target|seq_length", 128),
    (r"sliding_window|local_window|window_size$|attention_chunk_size|^window$", 8),
    (r"image_size|img_size|input_size$|crop_size", 32),
    (r"patch_size", 8),
    (r"num_mel_bins|feature_size|n_mels|num_mels|input_feat", 8),
    (r"num_frames|frames_per_clip", 2),
    (r"temporal_patch|tubelet", 1),
    (r"num_queries|num_query_tokens|n_latents|num_latents", 6),
    (r"hidden_sizes?$|d_model|n_embd|embed|emb_dim|^dim$|proj_dim|projection_dim", 64),
    (r"output_dim|_width$|hidden_channels|out_channels$|mm_hidden|d_latents", 64),
    (r"_dim$|hidden$|width$|embd$", 64),
)
# Neither lengths nor widths, or bound to others.
KEPT = re.compile(
    r"num_channels|in_channels$|num_labels|stride|kernel|chunk_size_feed|conv_|dilation|ratio|"
    r"pretraining_tp|rotary_dim$|num_buckets|expand|groups$|state_size|d_state|d_conv|ssm|period|"
    r"time_step_rank|reduction|hop|sampling|interval|offset|every|num_feature_levels"
)
# Their lengths follow the number of layers.
OF_LAYERS = {
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "attention_layers",
    "layers_block_type",
    "num_attention_heads_per_layer",
}


def tiny_fields(config_class: type, overrides: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a small configuration without dropout, nested ones included.

    overrides: fields as they shall be; for a nested configuration, a dictionary of such.
    """
    default = config_class()
    latent = hasattr(default, "qk_rope_head_dim")  # a head of K for each of Q; head_dim follows
    made: dict[str, Any] = {}
    for name, value in _fields(config_class, default).items():
        if hasattr(value, "model_type"):
            inner = tiny_fields(type(value), overrides.get(name, {}))
            made[name] = {"model_type": value.model_type, **inner}
        elif latent and name == "num_key_value_heads":
            made[name] = 4
        elif not (name in OF_LAYERS and value is not None or latent and name == "head_dim"):
            made |= _small(name, value)
    nested = {name for name, value in made.items() if isinstance(value, dict)}
    return made | {
        name: value
        for name, value in overrides.items()
        if name not in nested or not isinstance(value, dict) or "rope" in name
    }


def _fields(config_class: type, default: Any) -> dict[str, Any]:
    """The fields that the class adds to PreTrainedConfig's, and their defaults."""
    names: list[str] = []
    for base in config_class.__mro__:
        if base.__name__ in ("PreTrainedConfig", "PretrainedConfig", "object"):
            break
        names += vars(base).get("__annotations__", {})
        if "__init__" in vars(base):
            names += inspect.signature(vars(base)["__init__"]).parameters
    skipped = {"self", "kwargs", "model_type", "sub_configs", "attribute_map"}
    made: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        if name not in skipped and not name.startswith("base_model"):
            # What differs from layer to layer is no field, and stays.
            with contextlib.suppress(ValueError, RuntimeError):
                made[name] = getattr(default, name, None)
    return made


def _small(name: str, value: Any) -> dict[str, Any]:
    """{name: its small value}, or {} where the default stays."""
    if name == "use_cache":
        return {name: False}
    if isinstance(value, float):
        return {name: 0.0} if "drop" in name and not name.endswith("scale") else {}
    if type(value) is int and not KEPT.search(name):
        small = next((size for pattern, size in SIZES if re.search(pattern, name)), None)
        if small is None:
            return {}
        return {name: small if small <= 3 else min(small, value)}
    if isinstance(value, (list, tuple)) and value and all(type(x) is int for x in value):
        return _small_list(name, list(value))
    if isinstance(value, dict) and name in ("rope_parameters", "rope_scaling"):
        return {name: _small_rotation(value)}
    return {}


def _small_list(name: str, value: list[int]) -> dict[str, Any]:
    length = len(value)
    if re.search(r"depth|num_layers|layers$|block_sizes|num_blocks", name):
        return {name: [1] * length}
    if "heads" in name:
        return {name: [min(x, 2) for x in value]}
    if re.search(r"hidden_sizes|embed_dim|dims|channels|neck_hidden", name) and max(value) > 8:
        growing = len(set(value)) > 1
        return {name: [16 * (1 + i) if growing else 16 for i in range(length)]}
    if re.search(r"image_size|img_size", name):
        return {name: [32] * length}
    if "patch_size" in name and max(value) > 4:
        return {name: [8] * length}
    return {}


def _small_rotation(value: dict[str, Any]) -> dict[str, Any]:
    made = copy.deepcopy(value)
    for part in (made, *(x for x in made.values() if isinstance(x, dict))):
        if "mrope_section" in part:
            part["mrope_section"] = [2, 3, 3]
        if "original_max_position_embeddings" in part:
            part["original_max_position_embeddings"] = 32
    return made
