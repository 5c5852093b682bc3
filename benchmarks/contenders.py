"""What `benchmarks/run.py` compares: each contender as a function of (q, k, v, *captured).

fa3        the eager code compiled by torch.compile(..., backend="fa3")
inductor   the same code compiled by Inductor alone
cudnn      F.scaled_dot_product_attention, cuDNN's kernel
flash2     F.scaled_dot_product_attention, PyTorch's FlashAttention-2 kernel
flex       torch.compile(flex_attention), its Triton kernel; its block mask is made beforehand
flash3     FlashAttention-3's own package, where `flash_attn_interface` can be imported
flash4     FlashAttention-4's own package, where `flash_attn.cute` can be imported
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import SOFTCAP, WINDOW, Case

NAMES = ("fa3", "inductor", "cudnn", "flash2", "flex", "flash3", "flash4")
Attention = Callable[..., Tensor]


def contender(name: str, case: Case, inputs: Sequence[Tensor]) -> Attention | None:
    """The named contender, or None where it cannot compute the case or is not installed."""
    return {
        "fa3": _fa3,
        "inductor": _inductor,
        "cudnn": functools.partial(_sdpa, "CUDNN_ATTENTION"),
        "flash2": functools.partial(_sdpa, "FLASH_ATTENTION"),
        "flex": _flex,
        "flash3": functools.partial(_flash_package, "flash_attn_interface"),
        "flash4": functools.partial(_flash_package, "flash_attn.cute.interface"),
    }[name](case, inputs)


def _fa3(case: Case, inputs: Sequence[Tensor]) -> Attention:
    # By itself rather than by name: a checkout need not be installed.
    from fa3_compile.backend import fa3

    return torch.compile(case.eager(), backend=fa3, dynamic=False)


def _inductor(case: Case, inputs: Sequence[Tensor]) -> Attention:
    return torch.compile(case.eager(), dynamic=False)


def _sdpa(kernel: str, case: Case, inputs: Sequence[Tensor]) -> Attention | None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    plain = case.variant.name in ("full", "causal")
    if inputs[0].device.type != "cuda" or not (plain or _takes_bias(kernel, case)):
        return None
    backend = getattr(SDPBackend, kernel)
    causal, grouped = case.variant.name == "causal", case.heads != case.kv_heads

    def attention(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
        mask = bias[0] if bias else None
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
            )

    return attention


def _takes_bias(kernel: str, case: Case) -> bool:
    return kernel == "CUDNN_ATTENTION" and case.variant.name == "bias"


def _flex(case: Case, inputs: Sequence[Tensor]) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    score, mask = case.variant.flex(*inputs[3:])
    block_mask = None
    if mask is not None:
        batch = case.batch if case.variant.name.startswith("documents") else None
        block_mask = create_block_mask(
            mask, batch, None, case.q_len, case.kv_len, device=inputs[0].device.type
        )
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = case.heads != case.kv_heads

    def attention(q: Tensor, k: Tensor, v: Tensor, *captured: Tensor) -> Tensor:
        out: Any = compiled(q, k, v, score_mod=score, block_mask=block_mask, enable_gqa=grouped)
        return out

    return attention


def _flash_package(module: str, case: Case, inputs: Sequence[Tensor]) -> Attention | None:
    """Dao-AILab's packages: q, k, v are [B,S,H,D] there."""
    arguments: dict[str, dict[str, Any]] = {
        "full": {},
        "causal": {"causal": True},
        "softcap": {"causal": True, "softcap": SOFTCAP},
        "window1024": {"causal": True, "window_size": (WINDOW - 1, 0)},
    }
    if case.variant.name not in arguments:
        return None
    try:
        flash = importlib.import_module(module).flash_attn_func
    except ImportError:
        return None

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash(*(x.transpose(1, 2) for x in (q, k, v)), **arguments[case.variant.name])
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attention
