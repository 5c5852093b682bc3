"""Random calls of `scaled_dot_product_attention` and `flex_attention`, with every argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention, or_masks

from tests.programs import layouts, parts
from tests.programs.choices import Choices
from tests.programs.masks import BATCH, HEADS, MASKS, positions
from tests.programs.parts import Sizes
from tests.programs.program import Program

LAYOUTS = (
    "bhsd", "bshd einsum", "sbhd", "fused qkv", "strided", "K transposed", "one batch of K", "K is V",
    "wide V", "gqa repeat", "gqa expand", "gqa", "mqa",
)  # fmt: skip
# Fewer heads of keys than of queries: `enable_gqa`.
GROUPED = ("gqa", "mqa")

ATTN_MASKS = (
    "", "", "causal", "boolean", "two", "added", "lowest", "bias", "causal bias", "padding",
    "float padding",
)  # fmt: skip


def attn_mask(name: str, sizes: Sizes, seed: int) -> tuple[tuple[Tensor, ...], Callable[..., Any]]:
    """(tensors, (q, *tensors) -> attn_mask). Of a row that sees nothing kernels of PyTorch's own
    make different things: there is none."""
    n, m, device = sizes.n, sizes.m, sizes.device

    def at(q: Tensor, name: str) -> Tensor:
        return MASKS[name](*positions(q.new_empty(n, m)))

    def added(q: Tensor, value: float) -> Tensor:
        return torch.zeros(n, m, dtype=q.dtype, device=device).masked_fill(~at(q, "prefix"), value)

    if name == "boolean":
        return (), lambda q: at(q, "prefix")
    if name == "two":
        return (), lambda q: at(q, "first and near") & at(q, "causal")
    if name == "added":
        return (), lambda q: added(q, -math.inf)
    if name == "lowest":
        return (), lambda q: added(q, torch.finfo(q.dtype).min)
    if name in ("bias", "causal bias"):
        bias = parts.normal(seed + 50, 1, HEADS, n, m, device=device).requires_grad_()
        if name == "bias":
            return (bias,), lambda q, x: x.to(q.dtype)
        return (bias,), lambda q, x: x.to(q.dtype).masked_fill(~at(q, "causal"), -math.inf)
    if name in ("padding", "float padding"):
        keep = torch.ones(BATCH, 1, 1, m, dtype=torch.bool, device=device)
        keep[0, ..., max(1, m // 2) :] = False
        if name == "padding":
            return (keep,), lambda q, x: x
        return (keep,), lambda q, x: (1.0 - x.to(q.dtype)) * torch.finfo(q.dtype).min
    return (), lambda q: None


def _documents(n: int, m: int, device: str):
    ids = torch.arange(max(n, m), device=device) // 5
    return lambda b, h, q, kv: ids[q] == ids[kv]


# name -> (sizes) -> mask_mod
MASK_MODS: dict[str, Callable[[Sizes], Callable[..., Tensor]]] = {
    "causal": lambda _: lambda b, h, q, kv: kv <= q,
    "window": lambda _: lambda b, h, q, kv: (q - kv).abs() < 4,
    "prefix": lambda _: lambda b, h, q, kv: kv < 3,
    "dilated": lambda _: lambda b, h, q, kv: (q - kv) % 3 == 0,
    "by head": lambda _: lambda b, h, q, kv: q - kv < 3 * (h + 1),
    "by batch": lambda _: lambda b, h, q, kv: kv < 5 + 2 * b,
    "documents": lambda sizes: _documents(sizes.n, sizes.m, sizes.device),
}

SCORE_MODS = ("", "softcap", "ALiBi", "bias", "table", "key bias", "head scale", "fill", "two")


def score_mod(name: str, sizes: Sizes, seed: int) -> tuple[tuple[Tensor, ...], Any]:
    """(tensors, (score, b, h, q, kv, *tensors) -> score)."""

    def leaf(i, *shape):
        return parts.normal(seed + i, *shape, device=sizes.device).requires_grad_()

    if name == "softcap":
        return (), lambda s, b, h, q, kv: 5 * torch.tanh(s / 5)
    if name == "ALiBi":
        return (), lambda s, b, h, q, kv: s + (kv - q) * torch.exp2(-(h + 1.0))
    if name == "bias":
        return (leaf(50, HEADS, sizes.n, sizes.m),), lambda s, b, h, q, kv, x: s + x[h, q, kv]
    if name == "table":
        return (leaf(51, 9),), lambda s, b, h, q, kv, x: s + x[(kv - q).clamp(-4, 4) + 4]
    if name == "key bias":
        return (leaf(52, BATCH, sizes.m),), lambda s, b, h, q, kv, x: s + x[b, kv]
    if name == "head scale":
        return (leaf(53, HEADS),), lambda s, b, h, q, kv, x: s * x[h]
    if name == "fill":
        return (), lambda s, b, h, q, kv: torch.where(kv <= q, s, -math.inf)
    if name == "two":
        return (leaf(54, sizes.n),), lambda s, b, h, q, kv, x: 4 * torch.sigmoid(s) + x[q]
    return (), None


def call(choices: Choices, device: str) -> Program:
    """One program that calls one of PyTorch's own attentions."""
    one_of = choices.one_of
    layout = one_of("layout", *LAYOUTS)
    sizes = parts.sizes(choices, device, square=layout == "fused qkv")
    seed = one_of("seed", *range(4))
    scale = one_of("scale", None, None, 0.3, 1.0 / sizes.dim)
    flex = one_of("attention", "flex", "sdpa") == "flex"
    kernels = one_of("kernels", ("reference",), ("cpu", "reference"))
    run: dict[str, Any] = {
        "dtype": one_of("dtype", None, torch.bfloat16, torch.float16),
        "dynamic": None,
        "training": one_of("training", True, True, False),
        "kernels": kernels if device == "cpu" else None,
    }
    if device != "cpu" and not flex and layout == "K transposed" and sizes.m == 1:
        layout = "bhsd"  # PyTorch 2.11: "key is not correctly aligned (strideM)"
    arguments, project = layouts.layout(layout, sizes, seed)
    own, grouped = len(arguments), layout in GROUPED
    extra, called, given = (_flex if flex else _sdpa)(choices, sizes, seed)

    def function(*tensors: Tensor):
        q, k, v, finish = project(*tensors[:own])
        out = called(q, k, v, *tensors[own:], scale=scale, enable_gqa=grouped)
        return (finish(out[0]), *out[1:]) if isinstance(out, tuple) else finish(out)

    made_of = {
        "call": "flex_attention" if flex else "scaled_dot_product_attention",
        "layout": layout,
        "lengths": f"{sizes.n} {sizes.m}",
        "head dim": str(sizes.dim),
        "call's scale": str(scale),
        **given,
    }
    expected = "either" if sizes.m == 1 else "fused"
    return Program(function, (*arguments, *extra), made_of, expected, run)


