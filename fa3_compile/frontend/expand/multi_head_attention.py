"""`F.multi_head_attention_forward` written out in the Dynamo graph.

`nn.MultiheadAttention` and the layers of `nn.Transformer` reach Dynamo as one call with its
projections inside, so that Q, K and V are no nodes of the graph. The call is replaced by the plain
operations that its source consists of; those are what the other stages read.
"""

from __future__ import annotations

import inspect
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_scalar
from torch.utils._pytree import tree_leaves

from fa3_compile.frontend.dynamo.graph import example_value
from fa3_compile.frontend.dynamo.mutations import is_mutation
from fa3_compile.frontend.expand.write_out import is_node, write_out

# Keys and values given in place of their projections: nothing in torch.nn does that.
RARE = ("static_k", "static_v")


def expand_calls(graph: fx.Graph) -> int:
    """Writes out every call but those whose dropped weights are read; returns how many."""
    count = 0
    for node in list(graph.nodes):
        if node.target is F.multi_head_attention_forward and _expandable(node):
            _expand(graph, node)
            count += 1
    return count


def _arguments(node: fx.Node) -> dict[str, Any]:
    bound = inspect.signature(F.multi_head_attention_forward).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if not given["training"]:
        given["dropout_p"] = 0.0
    elif is_node(given["dropout_p"]):
        # PyTorch compiles the probability of a dropout in, and so do we.
        given["dropout_p"] = guard_scalar(example_value(given["dropout_p"]))
    return given


def _expandable(node: fx.Node) -> bool:
    given = _arguments(node)
    outputs = [u for u in node.users if u.target is operator.getitem and u.args[1] == 0]
    others = [u for u in node.users if u not in outputs and _is_read(u)]
    values = [example_value(x) for x in tree_leaves(list(given.values())) if is_node(x)]
    drops = given["dropout_p"] > 0
    return (
        bool(outputs)
        and not (others and drops)
        and not any(given[name] not in (None, False) for name in RARE)
        and all(isinstance(v, torch.Tensor) for v in values)
    )


def _is_read(node: fx.Node) -> bool:
    """Whether anything but further dead code uses the value."""
    return any(u.op == "output" or is_mutation(u) or _is_read(u) for u in node.users)


def _expand(graph: fx.Graph, node: fx.Node) -> None:
    made = write_out(graph, node, _arguments(node), multi_head_attention)
    for user in list(node.users):
        taken = user.args[1] if user.target is operator.getitem else None
        replacement = made[taken] if isinstance(taken, int) else None
        if replacement is not None:
            user.replace_all_uses_with(replacement)
        _erase(graph, user)
    graph.erase_node(node)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erases a node and the dead code that reads it."""
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


def multi_head_attention(given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `F.multi_head_attention_forward` returns, its arguments by name.

    Queries [L, N, E] or [L, E], keys and values [S, N, E] or [S, E]. Which rows without keys give
    NaN and which zeros depends on `need_weights`, as it does there; so does whether there are
    weights, [N, L, S] or [N, H, L, S].
    """
    query, key, value = given["query"], given["key"], given["value"]
    heads = given["num_heads"]
    batched = query.dim() == 3
    mask, padding = (
        _additive(given["attn_mask"], query),
        _additive(given["key_padding_mask"], query),
    )
    if not batched:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        padding = padding if padding is None else padding.unsqueeze(0)
    q, k, v = _projected(query, key, value, given)
    length, batch, width = query.shape
    k, v, more = _with_more_keys(k, v, given)
    mask, padding = (x if x is None else F.pad(x, (0, more)) for x in (mask, padding))
    q, k, v = (
        x.view(x.shape[0], batch, heads, width // heads).permute(1, 2, 0, 3) for x in (q, k, v)
    )
    causal = given["is_causal"] and padding is None and not given["need_weights"]
    if mask is not None and mask.dim() == 3:
        mask = mask.view(batch, heads, length, -1)
    if padding is not None:
        padding = padding.view(batch, 1, 1, -1)
        mask = padding if mask is None else mask + padding
    p = given["dropout_p"]
    weights = None
    if given["need_weights"]:
        scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
        scores = scores if mask is None else scores + mask
        weights = F.dropout(F.softmax(scores, dim=-1), p, p > 0)
        out = weights @ v
        weights = weights.mean(1) if given["average_attn_weights"] else weights
        weights = weights if batched else weights.squeeze(0)
    else:
        mask = None if causal else mask
        out = F.scaled_dot_product_attention(q, k, v, mask, p, causal)
    out = out.permute(2, 0, 1, 3).reshape(length, batch, width)
    out = F.linear(out, given["out_proj_weight"], given["out_proj_bias"])
    return out if batched else out.squeeze(1), weights


def _additive(mask, like):
    """A boolean mask, True where a key is hidden, as -inf and 0."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)


def _projected(query, key, value, given: dict[str, Any]):
    if given["use_separate_proj_weight"]:
        weights = [given[f"{name}_proj_weight"] for name in "qkv"]
    else:
        weights = given["in_proj_weight"].chunk(3)
    bias = given["in_proj_bias"]
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases))


def _with_more_keys(k, v, given: dict[str, Any]):
    """K and V [S, N, E] with a learned key and a key of zeros appended, and how many were."""
    more = 0
    if given["bias_k"] is not None:
        k, v = (
            torch.cat([x, bias.expand(1, x.shape[1], -1)])
            for x, bias in ((k, given["bias_k"]), (v, given["bias_v"]))
        )
        more += 1
    if given["add_zero_attn"]:
        k, v = (torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in (k, v))
        more += 1
    return k, v, more
