"""Calls that hide an attention, spelled out in plain tensor operations before they are read."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fa3_compile.frontend.shadow.operators import DROPOUT


def sdpa(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
):
    """`F.scaled_dot_product_attention` as its documentation writes it.

    Rows without a single allowed key give zeros, as PyTorch's kernels do (`_safe_softmax`).
    """
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    if enable_gqa and query.size(-3) != key.size(-3):
        key, value = (_repeated(x, query.size(-3)) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * scale
    if is_causal:
        rows = torch.arange(query.size(-2), device=query.device)[:, None]
        columns = torch.arange(key.size(-2), device=query.device)[None, :]
        scores = scores.masked_fill(columns > rows, -math.inf)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(attn_mask.logical_not(), -math.inf)
        else:
            scores = scores + attn_mask
    weights = torch.ops.aten._safe_softmax(scores, -1)
    # Scores may be of the mask's type: a wider one than the operands'.
    return dropout(weights, dropout_p).to(value.dtype) @ value


def _repeated(x, heads):
    """The KV heads of a tensor, each as often as there are query heads to share it.

    How often is a number of the model: where both counts are dynamic, it is held fixed.
    """
    group = int(heads // x.size(-3))
    torch._check(heads == group * x.size(-3))
    return x.repeat_interleave(group, -3)


def dropout(input, p=0.5, training=True, inplace=False):
    """`F.dropout`; one that drops anything stays one operator, a factor on what it is given."""
    if not training or p == 0:
        return input
    dropped = DROPOUT(input, p)
    return input.copy_(dropped) if inplace else dropped


def batch_norm(
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
):
    """`F.batch_norm` by running statistics: each channel is scaled and shifted by its own."""
    assert not training
    channels = (-1, *(1,) * (input.dim() - 2))
    mean, variance = running_mean.view(channels), running_var.view(channels)
    normed = (input - mean) * (variance + eps).rsqrt()
    if weight is not None:
        normed = normed * weight.view(channels)
    if bias is not None:
        normed = normed + bias.view(channels)
    return normed.to(input.dtype)


aten = torch.ops.aten
SPELLED_OUT = {
    F.scaled_dot_product_attention: sdpa,
    aten.scaled_dot_product_attention: sdpa,
    aten.scaled_dot_product_attention.default: sdpa,
    F.batch_norm: batch_norm,
    F.dropout: dropout,
    torch.dropout: dropout,
    aten.dropout: dropout,
    aten.dropout.default: dropout,
}
