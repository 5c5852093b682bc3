"""attention-gym's masks and score modifiers, through flex_attention and in eager spelling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attn_gym.masks as masks  # pyright: ignore[reportMissingImports]
import attn_gym.mods as mods  # pyright: ignore[reportMissingImports]
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from benchmarks.coverage.package_case import Case, normal

BATCH, HEADS, LENGTH, DIM = 2, 4, 64, 8


def _operands() -> tuple[torch.Tensor, ...]:
    return tuple(normal(BATCH, HEADS, LENGTH, DIM) for _ in range(3))


def _masked_by_flex(make: Callable[[], Any]) -> Case:
    def made():
        mask = create_block_mask(make(), BATCH, HEADS, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=16)
        return (lambda q, k, v: flex_attention(q, k, v, block_mask=mask)), _operands(), {}

    return made


def _masked_by_hand(make: Callable[[], Any]) -> Case:
    def made():
        allowed = make()

        def attention(q, k, v):
            mask = create_mask(allowed, BATCH, HEADS, LENGTH, LENGTH, device="cpu")
            scores = (q @ k.mT) * DIM**-0.5
            return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v

        return attention, _operands(), {}

    return made


def _scored(make: Callable[[], Any]) -> Case:
    def made():
        score_mod = make()
        return (lambda q, k, v: flex_attention(q, k, v, score_mod=score_mod)), _operands(), {}

    return made


def _documents():
    return torch.tensor([0, 20, 37, LENGTH])


_MASKS: dict[str, Callable[[], Any]] = {
    "causal": lambda: masks.causal_mask,
    "sliding window": lambda: masks.generate_sliding_window(16),
    "dilated window": lambda: masks.generate_dilated_sliding_window(16, 4),
    "global and window": lambda: masks.generate_global_sliding_window(16, torch.arange(LENGTH) < 3),
    "prefix": lambda: masks.generate_prefix_lm_mask(20),
    "documents": lambda: masks.generate_doc_mask_mod(masks.causal_mask, _documents()),
    "packed documents": lambda: masks.generate_packed_causal_doc_mask_mod(_documents()),
    "neighbourhood": lambda: masks.generate_natten(8, 8, 3, 3),
    "neighbourhood, tiles": lambda: masks.generate_tiled_natten(8, 8, 3, 3, 4, 4),
    "neighbourhood, Morton": lambda: masks.generate_morton_natten(8, 8, 3, 3),
    "sliding tiles 2d": lambda: masks.generate_sta_mask_mod_2d((8, 8), (6, 6), (2, 2)),
    "sliding tiles 3d": lambda: masks.generate_sta_mask_mod_3d((4, 4, 4), (2, 2, 2), (2, 2, 2)),
    "block diffusion": lambda: masks.generate_block_diffusion_mask(LENGTH // 2, 8),
    "shared prefix": lambda: masks.generate_shared_prefix_mask_mod(
        _documents(), torch.tensor([-1, 0, 0])
    ),
    "vision intervals": lambda: masks.generate_vision_cross_attention_mask_mod(
        torch.tensor([[0, 20], [20, 37], [37, LENGTH], [50, LENGTH]]), 16
    ),
    "spatial heads": lambda: masks.generate_spatial_head_mask_mod(16, 3, 16, 2, round_width=16),
    "temporal heads": lambda: masks.generate_temporal_head_mask_mod(16, 3, 16, 2),
}
_MODS: dict[str, Callable[[], Any]] = {
    "alibi": lambda: mods.generate_alibi_bias(HEADS),
    "softcap": lambda: mods.generate_tanh_softcap(20, approx=False),
    "activation": lambda: mods.generate_activation_score_mod(),
    "Graphormer": lambda: mods.generate_graphormer_spatial_bias(
        torch.randn(HEADS, 10), torch.randint(0, 10, (BATCH, LENGTH, LENGTH))
    ),
    "sandwich": lambda: mods.generate_sandwich_bias(HEADS, LENGTH),
}
CASES: dict[str, Case] = {
    **{f"{name} (flex)": _masked_by_flex(make) for name, make in _MASKS.items()},
    **{f"{name} (eager)": _masked_by_hand(make) for name, make in _MASKS.items()},
    **{f"{name} (flex)": _scored(make) for name, make in _MODS.items()},
}
