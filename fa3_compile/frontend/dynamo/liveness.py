"""What of a Dynamo graph is needed: by its outputs, by side effects, by what a region reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import fx

from fa3_compile.frontend.dynamo import transforms
from fa3_compile.frontend.dynamo.graph import (
    example_value,
    operator_name,
    target_name,
    values_read,
)
from fa3_compile.frontend.dynamo.mutations import is_mutation, writes_that_reach
from fa3_compile.frontend.expand import flex


def live_nodes(
    graph: fx.Graph,
    without: Sequence[fx.Node] = (),
    read: Sequence[fx.Node] = (),
    absorbed: Iterable[fx.Node] = (),
    by_values: bool = False,
) -> set[fx.Node]:
    """What the outputs and side effects need, if `without` read `read` instead of their inputs.

    absorbed   random nodes whose effect something else takes over
    by_values  what is asked for its shape alone is not needed
    """
    absorbed = {*absorbed}
    live: set[fx.Node] = set()
    stack = [*read]
    stack += [
        n
        for n in graph.nodes
        if n.op in ("output", "placeholder") or (_has_effect(n) and n not in absorbed)
    ]
    mutations = [n for n in graph.nodes if is_mutation(n)]
    while True:
        while stack:
            node = stack.pop()
            if node in live:
                continue
            live.add(node)
            if node not in without:
                stack.extend(values_read(node) if by_values else node.all_input_nodes)
        stack = writes_that_reach(mutations, live)
        if not stack:
            return live


def remove_dead(graph: fx.Graph, absorbed: Iterable[fx.Node] = ()) -> None:
    """Erases what nothing live reads: in-place writes to dead tensors included."""
    live = live_nodes(graph, absorbed=absorbed)
    for node in reversed(graph.nodes):
        if node not in live and node.op not in ("placeholder", "output"):
            for user in list(node.users):
                if user in live:
                    raise RuntimeError(f"{user} is live and reads dead {node}")
            graph.erase_node(node)
    transforms.remove_empty(graph)


def depends_on_values(node: fx.Node, nodes: set[fx.Node]) -> bool:
    """Whether a node's value is computed from one of the nodes, beyond their shapes."""
    seen, stack = set(), [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in nodes:
            return True
        stack.extend(values_read(current))
    return False


def _has_effect(node: fx.Node) -> bool:
    """Whether a node has to stay although nobody reads it. Unknown calls do."""
    if node.op in ("call_module",):
        return True
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return not flex.is_call(node)
    name = target_name(node)
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        known = operator_name(node.target)[0] in ("aten", "prims", "fa3")
        return not known and not node.users
    value = example_value(node)
    stateful = name.startswith(
        ("_enter", "_exit", "_set", "manual_seed", "_log", "set_", "_assert")
    )
    random = "rand" in name or name in ("dropout", "bernoulli", "normal", "multinomial", "poisson")
    if is_mutation(node):
        return False  # followed to what it writes
    return stateful or random and not _is_idle_dropout(node) or (value is None and not node.users)


def _is_idle_dropout(node: fx.Node) -> bool:
    if target_name(node) != "dropout":
        return False
    p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
    return not training or p == 0
