"""x-transformers' attention layers, one flag after the other, and several together."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.coverage.package_case import Case, block

TOKENS = (2, 16, 32)


def _layers(kind: str, *, mask: bool = False, context: bool = False, **flags: Any) -> Case:
    call: dict[str, Any] = {}
    if mask:
        call["mask"] = lambda: torch.arange(16) < torch.tensor([[16], [11]])
    if context:
        call["context"] = (2, 9, 32)
    fields = {"dim": 32, "depth": 1, "heads": 4, "attn_dim_head": 8, "verbose": False, **flags}
    return block(f"x_transformers:{kind}", TOKENS, call=call, **fields)


# Flags of `Attention`, whose names begin with attn_ where its layers are given them.
_ATTENTION: dict[str, dict[str, Any]] = {
    **{
        name: {name: True}
        for name in """flash one_kv_head head_scale gate_values gate_value_heads swiglu_values
        pre_talking_heads post_talking_heads pre_scale_post_talking_heads qk_norm qk_rmsnorm
        value_rmsnorm l2_distance sigmoid selective cog_signed hard add_zero_kv head_learned_sink
        data_dependent_alibi data_dependent_alibi_per_row use_rel_proj_pos_bias use_cope
        softclamp_logits laser gumbel_softmax orthog_projected_values output_gate
        gate_values_headwise inverted_attention on_attn""".split()
    },
    "kv_heads": {"kv_heads": 2},
    "num_mem_kv": {"num_mem_kv": 3},
    "num_mem_kv, flash": {"num_mem_kv": 3, "flash": True},
    "sparse_topk": {"sparse_topk": 4},
    "sparse_topk straight": {"sparse_topk": 4, "sparse_topk_straight_through": True},
    "max_attend_past": {"max_attend_past": 5},
    "max_attend_past, mem": {"max_attend_past": 5, "num_mem_kv": 2},
    "latent q and kv": {
        "use_latent_q": True,
        "dim_latent_q": 16,
        "use_latent_kv": True,
        "dim_latent_kv": 16,
    },
    "value_dim_head": {"value_dim_head": 16},
    "qk_norm groups": {"qk_norm": True, "qk_norm_groups": 2, "qk_norm_dim_scale": True},
    "l2_distance, flash": {"l2_distance": True, "flash": True},
    "one_kv_head, flash": {"one_kv_head": True, "flash": True},
    "zero kv, sink": {"add_zero_kv": True, "head_learned_sink": True},
    "softclamp, sink, gate": {
        "softclamp_logits": True,
        "head_learned_sink": True,
        "gate_values": True,
    },
}
_LAYERS: dict[str, dict[str, Any]] = {
    "alibi": {"alibi_pos_bias": True},
    "alibi of some heads": {"alibi_pos_bias": True, "alibi_num_heads": 2},
    "alibi, flash": {"alibi_pos_bias": True, "attn_flash": True},
    "alibi, mem": {"alibi_pos_bias": True, "attn_num_mem_kv": 2},
    "rel_pos_bias": {"rel_pos_bias": True},
    "dynamic_pos_bias": {"dynamic_pos_bias": True},
    "dynamic_pos_bias log": {"dynamic_pos_bias": True, "dynamic_pos_bias_log_distance": True},
    "rotary": {"rotary_pos_emb": True},
    "xpos": {"rotary_xpos": True},
    "polar": {"polar_pos_emb": True},
    "residual_attn": {"residual_attn": True, "depth": 2},
    "value residual": {"add_value_residual": True, "depth": 2},
    "shift_tokens": {"shift_tokens": 1},
    "weights tied": {"depth": 2, "weight_tie_layers": True},
    "macaron, sandwich": {"macaron": True, "sandwich_norm": True},
}
_NOT_CAUSAL = ("inverted_attention",)
_ONLY_CAUSAL = ("selective", "use_cope", "data_dependent_alibi", "xpos")

CASES: dict[str, Case] = {}
for _name, _flags in {
    "plain": {},
    **{n: {f"attn_{k}": v for k, v in flags.items()} for n, flags in _ATTENTION.items()},
    **_LAYERS,
}.items():
    if _name not in _NOT_CAUSAL:
        CASES[f"Decoder {_name}"] = _layers("Decoder", **_flags)
    if not any(x in _name for x in _ONLY_CAUSAL):
        CASES[f"Encoder {_name}"] = _layers("Encoder", mask=True, **_flags)
CASES["cross attention"] = _layers("Decoder", context=True, cross_attend=True)
CASES["cross attention, flash"] = _layers(
    "Decoder", context=True, cross_attend=True, attn_flash=True
)
CASES["cross residual"] = _layers(
    "Decoder", context=True, cross_attend=True, depth=2, cross_residual_attn=True
)
