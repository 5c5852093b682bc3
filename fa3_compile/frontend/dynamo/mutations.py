"""Which calls of a Dynamo graph write to memory that was there before, and to whose.

What an operator's schema says is taken first; then the `out` and `inplace` of Python functions;
then PyTorch's naming: a method or function that ends in one underscore writes to its first
argument.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from fa3_compile.frontend.dynamo.graph import flat_nodes, name_of, storage_of, target_name

INPLACE_OPERATORS = frozenset(
    {
        operator.iadd,
        operator.isub,
        operator.imul,
        operator.itruediv,
        operator.ifloordiv,
        operator.imod,
        operator.iand,
        operator.ior,
        operator.ixor,
        operator.ipow,
        operator.imatmul,
        operator.ilshift,
        operator.irshift,
        operator.setitem,
        operator.delitem,
    }
)
INPLACE_METHODS = frozenset(f"__{function.__name__}__" for function in INPLACE_OPERATORS)


def is_mutation(node: fx.Node) -> bool:
    """Whether the call may write to one of its tensor arguments."""
    return bool(mutated_nodes(node))


def mutated_nodes(node: fx.Node) -> list[fx.Node]:
    """The arguments that a call writes to."""
    if node.op == "call_method":
        written = _is_inplace_name(str(node.target)) or node.target in INPLACE_METHODS
        return flat_nodes(node.args[0]) if written else []
    if node.op != "call_function":
        return []
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return _written_by_bodies(node)
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return _written_by_schema(node) if _may_write(node.target) else []
    if not (_may_write(node.target) or "out" in node.kwargs or "inplace" in node.kwargs):
        return []
    parameters = _parameters(node.target)
    given = {**dict(zip(parameters, node.args)), **node.kwargs}
    if given.get("out") is not None:
        return flat_nodes(given["out"])
    in_place = node.target in INPLACE_OPERATORS or _is_inplace_name(target_name(node))
    if in_place or given.get("inplace"):
        return flat_nodes(
            node.args[0] if node.args else given.get(parameters[0] if parameters else "self")
        )
    return []


def writes_that_reach(mutations: Iterable[fx.Node], nodes: set[fx.Node]) -> list[fx.Node]:
    """Those of the writes, not among `nodes`, that may reach one through a view of its memory."""
    # None is memory that nothing is known of.
    storages = {storage_of(n) for n in nodes} | {None}
    return [
        x
        for x in mutations
        if x not in nodes and any(n in nodes or storage_of(n) in storages for n in mutated_nodes(x))
    ]


def readers_of_writes(node: fx.Node) -> list[fx.Node]:
    """What comes after a call and uses memory that it writes to, through whatever view."""
    written = mutated_nodes(node)
    if not written:
        return []
    storages = {storage_of(x) for x in written} - {None}
    found, later = [], node.next
    while later.op != "root":
        if any(x in written or storage_of(x) in storages for x in later.all_input_nodes):
            found.append(later)
        later = later.next
    return found


def overwrite(source: fx.Node, since: fx.Node, until: fx.Node) -> fx.Node | None:
    """The first write to the memory of `source` after `since` and before `until`, if there is one.

    All three are nodes of one graph.
    """
    storage = storage_of(source)
    node = since.next
    while node is not until and node.op != "root":
        for written in mutated_nodes(node):
            if written is source or (storage is not None and storage_of(written) == storage):
                return node
        node = node.next
    return None


def written_later(nodes: Iterable[fx.Node], since: fx.Node) -> set[fx.Node]:
    """Those of `nodes` whose memory a call after `since` writes to."""
    written: set[fx.Node] = set()
    node = since.next
    while node.op != "root":
        written.update(mutated_nodes(node))
        node = node.next
    storages = {storage_of(x) for x in written} - {None}
    return {x for x in nodes if x in written or storage_of(x) in storages}


def _is_inplace_name(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


@functools.cache
def _may_write(target: Any) -> bool:
    """Whether any call of a function or operator writes, but for those that are asked to by name.
    Asked of every node of a graph, for every attention in it."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        overloads = [target] if isinstance(target, torch._ops.OpOverload) else _overloads(target)
        written = (a.alias_info for x in overloads for a in x._schema.arguments)
        return any(x is not None and x.is_write for x in written)
    by_name = target in INPLACE_OPERATORS or _is_inplace_name(name_of(target))
    return by_name or not {"out", "inplace"}.isdisjoint(_parameters(target))


def _written_by_schema(node: fx.Node) -> list[fx.Node]:
    """What any overload of an operator writes to."""
    target: Any = node.target
    overloads = [target] if isinstance(target, torch._ops.OpOverload) else _overloads(target)
    written: dict[fx.Node, None] = {}
    for overload in overloads:
        for i, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
                if not argument.kwarg_only or argument.name in node.kwargs:
                    written.update(dict.fromkeys(flat_nodes(value)))
    return [*written]


def _overloads(packet: torch._ops.OpOverloadPacket) -> list[torch._ops.OpOverload]:
    return [getattr(packet, name) for name in packet.overloads()]


def _written_by_bodies(node: fx.Node) -> list[fx.Node]:
    """What the graphs that a higher-order operator runs write to, of what they are given."""
    if "triton_kernel_wrapper_mutation" in str(node.target):
        return node.all_input_nodes
    owner = node.graph.owning_module
    bodies = [n for n in node.args if isinstance(n, fx.Node) and n.op == "get_attr"]
    if "autograd_function_apply" in str(node.target):
        bodies = bodies[:1]  # the second is the backward
    given = [n for n in node.all_input_nodes if n.op != "get_attr" or n not in bodies]
    storages: set[int | None] = set()
    for body in bodies:
        module = getattr(owner, str(body.target), None)
        if isinstance(module, fx.GraphModule):
            own = {storage_of(n) for n in module.graph.find_nodes(op="placeholder")} - {None}
            storages |= own & {storage_of(w) for n in module.graph.nodes for w in mutated_nodes(n)}
    if not storages:
        return []
    # A body that several calls share has the memory of the first.
    return [n for n in given if storage_of(n) in storages] or given


@functools.cache
def _parameters(function) -> tuple[str, ...]:
    """The names of a Python function's parameters; builtins take `out` by name only."""
    if not inspect.isfunction(function):
        return ()
    return tuple(inspect.signature(function).parameters)
