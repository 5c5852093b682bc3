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
NUMBER = (
    "Give a product Python numbers: alpha=1 / math.sqrt(head_dim), not a tensor, whose value would "
    "have to be known. Or set torch._dynamo.config.capture_scalar_outputs = True."
)
RESUMED = re.compile(r", in torch_dynamo_resume_in_")
STACK = re.compile(r"stack\d")


@dataclass(frozen=True)
class Left:
    """Scores, or weights made of them by a softmax, that left a graph at a break."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    weights: bool
    place: str


@dataclass(frozen=True)
class Broken:
    """A graph that ended at a break: which tensors of data left it."""

    kinds: frozenset[tuple[tuple[int, ...], torch.dtype]]
    place: str


# The newest last; those of a graph are met by the one that is compiled after it.
_left: collections.deque[Left] = collections.deque(maxlen=32)
_broken: collections.deque[Broken] = collections.deque(maxlen=4)


def broken_attention(gm: fx.GraphModule) -> Iterator[Decline]:
    """A `Decline` for every product with V whose weights, or their scores, are of the graph before
    a break or made by the call that breaks it; and remembers what leaves this graph at one."""
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
    if resumed:
        yield from _between_graphs(gm.graph, {node for node, _ in arrived}, given)
    if place is None:
        return
    leaving = [n for n in gm.graph.output_node().all_input_nodes if n in given and _is_tensor(n)]
    _broken.append(Broken(frozenset(map(_kind, leaving)), place))
    for node in gm.graph.nodes:
        if is_product(node) and given.issuperset(node.all_input_nodes):
            product, leaves = _followed(node, False)
            if product is None:
                _left.extend(Left(*_kind(node), weights, place) for weights in leaves)


def _between_graphs(
    graph: fx.Graph, arrived: set[fx.Node], given: set[fx.Node]
) -> Iterator[Decline]:
    """A `Decline` for every attention whose scores enter this graph and left none: the call that
    breaks the graph is the product of queries and keys."""
    for node in graph.nodes:
        # The result of that call is on the interpreter's stack, and has Dynamo's name for it.
        made = node.op == "placeholder" and STACK.search(node.name)
        if not made or node not in given or node in arrived or not _is_tensor(node):
            continue
        places = (x.place for x in reversed(_broken) if _has_product(x, *_kind(node)))
        place = next(places, None)
        product = _followed(node, False)[0] if place is not None else None
        if product is not None:
            why = "the graph breaks at the product of queries and keys"
            why += f", at {place}" if place else ""
            yield Decline("graph-break", product, NUMBER, message=why, stage="detect")


def _has_product(broken: Broken, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether queries and keys left a graph whose product has this shape."""
    if len(shape) < 2:
        return False
    *batch, rows, columns = shape
    widths = [x[-1] for x, of in broken.kinds if of == dtype and [*x[:-1]] == [*batch, rows]]
    keys = [(*batch, *pair) for n in widths for pair in ((columns, n), (n, columns))]
    return any((x, dtype) in broken.kinds for x in keys)


def _break_behind(gm: fx.GraphModule) -> str | None:
    """Where the user's code breaks the graph; None where it ends otherwise."""
    ended = getattr(gm, "compile_subgraph_reason", None)
    if ended is None or not ended.graph_break:
        return None
    return of_frame(ended.user_stack[-1]) if ended.user_stack else ""


def _arrived(graph: fx.Graph) -> Iterator[tuple[fx.Node, Left]]:
    """The inputs that may be what left another graph."""
    for node in graph.nodes:
        if node.op != "placeholder" or not _is_tensor(node):
            continue
        known = (x for x in reversed(_left) if (x.shape, x.dtype) == _kind(node))
        if (left := next(known, None)) is not None:
            yield node, left


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(example_value(node), torch.Tensor)


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
