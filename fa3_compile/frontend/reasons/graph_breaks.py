"""Attention with a graph break in its middle, whose halves are two graphs: told, not passed over.

Dynamo compiles what stands before a break, and then, when that has run, what follows it. Scores or
weights that leave the first graph are remembered, to be met again in the second.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.dynamo.activations import activations
from fa3_compile.frontend.dynamo.graph import (
    example_value,
    is_softmax_like,
    opaque_target,
    target_name,
)
from fa3_compile.frontend.dynamo.products import alike
from fa3_compile.frontend.dynamo.seeds import is_product
from fa3_compile.frontend.dynamo.sizes import hint
from fa3_compile.source import of_frame

HINT = (
    "Move what breaks the graph out of the attention. torch.compile(fullgraph=True) raises there."
)
RESUMED = re.compile(r", in torch_dynamo_resume_in_")


@dataclass(frozen=True)
class Left:
    """Scores, or weights made of them by a softmax, that left a graph at a break."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    weights: bool
    place: str


# The newest last; those of a graph are met by the one that is compiled after it.
_left: collections.deque[Left] = collections.deque(maxlen=32)


def broken_attention(gm: fx.GraphModule) -> Iterator[Decline]:
    """A `Decline` for every product with V whose weights, or their scores, are of the graph before
    a break; and remembers what leaves this graph at one."""
    place = _break_behind(gm)
    resumed = any(RESUMED.search(n.meta.get("stack_trace") or "") for n in gm.graph.nodes)
    if place is None and not resumed:
        return
    given = activations(gm.graph)
    arrived = [*_arrived(gm.graph)] if resumed else []
    for node, left in arrived:
        product, leaves = _followed(node, left.weights)
        if product is not None:
            between = "the softmax and V" if left.weights else "Q K^T and the softmax"
            why = f"the graph breaks between {between}"
            why += f", at {left.place}" if left.place else ""
            yield Decline("graph-break", product, HINT, message=why, stage="detect")
        elif place is not None:
            _left.extend(replace(left, weights=weights, place=place) for weights in leaves)
    if place is None:
        return
    for node in gm.graph.nodes:
        if is_product(node) and given.issuperset(node.all_input_nodes):
            product, leaves = _followed(node, False)
            if product is None:
                _left.extend(Left(*_kind(node), weights, place) for weights in leaves)


def _break_behind(gm: fx.GraphModule) -> str | None:
    """Where the user's code breaks the graph; None where it ends otherwise."""
    ended = getattr(gm, "compile_subgraph_reason", None)
    if ended is None or not ended.graph_break:
        return None
    return of_frame(ended.user_stack[-1]) if ended.user_stack else ""


def _arrived(graph: fx.Graph) -> Iterator[tuple[fx.Node, Left]]:
    """The inputs that may be what left another graph."""
    for node in graph.nodes:
        if node.op != "placeholder" or not isinstance(example_value(node), torch.Tensor):
            continue
        known = (x for x in reversed(_left) if (x.shape, x.dtype) == _kind(node))
        if (left := next(known, None)) is not None:
            yield node, left


def _kind(node: fx.Node) -> tuple[tuple[int, ...], torch.dtype]:
    value = example_value(node)
    return tuple(map(hint, value.shape)), value.dtype


def _followed(source: fx.Node, weights: bool) -> tuple[fx.Node | None, set[bool]]:
    """(the product that weights made of this value meet, whether what leaves the graph of them are
    weights already), moved and changed element by element."""
    shape = example_value(source).shape
    leaves: set[bool] = set()
    stack, seen = [(source, weights)], {(source, weights)}
    while stack:
        node, weights = stack.pop()
        for user in node.users:
            if user.op == "output":
                leaves.add(weights)
            elif is_product(user):
                if weights:
                    return user, leaves
            elif not opaque_target(user) and "attention" not in target_name(user):
                value = example_value(user)
                step = (user, weights or is_softmax_like(user))
                if isinstance(value, torch.Tensor) and alike(value.shape, shape):
                    if step not in seen:
                        seen.add(step)
                        stack.append(step)
    return None, leaves
