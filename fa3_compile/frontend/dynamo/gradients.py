"""Where a program stops gradients: `detach()`, and results that leave a `no_grad` region.

A fused attention has the gradient of its whole expression. What the program holds constant has to
be read as a constant, so the shadow puts an operator there that no element rule looks through.
"""

from __future__ import annotations

import torch
from torch import fx

from fa3_compile.frontend.dynamo.graph import example_value, target_name, unwrapped, values_read


def stops(graph: fx.Graph) -> set[fx.Node]:
    """The nodes past which no gradient flows, although their inputs have one."""
    enabled = torch.is_grad_enabled()
    sections: dict[fx.Node, int] = {}
    modes: dict[fx.Node, bool] = {}
    section = 0
    for node in graph.nodes:
        if target_name(node) == "_set_grad_enabled":
            enabled = bool(node.args[0])
            section += 1
        sections[node], modes[node] = section, enabled
    found: set[fx.Node] = set()
    for node in graph.nodes:
        used_with = any(modes[u] and sections[u] != sections[node] for u in node.users)
        if (modes[node] or used_with) and _cuts_gradient(node, found):
            found.add(node)
    return found


def _cuts_gradient(node: fx.Node, before: set[fx.Node]) -> bool:
    """`before` are the nodes ahead of it that do."""
    value = example_value(node)
    if node.op not in ("call_function", "call_method") or not _is_float(value):
        return False
    if has_gradient(node):
        return False
    sources = [s for s in values_read(node) if _is_float(example_value(s))]
    return any(_had_gradient(s, before) for s in sources)


def _had_gradient(node: fx.Node, stopped: set[fx.Node]) -> bool:
    """Whether a value has a gradient, or would have one outside `no_grad`."""
    seen, stack = {*stopped}, [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if _is_float(example_value(current)) and has_gradient(current):
            return True
        if target_name(current) != "detach":
            stack.extend(s for s in values_read(current) if len(seen) < 64 + len(stopped))
    return False


def has_gradient(node: fx.Node) -> bool:
    """Whether the caller's gradient flows; what transforms differentiate is theirs alone.

    A view that is taken under `no_grad` says that it requires one, but nothing leads back from it.
    """
    value = unwrapped(example_value(node))
    if not value.requires_grad or node.op in ("placeholder", "get_attr"):
        return value.requires_grad
    base = value._base
    return value.grad_fn is not None or base is None or not base.requires_grad


def learned_inputs(node: fx.Node) -> set[fx.Node]:
    """The graph's inputs that a node's gradient flows to, be it one of zeros."""
    found: set[fx.Node] = set()
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        if current.op in ("placeholder", "get_attr"):
            found.add(current)
        sources = [x for x in current.all_input_nodes if x not in seen]
        stack += (x for x in sources if _is_float(example_value(x)) and has_gradient(x))
        seen.update(sources)
    return found


def _is_float(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
