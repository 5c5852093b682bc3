"""Thirty tiny, randomly initialised Hugging Face models with attention in plain PyTorch.

Each builds a two-layer model under `attn_implementation="eager"`, downloads nothing, has no
dropout (so that training is comparable with eager) and says how many attention regions, each one
`softmax(f(Q K^T)) V`, its forward pass computes. Heads are 16 wide, queries share K and V where
the architecture has that, and windows are shorter than the inputs.
"""

from __future__ import annotations

from tests.models.architecture import Architecture
from tests.models.inputs import (
    AUDIO_LENGTH,
    MEL_BINS,
    encoder_decoder,
    image,
    speech,
    text,
    text_and_image,
)
from tests.models.tiny import (
    BERT,
    DECODER,
    ENCODER_DECODER,
    GQA,
    MIXED_LAYERS,
    TOKENS,
    VISION,
    WINDOW,
)

ARCHITECTURES: tuple[Architecture, ...] = (
    # Decoders: batched generation pads on the left, training on the right.
    Architecture("llama", 2, GQA, "left", text),
    Architecture("mistral", 2, {**GQA, "sliding_window": WINDOW}, "left", text),
    Architecture("qwen3", 2, GQA, "left", text),
    Architecture(
        "gemma2",
        2,  # layer 0 has a sliding window, layer 1 has none; both cap their scores
        {**GQA, **MIXED_LAYERS, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 12},
        "left",
        text,
    ),
    Architecture(
        "gemma3_text", 2, {**GQA, **MIXED_LAYERS, "query_pre_attn_scalar": 4}, "left", text
    ),
    Architecture("phi3", 2, {**GQA, "sliding_window": WINDOW}, "left", text),
    Architecture(
        "gpt2",
        2,
        {
            **TOKENS,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        "left",
        text,
    ),
    Architecture(
        "gpt_neo",
        2,  # layer 0 is global, layer 1 is local
        {
            **TOKENS,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 128,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
        },
        "left",
        text,
        gain=0.75,  # its scores are not scaled
    ),
    Architecture("gpt_neox", 2, DECODER, "left", text),
    Architecture(
        "gptj",
        2,
        {
            **TOKENS,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "rotary_dim": 8,
        },
        "left",
        text,
    ),
    Architecture(
        "opt",
        2,
        {**DECODER, "ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0},
        "left",
        text,
    ),
    Architecture(
        "bloom", 2, {**TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4}, "left", text
    ),
    Architecture(
        "falcon",
        2,  # falcon-rw: ALiBi, one K and V head for each query head
        {**DECODER, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        "left",
        text,
    ),
    Architecture(
        "mpt",
        2,
        {**TOKENS, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
        "left",
        text,
    ),
    Architecture(
        "gpt_oss",
        2,  # a learned sink beside the scores; layer 0 has a sliding window
        {
            **GQA,
            **MIXED_LAYERS,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "experts_implementation": "batched_mm",
        },
        "left",
        text,
    ),
    Architecture(
        "deepseek_v3",
        2,  # multi-head latent attention: heads of 24 for Q and K, of 16 for V
        {
            **DECODER,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "experts_implementation": "batched_mm",
        },
        "left",
        text,
    ),
    # Encoders: padded on the right.
    Architecture("bert", 2, BERT, "right", text),
    Architecture("roberta", 2, BERT, "right", text),
    Architecture(
        "distilbert",
        2,
        {
            **TOKENS,
            "dim": 64,
            "hidden_dim": 96,
            "n_layers": 2,
            "n_heads": 4,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        "right",
        text,
    ),
    Architecture("electra", 2, {**BERT, "embedding_size": 32}, "right", text),
    Architecture(
        "esm", 2, {**BERT, "position_embedding_type": "rotary", "mask_token_id": 3}, "right", text
    ),
    Architecture(
        "modernbert",
        2,  # layer 0 sees `local_attention` / 2 tokens to either side
        {
            **DECODER,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "layer_types": MIXED_LAYERS["layer_types"],
            "local_attention": 2 * WINDOW,
        },
        "right",
        text,
    ),
    Architecture("mpnet", 2, BERT, "right", text),
    Architecture("roformer", 2, {**BERT, "embedding_size": 64}, "right", text),
    Architecture(
        "deberta-v2",
        2,  # the settings of the published v3 checkpoints, with fewer buckets
        {
            **BERT,
            "type_vocab_size": 0,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
        },
        "right",
        text,
    ),
    # Encoder-decoders. Each layer pair: encoder self, decoder self and decoder cross attention.
    Architecture(
        "t5",
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
            "dropout_rate": 0.0,
        },
        "right",
        encoder_decoder,
        gain=0.75,  # its scores are not scaled
    ),
    Architecture(
        "bart", 6, {**ENCODER_DECODER, "max_position_embeddings": 128}, "right", encoder_decoder
    ),
    Architecture(
        "whisper",
        6,
        {
            **ENCODER_DECODER,
            "num_mel_bins": MEL_BINS,
            "max_source_positions": AUDIO_LENGTH,
            "max_target_positions": 128,
        },
        "none",
        speech,
    ),
    # Images.
    Architecture("vit", 2, VISION, "none", image),
    Architecture(
        "clip",
        4,  # two layers of the causal text encoder, two of the image encoder
        {
            "text_config": {**DECODER, "projection_dim": 32},
            "vision_config": {**VISION, "projection_dim": 32},
            "projection_dim": 32,
        },
        "right",
        text_and_image,
    ),
)

BY_NAME: dict[str, Architecture] = {entry.name: entry for entry in ARCHITECTURES}
