"""Biases that gather rows of a table which learns, `table[index]`, in half precision.

Many places share a row. Inductor adds their gradients up in the table's own type, by atomics of 16
bits that wait for each other: 301 ms for [16, 4096, 4096] of 8191 rows on an H100, in an attention
that takes 2.3. Gathered in float32, and rounded to what they were, the gradient is summed there.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fa3_compile.frontend.dynamo.gradients import has_gradient
from fa3_compile.frontend.dynamo.graph import computing_fakes, example_value, target_name
from fa3_compile.frontend.rewrite.emit import Emitter

HALF = (torch.bfloat16, torch.float16)
# Operators between a gather and the attention that are looked through.
MOST_NODES = 32


def gather_in_float32(emit: Emitter, bias: fx.Node) -> None:
    """Where a gather is that tensor but for its view, and for what is computed of its elements one
    by one: its users read one of float32, rounded to what it was."""
    size, stack, seen = example_value(bias).numel(), [bias], set[fx.Node]()
    while stack and len(seen) < MOST_NODES:
        node = stack.pop()
        value = example_value(node)
        if node in seen or not isinstance(value, Tensor) or not has_gradient(node):
            continue
        seen.add(node)
        if not statically_known_true(value.numel() == size):
            continue
        if _gathers(node):
            node.replace_all_uses_with(_in_float32(emit, node))
        else:
            stack.extend(node.all_input_nodes)


def _gathers(node: fx.Node) -> bool:
    """Whether it is rows of a tensor in half precision, at places that integers say."""
    if node.op == "call_function" and node.target is operator.getitem:
        indices = node.args[1] if isinstance(node.args[1], (tuple, list)) else (node.args[1],)
    elif target_name(node) == "index_select" and len(node.args) == 3:
        indices = node.args[2:]
    else:
        return False
    values = [example_value(x) for x in indices if isinstance(x, fx.Node)]
    integers = (torch.int64, torch.int32)
    return example_value(node).dtype in HALF and any(
        isinstance(x, Tensor) and x.dtype in integers and x.dim() for x in values
    )


def _in_float32(emit: Emitter, node: fx.Node) -> fx.Node:
    if "in_float32" not in node.meta:
        value = example_value(node)
        with emit.graph.inserting_before(node):
            wide = emit.call("to", node.args[0], torch.float32)
            rows = emit.graph.node_copy(node, lambda x: wide if x is node.args[0] else x)
            with computing_fakes(emit.fake_mode):
                rows.meta = {**rows.meta, "example_value": value.to(torch.float32)}
            rounded = emit.call("to", rows, value.dtype)
        rounded.meta["example_value"] = value
        node.meta["in_float32"] = rounded
    return node.meta["in_float32"]
