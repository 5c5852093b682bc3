"""Where attention may be: every product that the result of a softmax leads to, and every product
of a function of another product where there is no softmax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.activations import activations
from fa3_compile.frontend.lift import descendants, shape_of
from fa3_compile.frontend.mutations import is_mutation
from fa3_compile.frontend.normalize import Softmax, divided_late, softmaxes, unnormalised
from fa3_compile.frontend.operands import is_movement
from fa3_compile.frontend.product import PRODUCTS, products_before, sides_of
from fa3_compile.frontend.trace import Shadow

aten = torch.ops.aten


@dataclass
class Skeleton:
    """A product with V, and the softmaxes that its weights are made of.

    nearest  whether it is the first product after one of them; only then is it worth saying why
             it is no attention
    """

    softmaxes: list[Softmax]
    values: fx.Node
    output: fx.Node
    nearest: bool

    def worth_saying(self, decline: Decline) -> bool:
        """Whether a reader who looks for attention wants to know why this is none."""
        attends = self.softmaxes[0].normalizes or decline.code not in NO_ATTENTION
        return self.nearest and attends

    def softmax_holder(self, shadow: Shadow) -> fx.Node:
        """The Dynamo node of the softmax, the line that its reader would call the attention."""
        softmax = self.softmaxes[-1].node
        holders = shadow.dynamo_of.get(softmax)
        return holders[0] if holders else shadow.within.get(softmax, self.output)


def skeletons(shadow: Shadow) -> Iterator[Skeleton]:
    """Every product that may be one with V, in the order of the graph."""
    order = {n: i for i, n in enumerate(shadow.graph.nodes)}
    reached: dict[fx.Node, list[Softmax]] = {}
    nearest: set[fx.Node] = set()
    for softmax in softmaxes(shadow):
        # Without a product before it (a router) a softmax is no attention at all.
        if not products_before(softmax.scores):
            continue
        products = sorted(_products_after(shadow, softmax.node), key=order.__getitem__)
        nearest |= {*products[:1]}
        for product in products:
            reached.setdefault(product, []).append(softmax)
    found = [(product, product, reached[product], product in nearest) for product in reached]
    for softmax in divided_late(shadow):
        product = _product_divided(softmax)
        if product is not None and softmax.division:
            found.append((product, softmax.division.node, [softmax], True))
    found += _unnormalised(shadow, {product for product, *_ in found})
    for product, last, of, is_nearest in sorted(found, key=lambda x: order[x[0]]):
        output = _output_node(shadow, last)
        if output is not None:
            yield Skeleton(of, product, output, is_nearest)


# Why two products are none of attention, where no softmax says that they should be.
NO_ATTENTION = frozenset(
    """axes-unclear empty no-product operand-unclear output-unclear perceptron product-adds
    product-axes product-chain product-read-twice single-key weights-on-both-sides""".split()
)


def _unnormalised(
    shadow: Shadow, taken: set[fx.Node]
) -> Iterator[tuple[fx.Node, fx.Node, list[Softmax], bool]]:
    """Every product of something computed from another product, both of what comes with the data,
    in the form of `skeletons`. The products in `taken` are other attentions' with V."""
    given: set[fx.Node] | None = None
    for product in shadow.graph.nodes:
        if product.target not in PRODUCTS or product in taken:
            continue
        sides = [s for s in sides_of(product) if _weighs(s, s is sides_of(product)[1], taken)]
        if not sides:
            continue
        if given is None:
            [graph] = {node.graph for node in shadow.aten_of}
            given = activations(graph)
        before = [s for side in sides for p in products_before(side)[:1] for s in sides_of(p)]
        if all(_comes_with_data(shadow, x, given) for x in (*sides_of(product), *before)):
            weights = [w for side in sides for w in unnormalised(_unmoved(side))]
            yield product, product, weights, True


def _weighs(side: fx.Node, right: bool, taken: set[fx.Node]) -> bool:
    """Whether a side of a product may be weights: a product of queries and keys, changed."""
    if _unmoved(side).target in PRODUCTS:
        return False
    keys = shape_of(side)[-2 if right else -1]
    found = products_before(side)
    return any(x not in taken and keys in shape_of(x)[-2:] for x in found)


def _unmoved(side: fx.Node) -> fx.Node:
    """A side of a product before its elements were moved or cast."""
    while is_movement(side) or side.target is aten._to_copy.default:
        side = side.args[0]  # pyright: ignore[reportAssignmentType]
    return side


def _comes_with_data(shadow: Shadow, node: fx.Node, given: set[fx.Node]) -> bool:
    """Whether a value depends on an activation; a cache that is written in the graph does."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder" and any(x in given for x in shadow.dynamo_of[current]):
            return True
        stack.extend(current.all_input_nodes)
    return False


def _product_divided(softmax: Softmax) -> fx.Node | None:
    """The product of exponentials of scores with V that is divided by their sum."""
    assert softmax.division is not None
    node = softmax.division.top
    while is_movement(node):
        node = node.args[0]
    if node.target not in PRODUCTS or not products_before(softmax.scores):
        return None
    reached = descendants([softmax.node])
    return node if any(side in reached for side in sides_of(node)) else None


def _products_after(shadow: Shadow, node: fx.Node) -> set[fx.Node]:
    """The products that the node's value reaches, not looking behind them."""
    found, stack, seen = set(), [node], set()
    while stack:
        for user in shadow.users(stack.pop()):
            if user in seen or user.op != "call_function":
                continue
            seen.add(user)
            if user.target in PRODUCTS:
                found.add(user)
            else:
                stack.append(user)
    return found


def _output_node(shadow: Shadow, result: fx.Node) -> fx.Node | None:
    """The last Dynamo node that is still only the result's elements moved."""
    current, chosen = result, None
    while True:
        holders = shadow.dynamo_of.get(current, [])
        if holders:
            chosen = holders[-1]
        followers = shadow.users(current)
        outside = {u for h in holders for u in h.users} - set(holders)
        if len(followers) != 1:
            return chosen
        following = followers[0]
        if not is_movement(following) or following.target is aten.expand.default:
            return chosen
        if following.target in (aten.slice.Tensor, aten.select.int):
            return chosen
        ahead = set(_dynamo_ahead(shadow, following))
        if holders and (not outside <= ahead or any(is_mutation(u) for u in outside)):
            return chosen
        current = following


def _dynamo_ahead(shadow: Shadow, node: fx.Node) -> list[fx.Node]:
    """The first Dynamo nodes that hold what a chain of movements leads to."""
    while True:
        holders = shadow.dynamo_of.get(node)
        if holders:
            return holders
        followers = shadow.users(node)
        if len(followers) != 1 or not is_movement(followers[0]):
            return []
        node = followers[0]
