"""The operator `fa3::cpu_forward`: softmax(scale * Q K^T + bias) V on the CPU, of keys that a mask
hides whatever they hold.

ATen's kernel adds the mask, and NaN + -inf is NaN: one in a padded key, as a norm of zeros leaves
there, would be in every row, where the program fills the score and forgets it. Whether there is
one, only a run can tell, so that this is one operator for compiled code.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fa3_compile.runtime.op import LIBRARY

LIBRARY.define(
    "cpu_forward(Tensor q, Tensor k, Tensor v, Tensor bias, bool causal, float scale)"
    " -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
cpu_forward = torch.ops.fa3.cpu_forward.default
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@torch.library.impl(LIBRARY, "cpu_forward", "CompositeExplicitAutograd")
def _cpu_forward(q, k, v, bias, causal, scale):
    """(out [B,H,Sq,D] in memory of [B,Sq,H,D], LSE [B,H,Sq]) of q [B,H,Sq,D], k and v
    [B,Hkv,Skv,D]; bias float32 [B|1,H|1,Sq|1,Skv|1], -inf where a key is hidden. A row of -inf has
    zeros and an LSE of 0. Memory: O(S), or one KV head's scores where a row is NaN."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        out, lse = FLASH(q, k, v, is_causal=causal, attn_mask=bias, scale=scale)
        if bool(lse.isnan().any()):
            _by_kv_head(out, lse, q, k, v, bias, causal, scale)
        return as_declared(out, out), lse.contiguous()


@torch.library.register_fake("fa3::cpu_forward", lib=LIBRARY)
def _cpu_forward_fake(q, k, v, bias, causal, scale):
    return heads_inside(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def heads_inside(x: Tensor) -> Tensor:
    """An empty [B,H,S,D] with the memory of [B,S,H,D], which ATen's results have."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def as_declared(result: Tensor, x: Tensor) -> Tensor:
    """A result with the shape of x, of which it may have more columns, and that memory."""
    declared = heads_inside(x)
    if result.shape == x.shape and result.stride() == declared.stride():
        return result
    return declared.copy_(result[..., : x.shape[-1]])


def each_kv_head(q: Tensor, k: Tensor) -> Iterator[tuple[tuple[int, int], tuple[int, slice]]]:
    """The place of each KV head, and that of the query heads that read it."""
    group = q.shape[1] // k.shape[1]
    for b in range(k.shape[0]):
        for kv_head in range(k.shape[1]):
            yield (b, kv_head), (b, slice(kv_head * group, (kv_head + 1) * group))


def later_keys(q: Tensor, k: Tensor) -> Tensor:
    """Those that a causal mask hides, [Sq,Skv]."""
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)


def _by_kv_head(out, lse, q, k, v, bias, causal, scale) -> None:
    """The softmax again, into `out` and `lse`, its hidden scores filled."""
    bias = bias.expand(*q.shape[:3], k.shape[2])
    later = later_keys(q, k) if causal else None
    for kv_head, member in each_kv_head(q, k):
        hidden = bias[member] == float("-inf")
        if later is not None:
            hidden = hidden | later
        x = q[member].float() @ k[kv_head].float().mT * scale + bias[member]
        x.masked_fill_(hidden, float("-inf"))
        empty = hidden.all(-1)
        p = torch.softmax(x, -1).masked_fill_(empty.unsqueeze(-1), 0.0)
        out[member] = (p @ v[kv_head].float()).to(out.dtype)
        lse[member] = x.logsumexp(-1).masked_fill_(empty, 0.0)
