"""Which nodes of a Dynamo graph the shadow runs, and which it takes as given."""

from __future__ import annotations

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from fa3_compile.errors import Decline
from fa3_compile.frontend.dynamo import transforms
from fa3_compile.frontend.dynamo.graph import (
    example_value,
    is_softmax_like,
    opaque_target,
    target_name,
)
from fa3_compile.frontend.dynamo.mutations import (
    is_mutation,
    mutated_nodes,
    readers_of_writes,
    writes_that_reach,
)
from fa3_compile.frontend.dynamo.seeds import seeds
from fa3_compile.frontend.expand import flex

READABLE = "Write score_mod and mask_mod with element-wise operations and reads of tensors."
REPORT = "Please report it with the log of TORCH_LOGS=+fa3_compile."


class Scope:
    """Which nodes the shadow runs, and which it takes as given."""

    def __init__(self, gm: fx.GraphModule):
        # The span of transforms that each of these nodes is in: run, or cut as a whole.
        self.batched: dict[fx.Node, transforms.Span] = {}
        self.cut: dict[fx.Node, transforms.Span] = {}
        # Calls of flex_attention that are more than their mods say, and calls that cannot be run.
        self.refused: set[fx.Node] = set()
        self.declined: list[Decline] = []
        for span in transforms.spans(gm.graph):
            if span.batches_alone and not any(map(_cannot_run, span.nodes)):
                self.batched.update(dict.fromkeys(span.nodes, span))
            else:
                self._cut(span, "only plain vmap can be read")
        for node in gm.graph.nodes:
            if flex.is_call(node) and node not in self.cut:
                try:
                    flex.check(node, gm)
                except Decline as decline:
                    self._refuse(node, decline)
        self.subclassed = {node for node in gm.graph.nodes if _touches_subclass(node)}
        softmax = transforms.softmax_of([n for n in gm.graph.nodes if n in self.subclassed])
        if softmax is not None:
            self.declined.append(
                Decline(
                    "tensor-subclass",
                    softmax,
                    "Give the attention plain tensors: of a DTensor, its to_local().",
                    message="the operators of a tensor subclass are its own",
                    stage="trace",
                )
            )

    def is_cut(self, node: fx.Node) -> bool:
        """Whether the shadow takes the node's value as given instead of running the node."""
        if node in self.batched or node in self.cut:
            return node in self.cut
        if node in self.subclassed:
            return True
        first = node.args[0] if node.args else None
        refused = node in self.refused or isinstance(first, fx.Node) and first in self.refused
        return refused or _is_cut(node)

    def cut_out(self, node: fx.Node, why: str) -> None:
        """Takes the value of what has turned out unreadable as given."""
        if node in self.batched:
            self._cut(self.batched[node], why)
        elif flex.is_call(node):
            self._refuse(node, Decline("flex-unreadable", None, READABLE, message=why))
        elif is_softmax_like(node):
            self._refuse(node, Decline("unreadable", None, REPORT, message=why))
        else:
            self.refused.add(node)

    def _cut(self, span: transforms.Span, why: str) -> None:
        for node in span.nodes:
            self.batched.pop(node, None)
            self.cut[node] = span
        softmax = transforms.softmax_of(span.nodes)
        if softmax is not None:
            self.declined.append(
                Decline(
                    "functorch",
                    softmax,
                    "Take gradients by loss.backward() or torch.autograd.grad.",
                    message=f"attention under {span.name} is left as it was: {why}",
                    stage="trace",
                )
            )

    def _refuse(self, node: fx.Node, decline: Decline) -> None:
        decline.node, decline.stage = node, "trace"
        self.refused.add(node)
        self.declined.append(decline)


def is_subclass(value: object) -> bool:
    """Whether it is a tensor of several, such as a DTensor, or holds one."""
    values = [value] if isinstance(value, torch.Tensor) else tree_leaves(value)
    return any(map(is_traceable_wrapper_subclass, values))


def _touches_subclass(node: fx.Node) -> bool:
    values = [example_value(x) for x in (node, *node.all_input_nodes)]
    return node.op != "output" and any(map(is_subclass, values))


def _cannot_run(node: fx.Node) -> bool:
    """Whether a node has no meaning for vmap."""
    return not transforms.is_transform(node) and (
        node.op == "call_module"
        or isinstance(node.target, torch._ops.HigherOrderOperator)
        or "dropout" in target_name(node)
        and _drops(node)
    )


def _drops(dropout: fx.Node) -> bool:
    """Whether a dropout may drop anything, as none does in evaluation."""
    given = {**dict(zip(("input", "p", "training"), dropout.args)), **dropout.kwargs}
    return given.get("training", True) is not False and given.get("p", 0.5) != 0


def _is_cut(node: fx.Node) -> bool:
    if node.op in ("placeholder", "get_attr"):
        return True
    if flex.is_call(node):
        return False
    if node.op == "call_module" or opaque_target(node):
        return True
    # What a cut tuple was taken apart into is cut too.
    first = node.args[0] if node.args else None
    return (
        node.op == "call_function"
        and getattr(node.target, "__name__", "") == "getitem"
        and isinstance(first, fx.Node)
        and not isinstance(example_value(first), torch.Tensor)
        and _is_cut(first)
    )


def relevant(graph: fx.Graph, scope: Scope) -> set[fx.Node]:
    """Ancestors and descendants of the seeds, up to cuts, with all mutations kept."""
    forward: set[fx.Node] = set()
    stack = [node for node in seeds(graph) if not scope.is_cut(node)]
    while stack:
        node = stack.pop()
        if node in forward or node.op == "output":
            continue
        forward.add(node)
        readers = [*node.users, *readers_of_writes(node)]
        stack.extend(user for user in readers if not scope.is_cut(user))
    keep: set[fx.Node] = set()
    stack = list(forward)
    stack += [n for n in graph.nodes if _changes_mode(n)]
    stack += [n for n in scope.batched if transforms.enters(n) or transforms.leaves(n)]
    mutations = [n for n in graph.nodes if is_mutation(n)]
    while True:
        while stack:
            node = stack.pop()
            if node in keep:
                continue
            keep.add(node)
            if scope.is_cut(node):
                stack.extend(mutated_nodes(node))
            else:
                stack.extend(flex.inputs(node) if flex.is_call(node) else node.all_input_nodes)
        stack = writes_that_reach(mutations, keep)
        if not stack:
            return keep


def _changes_mode(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return name in ("_enter_autocast", "_exit_autocast", "_set_grad_enabled")
