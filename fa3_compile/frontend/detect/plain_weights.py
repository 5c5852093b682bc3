"""Products whose weights may be without a softmax: a function of another product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from fa3_compile.frontend.detect.operands import is_movement, moved
from fa3_compile.frontend.detect.product import PRODUCTS, products_before, sides_of
from fa3_compile.frontend.lift.lift import descendants, shape_of
from fa3_compile.frontend.shadow.activations import comes_with_data
from fa3_compile.frontend.shadow.normalize import Softmax, unnormalised
from fa3_compile.frontend.shadow.operators import DROPOUT
from fa3_compile.frontend.shadow.trace import SIZES, Shadow

aten = torch.ops.aten
ADDING_UP = (aten.add.Tensor, aten.sub.Tensor)
# What a sum of weights may still meet on its way to V.
CARRYING = (
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.where.self,
    aten._to_copy.default,
    DROPOUT,
)


class PlainWeights:
    """Finds them in one shadow. A product of `taken` gives the output of another attention, and
    is none of queries and keys."""

    def __init__(self, shadow: Shadow, taken: set[fx.Node]):
        self.shadow, self.taken = shadow, taken
        self._comes_with_data = comes_with_data(shadow)

    def of(self, product: fx.Node) -> list[Softmax]:
        """The sides of a product that may be such weights, with all that is multiplied coming
        with the data: f(x A) B with A or B of the model is a layer."""
        if product.target not in PRODUCTS:
            return []
        left, right = sides_of(product)
        sides = [s for s, axis in ((left, -1), (right, -2)) if self._weighs(s, axis)]
        before = [x for side in sides for p in products_before(side)[:1] for x in sides_of(p)]
        if not sides or not all(map(self._comes_with_data, (left, right, *before))):
            return []
        return [weights for side in sides for weights in unnormalised(_unmoved(side))]

    def added_to(self, softmaxes: Sequence[Softmax], product: fx.Node) -> list[Softmax]:
        """What is added to the softmaxes on a side of a product, and is a function of a product
        as well: a * softmax(x) + b * relu(x)."""
        reached = descendants(s.node for s in softmaxes)
        found, stack = [], [side for side in sides_of(product) if side in reached]
        while stack:
            node = stack.pop()
            addends = [x for x in node.args[:2] if isinstance(x, fx.Node)]
            if is_movement(node) or node.target in CARRYING:
                stack += [x for x in node.all_input_nodes if x in reached]
            elif node.target in ADDING_UP and len(addends) == 2:
                stack += [x for x in addends if x in reached]
                rest = [_unmoved(x) for x in addends if x not in reached]
                found += [x for x in rest if x.target not in PRODUCTS and products_before(x)]
        return [weights for node in found for weights in unnormalised(node)[:1]]

    def _weighs(self, side: fx.Node, axis: int) -> bool:
        """Whether a side, contracted along `axis`, is a changed product of queries and keys."""
        if _unmoved(side).target in PRODUCTS:
            return False
        lengths = _before_slices(side, shape_of(side)[axis])
        found = products_before(side)
        return any(x not in self.taken and lengths & {*shape_of(x)[-2:]} for x in found)


def _before_slices(side: fx.Node, keys: int) -> set[int]:
    """So many keys, or of how many they are a slice, on the way from a product to `side`."""
    lengths, seen, stack = {keys}, set(), [side]
    while stack:
        node = stack.pop()
        if node in seen or node.target in (*PRODUCTS, *SIZES):
            continue
        seen.add(node)
        stack += node.all_input_nodes
        if node.target is aten.slice.Tensor:
            before, left = shape_of(moved(node)), shape_of(node)
            lengths |= {b for b, a in zip(before, left, strict=True) if a in lengths}
    return lengths


def _unmoved(side: fx.Node) -> fx.Node:
    """A side of a product before its elements were moved or cast."""
    while is_movement(side) or side.target is aten._to_copy.default:
        side = moved(side) if is_movement(side) else side.args[0]  # pyright: ignore
    return side
