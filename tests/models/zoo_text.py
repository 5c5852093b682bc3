"""Language models beyond the thirty: what their families add, and every body of eager attention.

Of the 23 texts of `eager_attention_forward` in transformers 5.17, the thirty have eight; those of
the other language models are here, those of images, sound and time series in zoo_vision.py.
"""

from __future__ import annotations

from tests.models.architecture import Architecture
from tests.models.inputs import encoder_decoder, text
from tests.models.tiny import (
    BERT,
    DECODER,
    ENCODER_DECODER,
    GQA,
    MIXED_LAYERS,
    TOKENS,
    WINDOW,
)

_MOE = {
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "experts_implementation": "batched_mm",
}
_UNNAMED_WIDTH = {name: value for name, value in GQA.items() if name != "head_dim"}
_GPT = {**TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
_NO_GPT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_XLM = {**TOKENS, "n_layers": 2, "n_heads": 4, "emb_dim": 64, "max_position_embeddings": 128}

TEXT: tuple[Architecture, ...] = (
    # Llama's body, with what each family does to Q, K and the mask before it.
    Architecture("mixtral", 2, {**GQA, **_MOE, "num_local_experts": 4}, "left", text),
    Architecture(
        "qwen2_moe",
        2,
        {
            **_UNNAMED_WIDTH,
            **_MOE,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
        "left",
        text,
    ),
    Architecture("granite", 2, {**_UNNAMED_WIDTH, "attention_multiplier": 0.2}, "left", text),
    Architecture("olmo2", 2, _UNNAMED_WIDTH, "left", text),
    Architecture("cohere", 2, {**_UNNAMED_WIDTH, "use_qk_norm": True}, "left", text),
    Architecture("cohere2", 2, {**_UNNAMED_WIDTH, **MIXED_LAYERS}, "left", text),
    Architecture("starcoder2", 2, {**_UNNAMED_WIDTH, "sliding_window": WINDOW}, "left", text),
    Architecture("stablelm", 2, {**_UNNAMED_WIDTH, "qk_layernorm": True}, "left", text),
    Architecture("nemotron", 2, GQA, "left", text),
    Architecture("phi", 2, DECODER, "left", text),
    Architecture("persimmon", 2, DECODER, "left", text),
    Architecture("gpt_bigcode", 2, {**_GPT, **_NO_GPT_DROPOUT, "multi_query": True}, "left", text),
    Architecture("codegen", 2, {**_GPT, "rotary_dim": 8, "n_ctx": 128}, "left", text),
    # Bodies of their own.
    Architecture(
        "llama4_text",
        2,  # layer 0 sees its chunk of the sequence; layer 1 has no rotation, a temperature instead
        {
            **GQA,
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
            "attention_chunk_size": WINDOW,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "floor_scale": 4,
        },
        "left",
        text,
    ),
    Architecture(
        "granite_swa",
        2,  # a sink as the sigmoid of the row's log-sum-exp, on the output
        {**_UNNAMED_WIDTH, **MIXED_LAYERS, "attention_multiplier": 0.25},
        "left",
        text,
    ),
    Architecture(
        "mimo_v2_flash",
        2,  # sinks in the sliding layer only; V narrower than Q and K
        {**GQA, **MIXED_LAYERS, **_MOE, "v_head_dim": 8, "n_routed_experts": 4},
        "left",
        text,
    ),
    Architecture(
        "openai_privacy_filter",
        2,
        {
            **GQA,
            "sliding_window": WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "experts_implementation": "batched_mm",
        },
        "right",
        text,
    ),
    Architecture(
        "inkling_text",
        2,  # relative positions as a bias that depends on the query
        {
            **GQA,
            **_MOE,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "sliding_window_size": WINDOW,
            "d_rel": 4,
            "rel_extent": 16,
            "local_layer_ids": [0],
            "n_routed_experts": 4,
            "n_shared_experts": 1,
        },
        "left",
        text,
    ),
    Architecture(
        "modernbert-decoder",
        2,
        {
            **DECODER,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "layer_types": MIXED_LAYERS["layer_types"],
            "local_attention": 2 * WINDOW,
        },
        "left",
        text,
    ),
    Architecture(
        "bigbird_pegasus",
        6,
        {
            **ENCODER_DECODER,
            "attention_type": "original_full",
            "max_position_embeddings": 128,
        },
        "right",
        encoder_decoder,
    ),
    Architecture(
        "saprot",
        2,
        {**BERT, "mask_token_id": 3, "position_embedding_type": "rotary"},
        "right",
        text,
        model_class="evolla.EvollaSaProtProteinEncoder",
    ),
    # Attention written outside `eager_attention_forward`.
    Architecture(
        "xlnet",
        2,  # relative positions by the shift of a second product
        {**TOKENS, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96, "dropout": 0.0},
        "left",
        text,
    ),
    Architecture("xlm", 2, {**_XLM, "dropout": 0.0, "attention_dropout": 0.0}, "right", text),
    Architecture("ctrl", 2, {**_GPT, **_NO_GPT_DROPOUT, "dff": 96}, "left", text),
    Architecture(
        "mobilebert",
        2,
        {
            **BERT,
            "embedding_size": 16,
            "intra_bottleneck_size": 64,
            "num_feedforward_networks": 1,
        },
        "right",
        text,
    ),
    Architecture("squeezebert", 2, {**BERT, "embedding_size": 64}, "right", text),
    Architecture(
        "funnel",
        4,
        {
            **TOKENS,
            "block_sizes": [1, 1],
            "num_decoder_layers": 2,
            "d_model": 64,
            "n_head": 4,
            "d_head": 16,
            "d_inner": 96,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        "right",
        text,
        model_class="funnel.FunnelModel",
    ),
    Architecture(
        "longformer",
        2,
        {**BERT, "attention_window": WINDOW, "sep_token_id": 2},
        "right",
        text,
        # A row of its softmax is indexed by the distance to the query, after padding and a view
        # that slants the scores of overlapping chunks: a column is another key in every row, and
        # K is no tensor that one product reads. Its weights are slanted back before V.
        declined="lift: not-pointwise",
    ),
    Architecture(
        "longt5",
        6,
        {
            **TOKENS,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 20,
            "local_radius": 3,
            "dropout_rate": 0.0,
        },
        "right",
        encoder_decoder,
        gain=0.75,  # its scores are not scaled
    ),
)
