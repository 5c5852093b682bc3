"""Whether two nodes of a shadow hold the same value because they compute it alike.

The shadow is functional, so that equal operators of equal arguments are equal; only what is drawn
at random differs every time. Of two nodes of Dynamo's graph it says that they are written alike.
"""

from __future__ import annotations

import torch
from torch import fx

CALLS = ("call_function", "call_method")


def is_random(node: fx.Node) -> bool:
    """Whether a node's value differs from run to run: drawn, or memory as it was found."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    drawn = torch.Tag.nondeterministic_seeded in node.target.tags
    return drawn or "empty" in node.target.__name__


def same_value(a: object, b: object) -> bool:
    """Whether two arguments (nodes, numbers, lists of them) are provably equal."""
    compared: set[tuple[fx.Node, fx.Node]] = set()
    stack = [(a, b)]
    while stack:
        x, y = stack.pop()
        if x is y:
            continue
        if isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)):
            if len(x) != len(y):
                return False
            stack += zip(x, y)
            continue
        if not (isinstance(x, fx.Node) and isinstance(y, fx.Node)):
            if type(x) is not type(y) or x != y:
                return False
            continue
        if (x, y) in compared:
            continue
        compared.add((x, y))
        alike = x.op == y.op and x.op in CALLS and x.target == y.target
        if not alike or is_random(x):
            return False
        if x.kwargs.keys() != y.kwargs.keys():
            return False
        stack += [(x.args, y.args), *((x.kwargs[k], y.kwargs[k]) for k in x.kwargs)]
    return True
