"""`F.linear` of two activations, which is a product of queries and keys, or of weights and V.

Nearly every other call of it is a layer, which the shadow takes as given. What tells them apart is
that the second factor is computed from the data, and that a softmax stands before or behind: a
layer whose weights a network makes has none of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import fx

from fa3_compile.frontend.dynamo.activations import activations
from fa3_compile.frontend.dynamo.graph import (
    IS_PRODUCT,
    example_value,
    is_softmax_like,
    opaque_target,
    target_name,
)
from fa3_compile.frontend.dynamo.seeds import FAR, MOVEMENTS, is_product

NAMES = ("input", "weight")


def mark_products(graph: fx.Graph) -> None:
    """Says of the calls that are such products that they are."""
    if not any(map(is_softmax_like, graph.nodes)):
        return
    given: set[fx.Node] | None = None
    for call in graph.nodes:
        if call.op != "call_function" or target_name(call) != "linear":
            continue
        given = activations(graph) if given is None else given
        rows, weight = (*call.args, *(call.kwargs[x] for x in NAMES[len(call.args) :]))[:2]
        if weight not in given or not (_is_computed(weight) or _has_parameters(graph, given)):
            continue
        if _meets(call, call, _readers) or _meets(call, rows, _sources):
            call.meta[IS_PRODUCT] = True


def _has_parameters(graph: fx.Graph, given: set[fx.Node]) -> bool:
    """Whether a model has parameters of its own, so that what it is given is data."""
    inputs = (n for n in graph.nodes if n.op == "placeholder" and n not in given)
    return any(isinstance(example_value(n), torch.nn.Parameter) for n in inputs)


def _is_computed(node: fx.Node) -> bool:
    """Whether a value is made in the graph, and is not an input of it as it was given: as the
    second factor of F.linear that may be the weights of a layer, which a function is called with.
    """
    while target_name(node) in MOVEMENTS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.op in ("call_function", "call_method")


def _readers(node: fx.Node) -> Iterable[fx.Node]:
    return node.users


def _sources(node: fx.Node) -> Iterable[fx.Node]:
    return node.all_input_nodes


def _meets(
    call: fx.Node, scores: fx.Node, following: Callable[[fx.Node], Iterable[fx.Node]]
) -> bool:
    """Whether a softmax over the last axis of `scores` is met from a call, and no product or layer
    in between. Heads that a layer mixes are another axis."""
    seen, stack = {call}, [call]
    while stack and len(seen) < FAR:
        for node in following(stack.pop()):
            if is_softmax_like(node) and _keys(node) == _keys(scores) is not None:
                return True
            if node not in seen and not is_product(node) and not opaque_target(node):
                seen.add(node)
                stack.append(node)
    return False


def _keys(node: fx.Node) -> str | None:
    """The length of a value's last axis."""
    value = example_value(node)
    return str(value.shape[-1]) if isinstance(value, torch.Tensor) and value.dim() else None
