"""Attention of smaller packages; a case's name begins with its package's."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.coverage.package_case import Case, block

TOKENS, HEADS = (2, 16, 32), (2, 4, 16, 8)
WIDTHS: dict[str, Any] = {"dim": 32, "heads": 4, "dim_head": 8}
# Of ESM: length, batch, features; and rows, columns, batch, features.
SEQUENCE, ALIGNMENT = (8, 2, 32), (3, 8, 2, 32)
ESM: dict[str, Any] = {"embed_dim": 32, "num_heads": 4}


def _rotations() -> torch.Tensor:
    return torch.linalg.qr(torch.randn(2, 8, 3, 3)).Q


CASES: dict[str, Case] = {
    "local_attention: LocalAttention": block(
        *("local_attention:LocalAttention", HEADS, HEADS, HEADS),
        dim=8,
        window_size=4,
        causal=True,
        autopad=True,
    ),
    "local_attention: LocalMHA": block(
        "local_attention.transformer:LocalMHA", TOKENS, window_size=4, causal=True, **WIDTHS
    ),
    "local_attention: LocalMHA norms, xpos": block(
        *("local_attention.transformer:LocalMHA", TOKENS),
        window_size=4,
        causal=True,
        use_xpos=True,
        xpos_scale_base=8,
        qk_rmsnorm=True,
        **WIDTHS,
    ),
    "nystrom_attention: NystromAttention": block(
        "nystrom_attention:NystromAttention", TOKENS, num_landmarks=4, **WIDTHS
    ),
    "linformer: LinformerSelfAttention": block(
        "linformer.linformer:LinformerSelfAttention", TOKENS, dim=32, seq_len=16, k=4, heads=4
    ),
    "linformer: LinformerSelfAttention, one head of keys": block(
        *("linformer.linformer:LinformerSelfAttention", TOKENS),
        dim=32,
        seq_len=16,
        k=4,
        heads=4,
        one_kv_head=True,
        share_kv=True,
    ),
    "conformer: Attention": block("conformer.conformer:Attention", TOKENS, max_pos_emb=8, **WIDTHS),
    "perceiver_pytorch: Attention": block(
        *("perceiver_pytorch.perceiver_pytorch:Attention", TOKENS, (2, 12, 32)),
        query_dim=32,
        context_dim=32,
        heads=4,
        dim_head=8,
    ),
    "perceiver_pytorch: Attention inverted": block(
        *("perceiver_pytorch.perceiver_pytorch:Attention", TOKENS, (2, 12, 32)),
        call={"inverted_attention": True},
        query_dim=32,
        context_dim=32,
        heads=4,
        dim_head=8,
    ),
    "memory_efficient_attention_pytorch: FlashAttention": block(
        *("memory_efficient_attention_pytorch.flash_attention:FlashAttention", TOKENS),
        **WIDTHS,
    ),
    "esm: RowSelfAttention": block("esm.axial_attention:RowSelfAttention", ALIGNMENT, **ESM),
    "esm: ColumnSelfAttention": block("esm.axial_attention:ColumnSelfAttention", ALIGNMENT, **ESM),
    "esm: MultiheadAttention": block(
        "esm.multihead_attention:MultiheadAttention", SEQUENCE, SEQUENCE, SEQUENCE, **ESM
    ),
    "esm: MultiheadAttention rotary": block(
        *("esm.multihead_attention:MultiheadAttention", SEQUENCE, SEQUENCE, SEQUENCE),
        use_rotary_embeddings=True,
        **ESM,
    ),
    "invariant_point_attention: InvariantPointAttention": block(
        *("invariant_point_attention:InvariantPointAttention", (2, 8, 32)),
        call={
            "pairwise_repr": (2, 8, 8, 16),
            "rotations": _rotations,
            "translations": (2, 8, 3),
        },
        dim=32,
        heads=4,
        scalar_key_dim=8,
        scalar_value_dim=8,
        point_key_dim=2,
        point_value_dim=2,
        pairwise_repr_dim=16,
    ),
}
