"""Integers that float tensors are divided by, as floats, which are the same numbers.

Inductor's patterns of scaled dot products take such an integer for the length of a dynamic shape,
and `softmax(q @ k.mT / 4) @ v` is an IndexError in training there (torch 2.11 to 2.15). What is
left to Inductor should compile.
"""

from __future__ import annotations

import torch
from torch import fx

from fa3_compile.frontend.dynamo.graph import example_value, target_name

DIVISIONS = frozenset("truediv div divide true_divide".split())
# Integers up to this are floats exactly.
LARGEST = 2**53


def integer_divisors_as_floats(graph: fx.Graph) -> bool:
    """Rewrites the calls in place; whether there were any."""
    found = False
    for node in graph.nodes:
        if target_name(node) not in DIVISIONS or len(node.args) != 2 or node.kwargs:
            continue
        left, right = node.args
        tensor = example_value(left) if isinstance(left, fx.Node) else None
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            continue
        if type(right) is int and abs(right) <= LARGEST:
            node.args = (left, float(right))
            found = True
    return found
