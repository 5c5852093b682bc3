"""Softmaxes of scores that come through a call that is not looked into: told, not passed over."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fa3_compile.errors import Decline
from fa3_compile.frontend.dynamo_graph import example_value, opaque_target, target_name
from fa3_compile.frontend.lift import ancestors
from fa3_compile.frontend.normalize import softmaxes
from fa3_compile.frontend.product import PRODUCTS, products_before
from fa3_compile.frontend.trace import Shadow

# Products by their names in a Dynamo graph.
NAMES = frozenset("matmul bmm baddbmm mm addmm einsum tensordot".split())
KEEP = "Keep what lies between the two products to element-wise operations."
DISTANCES = (
    "-|q - k|^2 is 2 * q @ k.mT - (q * q).sum(-1)[..., None] - (k * k).sum(-1)[..., None, :], "
    "which is fused."
)


def opaque_scores(shadow: Shadow) -> Iterator[Decline]:
    """A `Decline` for every softmax that leads to a product with V and whose scores are made of a
    product by way of such a call, or of distances by torch.cdist."""
    for softmax in softmaxes(shadow):
        scores = softmax.scores
        if products_before(scores) or not _leads_to_a_product(shadow, softmax.node):
            continue
        size = scores.meta["val"].numel()
        for holder in _taken_as_given(shadow, scores):
            call = _call_of(holder)
            if call is None:
                continue
            if target_name(call) == "cdist":
                why, hint = "the scores are distances, not products", DISTANCES
            elif _made_of_a_product(call, size):
                why, hint = f"{target_name(call)} of the scores is not element-wise", KEEP
            else:
                continue
            yield Decline("opaque-scores", call, hint, message=why, stage="detect")
            break


def _leads_to_a_product(shadow: Shadow, node: fx.Node) -> bool:
    stack, seen = [node], set()
    while stack:
        for user in shadow.users(stack.pop()):
            if user.target in PRODUCTS:
                return True
            if user not in seen:
                seen.add(user)
                stack.append(user)
    return False


def _taken_as_given(shadow: Shadow, node: fx.Node) -> list[fx.Node]:
    """The Dynamo nodes behind a value that the shadow did not run."""
    given = [x for x in ancestors(node) if x.op == "placeholder"]
    return [holder for x in given for holder in shadow.dynamo_of.get(x, [])[:1]]


def _call_of(holder: fx.Node) -> fx.Node | None:
    """The opaque call that a Dynamo node is, or is a part of."""
    if target_name(holder) == "getitem" and isinstance(holder.args[0], fx.Node):
        holder = holder.args[0]
    return holder if opaque_target(holder) else None


def _made_of_a_product(call: fx.Node, size) -> bool:
    """Whether tensors of this many elements lead from a product to the call."""
    stack, seen = [*call.all_input_nodes], set()
    while stack:
        node = stack.pop()
        value = example_value(node)
        if node in seen or not isinstance(value, torch.Tensor):
            continue
        if not statically_known_true(value.numel() == size):
            continue
        seen.add(node)
        if target_name(node) in NAMES:
            return True
        if not opaque_target(node):
            stack += node.all_input_nodes
    return False
