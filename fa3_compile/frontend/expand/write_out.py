"""A call of the Dynamo graph, replaced by the torch calls that a Python function makes for it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from fa3_compile.frontend.dynamo.graph import computing_fakes, example_value
from fa3_compile.frontend.dynamo.sizes import sym
from fa3_compile.frontend.rewrite.emit import Emitter


def is_node(x) -> bool:
    return isinstance(x, fx.Node)


def write_out(
    graph: fx.Graph, node: fx.Node, given: Mapping[str, Any], program: Callable[..., Any]
) -> list[fx.Node | None]:
    """Records what `program` does to the arguments `given` by name, before the node.

    Returns the nodes of its results, a tensor or a tuple of tensors and None; the call stays.
    """
    fakes = tree_map(lambda x: example_value(x) if is_node(x) else x, dict(given))
    tensors = [v for v in tree_leaves(list(fakes.values())) if isinstance(v, torch.Tensor)]
    nodes = {
        id(fakes[name]): x for name, x in given.items() if is_node(x) and fakes[name] is not None
    }
    fake_mode = tensors[0].fake_mode  # pyright: ignore
    with graph.inserting_before(node), computing_fakes(fake_mode):
        recorder = _Recorder(Emitter(graph, node, tensors[0]), nodes)
        with recorder:
            results = program(fakes)
        results = results if isinstance(results, tuple) else (results,)
        return [recorder.nodes[id(x)] if x is not None else None for x in results]


class _Recorder(TorchFunctionMode):
    """Writes every torch call made under it into a graph, with its fake value."""

    def __init__(self, emit: Emitter, nodes: dict[int, fx.Node]):
        super().__init__()
        self.emit, self.graph, self.nodes, self.like = emit, emit.graph, nodes, emit.before
        # Ids stay unique only while their tensors live.
        self.alive: list[Any] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        value = func(*args, **kwargs)
        if not any(isinstance(x, torch.Tensor) for x in tree_leaves(value)):
            return value
        at, named = tree_map(self._node, (list(args), kwargs))
        if getattr(torch.Tensor, func.__name__, None) is func:
            node = self.graph.call_method(func.__name__, tuple(at), named)
        else:
            node = self.graph.call_function(func, tuple(at), named)
        node.meta.update(stack_trace=self.like.meta.get("stack_trace"), example_value=value)
        self.alive.append(value)
        if isinstance(value, torch.Tensor):
            self.nodes[id(value)] = node
        else:
            for i, part in enumerate(value):
                item = self.graph.call_function(operator.getitem, (node, i))
                item.meta.update(node.meta, example_value=part)
                self.nodes[id(part)] = item
        return value

    def _node(self, x):
        if isinstance(x, torch.SymInt):
            return self.emit.size(sym(x))
        return self.nodes[id(x)] if isinstance(x, torch.Tensor) else x
