"""The operator `fa3::cpu_forward`: softmax(scale * Q K^T + bias) V on the CPU, of keys that a mask
hides whatever they hold.

ATen's kernel adds the mask, and NaN + -inf is NaN: one in a padded key, as a norm of zeros leaves
there, would be in every row, where the program fills the score and forgets it. Whether there is
one, only a run can tell, so that this is one operator for compiled code.
"""

from __future__ import annotations

import torch

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
        return _as_declared(out), lse.contiguous()


@torch.library.register_fake("fa3::cpu_forward", lib=LIBRARY)
def _cpu_forward_fake(q, k, v, bias, causal, scale):
    return _empty_out(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _empty_out(q):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


def _as_declared(out):
    declared = _empty_out(out)
    return out if out.stride() == declared.stride() else declared.copy_(out)


def _by_kv_head(out, lse, q, k, v, bias, causal, scale) -> None:
    """The softmax again, into `out` and `lse`, its hidden scores filled."""
    batch, kv_heads, kv_len, _ = k.shape
    heads, q_len = q.shape[1:3]
    group = heads // kv_heads
    bias = bias.expand(batch, heads, q_len, kv_len)
    later = torch.ones(q_len, kv_len, dtype=torch.bool).triu(1) if causal else None
    for b in range(batch):
        for kv_head in range(kv_heads):
            member = b, slice(kv_head * group, (kv_head + 1) * group)
            hidden = bias[member] == float("-inf")
            if later is not None:
                hidden = hidden | later
            x = q[member].float() @ k[b, kv_head].float().mT * scale + bias[member]
            x.masked_fill_(hidden, float("-inf"))
            empty = hidden.all(-1)
            p = torch.softmax(x, -1).masked_fill_(empty.unsqueeze(-1), 0.0)
            out[member] = (p @ v[b, kv_head].float()).to(out.dtype)
            lse[member] = x.logsumexp(-1).masked_fill_(empty, 0.0)
