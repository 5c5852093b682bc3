"""Spans of a Dynamo graph that run under functorch's transforms: torch.vmap, torch.func.grad, ...

Inside a span values are wrapped, so that they mean nothing to a reader outside it. A span of
vmaps alone can be run by the shadow as it stands, which batches what it holds: a mask that
transformers' utilities make, or a whole attention. Any other span is left as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch._C import _functorch as functorch

from fa3_compile.frontend.dynamo.graph import example_value, is_softmax_like, target_name

# What a vmap consists of in the graph, beside the operators that it maps.
VMAP = frozenset(
    """lazy_load_decompositions _vmap_increment_nesting _vmap_decrement_nesting _add_batch_dim
    _remove_batch_dim""".split()
)


@dataclass
class Span:
    """The nodes from entering the outermost transform to leaving it, both included."""

    nodes: list[fx.Node]

    @property
    def batches_alone(self) -> bool:
        """Whether it holds nothing but vmaps and what they map."""
        return all(target_name(n) in VMAP for n in self.nodes if is_transform(n))

    @property
    def name(self) -> str:
        """The transform as its user knows it."""
        entered = {target_name(n) for n in self.nodes}
        for inner, known in (("_grad_", "torch.func.grad"), ("_jvp_", "torch.func.jvp")):
            if any(name.startswith(inner) for name in entered):
                return known
        return "torch.vmap" if self.batches_alone else "a functorch transform"


def is_transform(node: fx.Node) -> bool:
    """Whether the node belongs to functorch rather than to the program that it transforms."""
    return node.op == "call_function" and "functorch" in (
        getattr(node.target, "__module__", "") or ""
    )


def enters(node: fx.Node) -> bool:
    """Whether a transform begins here."""
    return is_transform(node) and target_name(node).endswith("_increment_nesting")


def leaves(node: fx.Node) -> bool:
    """Whether a transform ends here."""
    return is_transform(node) and target_name(node).endswith("_decrement_nesting")


def spans(graph: fx.Graph) -> list[Span]:
    """The outermost spans, in order."""
    found: list[Span] = []
    depth = 0
    for node in graph.nodes:
        bounds = is_transform(node)
        if bounds and enters(node):
            if depth == 0:
                found.append(Span([]))
            depth += 1
        if depth:
            found[-1].nodes.append(node)
        depth -= bounds and leaves(node)
    return found


def softmax_of(nodes: Sequence[fx.Node]) -> fx.Node | None:
    """A softmax among the nodes that products surround, by names; None if there is none."""
    names = [target_name(n) for n in nodes]
    products = ("matmul", "bmm", "einsum", "baddbmm", "mm")
    at = next((i for i, n in enumerate(nodes) if is_softmax_like(n)), None)
    if at is None:
        return None
    whole = "attention" in names[at]
    around = any(n in products for n in names[:at]) and any(n in products for n in names[at:])
    return nodes[at] if whole or around else None


def is_wrapped(node: fx.Node) -> bool:
    """Whether Dynamo's value of the node means something inside its span only."""
    value = example_value(node)
    return isinstance(value, torch.Tensor) and functorch.is_functorch_wrapped_tensor(value)


@contextlib.contextmanager
def nesting_restored() -> Iterator[None]:
    """Leaves every transform that was entered inside, also when what ran inside raised."""
    depth = functorch.get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        if functorch.get_dynamic_layer_stack_depth() > depth:
            functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)


def remove_empty(graph: fx.Graph) -> None:
    """Erases vmaps whose every mapped operator has gone."""
    open_: list[tuple[fx.Node, bool]] = []
    for node in list(graph.nodes):
        if enters(node):
            open_.append((node, False))
        elif leaves(node) and open_:
            begin, used = open_.pop()
            if not used and target_name(begin) == "_vmap_increment_nesting":
                graph.erase_node(node)
                graph.erase_node(begin)
            elif open_:
                open_[-1] = (open_[-1][0], True)
        elif open_ and target_name(node) != "lazy_load_decompositions":
            open_[-1] = (open_[-1][0], True)