def _flex(choices: Choices, sizes: Sizes, seed: int):
    """(tensors, (q, k, v, *tensors, **arguments) -> output, what it is made of)"""
    masks = choices.up_to_two("mask mods", sorted(MASK_MODS), unique=True)
    combine, block = choices.one_of("combine", "and", "or"), choices.one_of("block", 8, 128)
    mod, with_lse = (
        choices.one_of("score mod", *SCORE_MODS),
        choices.one_of("LSE", False, False, True),
    )
    tensors, modified = score_mod(mod, sizes, seed)
    block_mask = None
    if masks:
        mods = (MASK_MODS[name](sizes) for name in masks)
        mask = and_masks(*mods) if combine == "and" else or_masks(*mods)
        shape = (BATCH, HEADS, sizes.n, sizes.m)
        block_mask = create_block_mask(mask, *shape, sizes.device, block)

    def call(q, k, v, *captured, **arguments):
        if modified:
            arguments["score_mod"] = lambda *x: modified(*x, *captured)
        return flex_attention(q, k, v, block_mask=block_mask, return_lse=with_lse, **arguments)

    made_of = {
        "mask mods": f"{combine} of {masks}" if masks else "",
        "score mod": mod,
        "LSE": str(with_lse),
    }
    return tensors, call, made_of


def _sdpa(choices: Choices, sizes: Sizes, seed: int):
    """As `_flex`."""
    mask = choices.one_of("attn_mask", *ATTN_MASKS)
    tensors, masked = attn_mask(mask, sizes, seed)

    def call(q, k, v, *captured, **arguments):
        mask = masked(q, *captured)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, **arguments)

    is_causal = mask == "causal"
    return tensors, call, {"attn_mask": mask}
