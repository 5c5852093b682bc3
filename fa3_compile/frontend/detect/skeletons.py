"""Where attention may be: every product that the result of a softmax leads to, and every product
of a function of another product where there is no softmax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.detect.operands import is_movement, moved
from fa3_compile.frontend.detect.plain_weights import PlainWeights
from fa3_compile.frontend.detect.product import PRODUCTS, products_before, sides_of
from fa3_compile.frontend.dynamo.mutations import is_mutation
from fa3_compile.frontend.lift.lift import descendants
from fa3_compile.frontend.shadow.normalize import Softmax, divided_late, softmaxes
from fa3_compile.frontend.shadow.trace import Shadow

aten = torch.ops.aten


# Why two products are none of attention, where no softmax says that they should be.
NO_ATTENTION = frozenset(
    """axes-unclear empty no-product operand-unclear output-unclear perceptron product-adds
    product-axes product-chain product-read-twice single-key weights-on-both-sides""".split()
)

# What the norms of layers begin with, and what no weights without a softmax are read through.
NORMS = ("aten.sum.", "aten.mean.", "aten.var")


@dataclass
class Skeleton:
    """A product with V, and the softmaxes that its weights are made of, or the weights themselves.

    nearest  whether it is the first product after one of them; only then is it worth saying why
             it is no attention
    plain    its weights without a softmax, where what looked like one written by hand is none
    added    weights without a softmax that the softmaxes are added to
    """

    softmaxes: list[Softmax]
    values: fx.Node
    output: fx.Node
    nearest: bool
    plain: list[Softmax] = field(default_factory=list)
    added: list[Softmax] = field(default_factory=list)
    # Where V is in parts: the sum of its products with them, and these, of which `values` is one.
    total: fx.Node | None = None
    parts: list[fx.Node] = field(default_factory=list)

    @property
    def may_join(self) -> bool:
        """Whether there is more than one product that scores may be a sum of."""
        softmaxes = (*self.softmaxes, *self.plain)
        return len({p for x in softmaxes for p in products_before(x.scores)}) > 1

    def worth_saying(self, decline: Decline) -> bool:
        """Whether a reader who looks for attention wants to know why this is none."""
        normed = decline.code == "not-pointwise" and decline.message.startswith(NORMS)
        none = decline.code in NO_ATTENTION or normed
        return self.nearest and (self.softmaxes[0].normalizes or not none)

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
        products = sorted(products_after(shadow, softmax.node), key=order.__getitem__)
        nearest |= {*products[:1]}
        for product in products:
            reached.setdefault(product, []).append(softmax)
    found = [(product, product, reached[product], product in nearest) for product in reached]
    for softmax in divided_late(shadow):
        product = _product_divided(softmax)
        if product is not None and softmax.division:
            found.append((product, softmax.division.node, [softmax], True))
    finder = PlainWeights(shadow, {product for product, *_ in found})
    for total, parts in sums_of_products(shadow, reached):
        output = _output_node(shadow, total)
        if output is not None:
            yield Skeleton(reached[parts[0]], parts[0], output, False, total=total, parts=parts)
    certain = {product for product, _, of, _ in found if not all(x.by_hand for x in of)}
    plain = {p: w for p in order if p not in certain and (w := finder.of(p))}
    # Scores of a softmax made of a product (factors of Q or K) are no attention to be told of.
    normalized = [x for of in reached.values() for x in of if x.normalizes]
    scored = {p for softmax in normalized for p in products_before(softmax.scores)}
    found += [(p, p, plain.pop(p), p not in scored) for p in [*plain] if p not in finder.taken]
    for product, last, of, is_nearest in sorted(found, key=lambda x: order[x[0]]):
        output = _output_node(shadow, last)
        if output is None and is_nearest:
            # No node holds the product, which is then declined, in the softmax's name.
            softmax = of[-1].node
            output = next(iter(shadow.dynamo_of.get(softmax, ())), shadow.within.get(softmax))
        if output is not None:
            weights = plain.get(product, []) if last is product else []
            beside = finder.added_to(of, product) if of[0].normalizes and last is product else []
            yield Skeleton(of, product, output, is_nearest, weights, beside)


def sums_of_products(
    shadow: Shadow, reached: dict[fx.Node, list[Softmax]]
) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """(sum, products): what adds up products of one softmax and nothing else, largest first."""
    taken: set[fx.Node] = set()
    for node in reversed([*shadow.graph.nodes]):
        if _is_sum(node) and node not in taken:
            sums, found = _sums_and_addends(node, {*reached})
            if len(found) > 1 and all(reached[x] == reached[found[0]] for x in found):
                if len(reached[found[0]]) == 1 and len({*found}) == len(found):
                    taken |= sums
                    yield node, found


def added(node: fx.Node) -> list[fx.Node]:
    """What a sum adds."""
    return [x for x in node.args if isinstance(x, fx.Node)]


def _is_sum(node: fx.Node) -> bool:
    """Whether it adds tensors alone, and the 0 that Python's `sum` begins with."""
    plain = node.target is aten.add.Tensor and not node.kwargs
    return plain and all(isinstance(x, fx.Node) or x == 0 for x in node.args)


def _sums_and_addends(node: fx.Node, among: set[fx.Node]) -> tuple[set[fx.Node], list[fx.Node]]:
    """(the sums in a sum, what they add), moved elements followed back; nothing if it adds
    something else than those."""
    sums: set[fx.Node] = set()
    found: list[fx.Node] = []
    stack = [node]
    while stack:
        current = stack.pop()
        if _is_sum(current):
            sums.add(current)
            stack += added(current)
        elif is_movement(current):
            stack.append(moved(current))
        elif current in among:
            found.insert(0, current)
        else:
            return set(), []
    return sums, found


def _product_divided(softmax: Softmax) -> fx.Node | None:
    """The product of exponentials of scores with V that is divided by their sum."""
    assert softmax.division is not None
    node = softmax.division.top
    while is_movement(node):
        node = moved(node)
    if node.target not in PRODUCTS or not products_before(softmax.scores):
        return None
    reached = descendants([softmax.node])
    return node if any(side in reached for side in sides_of(node)) else None


def products_after(shadow: Shadow, node: fx.Node) -> set[fx.Node]:
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
