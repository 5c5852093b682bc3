"""`nn.TransformerEncoderLayer` in inference, written out in the Dynamo graph.

In evaluation mode, without gradients, the layer is one call of an operator that PyTorch has no
Python source of. It is replaced by the operations that it consists of; Inductor fuses what is
around the attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import guard_scalar

from fa3_compile.frontend.dynamo.graph import example_value
from fa3_compile.frontend.expand.write_out import is_node, write_out

CALL = torch._transformer_encoder_layer_fwd  # pyright: ignore[reportPrivateImportUsage]
SCHEMA = torch.ops.aten._transformer_encoder_layer_fwd.default._schema


def expand_encoder_layers(graph: fx.Graph) -> int:
    """Writes out every call on plain tensors outside autocast; returns how many."""
    count = 0
    if any(x.target is torch.amp.autocast_mode._enter_autocast for x in graph.nodes):
        return count
    for node in list(graph.nodes):
        if node.target is CALL and _expandable(node):
            (made,) = write_out(graph, node, _arguments(node), encoder_layer)
            assert made is not None
            node.replace_all_uses_with(made)
            graph.erase_node(node)
            count += 1
    return count


def _arguments(node: fx.Node) -> dict[str, Any]:
    given = {x.name: x.default_value for x in SCHEMA.arguments}
    given.update(zip(given, node.args))
    given.update(node.kwargs)
    if is_node(given["eps"]):
        # PyTorch compiles the epsilon of a norm in, and so do we.
        given["eps"] = guard_scalar(example_value(given["eps"]))
    return given


def _expandable(node: fx.Node) -> bool:
    values = [example_value(x) for x in _arguments(node).values() if is_node(x)]
    plain = all(isinstance(v, Tensor) and not v.is_nested for v in values)
    # Which of the operator's own steps autocast rounds is not for us to say.
    return plain and not any(torch.is_autocast_enabled(v.device.type) for v in values)


def encoder_layer(given: dict[str, Any]) -> Tensor:
    """What the operator returns, its arguments by name, for sources [N, L, E]."""
    x = given["src"]
    if given["norm_first"]:
        x = x + _attention(_norm(x, given, 1), given)
        return x + _feed_forward(_norm(x, given, 2), given)
    x = _norm(x + _attention(x, given), given, 1)
    return _norm(x + _feed_forward(x, given), given, 2)


def _norm(x: Tensor, given: dict[str, Any], number: int) -> Tensor:
    weight, bias = given[f"norm_weight_{number}"], given[f"norm_bias_{number}"]
    return F.layer_norm(x, (given["embed_dim"],), weight, bias, given["eps"])


def _attention(x: Tensor, given: dict[str, Any]) -> Tensor:
    batch, length, width = x.shape
    heads = given["num_heads"]
    q, k, v = (
        y.view(batch, length, heads, width // heads).transpose(1, 2)
        for y in F.linear(x, given["qkv_weight"], given["qkv_bias"]).chunk(3, -1)
    )
    scores = (q * math.sqrt(heads / width)) @ k.transpose(-2, -1)
    if (mask := given["mask"]) is not None:
        # Keys of a batch, [N, L]; or [L, L]; or [N, H, L, L]. Whatever is not 0 hides, floats too.
        mask = mask.view(batch, 1, 1, length) if given["mask_type"] == 1 else mask
        scores = scores.masked_fill(mask != 0, -math.inf)
    out = (F.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(batch, length, width)
    return F.linear(out, given["proj_weight"], given["proj_bias"])


def _feed_forward(x: Tensor, given: dict[str, Any]) -> Tensor:
    activation = F.gelu if given["use_gelu"] else F.relu
    hidden = activation(F.linear(x, given["ffn_weight_1"], given["ffn_bias_1"]))
    return F.linear(hidden, given["ffn_weight_2"], given["ffn_bias_2"])
