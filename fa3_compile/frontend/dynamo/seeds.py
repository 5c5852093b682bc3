"""Where attention may begin in a Dynamo graph, by names and shapes alone: what is worth tracing.

A softmax, or a call that hides one; and a product whose result leads to another product by way of
something that is done to its elements: attention without a softmax. A graph that has neither, as
of convolutions and perceptrons, costs this one look at its nodes.
"""

from __future__ import annotations

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

# Products by their names in a Dynamo graph; product.PRODUCTS are those of the shadow.
PRODUCTS = frozenset(
    """matmul bmm mm einsum baddbmm addmm addbmm tensordot __matmul__ __rmatmul__ inner""".split()
)
# Calls that leave each element as it is. x.T is a getattr, numpy_T since torch 2.15.
MOVEMENTS = frozenset(
    """view reshape transpose permute unsqueeze squeeze flatten unflatten expand expand_as
    contiguous clone to float half bfloat16 double type type_as getitem getattr t numpy_T
    matrix_H mT mH adjoint swapaxes swapdims movedim moveaxis chunk split unbind select narrow
    repeat_interleave view_as detach size""".split()
)
# Calls that leave a part of an axis.
PARTS = frozenset("getitem narrow split chunk".split())
# How far a second product is looked for: masks, decays and functions of scores are fewer calls.
FAR = 64


def seeds(graph: fx.Graph) -> list[fx.Node]:
    """The nodes from which attention is looked for, in order; none where there is none."""
    found = [node for node in graph.nodes if is_softmax_like(node)]
    products = [n for n in graph.nodes if is_product(n)]
    if len(products) > 1:
        given = activations(graph)
        found += [n for n in products if _of(n, given) and _leads_to_product(n)]
    return found


def is_product(node: fx.Node) -> bool:
    """Whether a call is a product of two tensors, of which none is a layer's parameter."""
    called = node.op in ("call_function", "call_method")
    return called and (target_name(node) in PRODUCTS or bool(node.meta.get(IS_PRODUCT)))


def _of(product: fx.Node, given: set[fx.Node]) -> bool:
    """Whether all that is multiplied comes with the data."""
    sources = product.all_input_nodes
    if target_name(product) in ("baddbmm", "addmm", "addbmm"):
        sources = sources[-2:]
    return all(source in given for source in sources)


def _leads_to_product(product: fx.Node) -> bool:
    """Whether another product contracts an axis of this one's result, or a part of one, changed in
    between."""
    lengths = _lengths(product)
    seen: set[tuple[fx.Node, bool]] = set()
    stack = [(product, False)]
    while stack and len(seen) < FAR:
        node, changed = stack.pop()
        for user in node.users:
            if is_product(user):
                if changed and _contracts(user, lengths):
                    return True
                continue
            ends = user.op not in ("call_function", "call_method") or opaque_target(user)
            if ends or is_softmax_like(user) and "exp" not in target_name(user):
                continue
            if target_name(user) in PARTS:
                lengths |= _lengths(user)
            step = (user, changed or target_name(user) not in MOVEMENTS)
            if step not in seen:
                seen.add(step)
                stack.append(step)
    return False


def _lengths(node: fx.Node) -> set[str]:
    value = example_value(node)
    return {str(n) for n in value.shape} if isinstance(value, torch.Tensor) else set()


def _contracts(product: fx.Node, lengths: set[str]) -> bool:
    """Whether the product's contracted axis has one of the lengths; an einsum's may."""
    if target_name(product) in ("einsum", "tensordot"):
        return True
    values = [example_value(x) for x in product.all_input_nodes[-2:]]
    return any(isinstance(x, torch.Tensor) and str(x.shape[-1]) in lengths for x in values)
