"""Weights that go through a call on their way to V: told, not passed over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.detect.product import products_before
from fa3_compile.frontend.detect.skeletons import products_after
from fa3_compile.frontend.dynamo.graph import opaque_target, target_name
from fa3_compile.frontend.dynamo.products import ways_to_a_product
from fa3_compile.frontend.shadow.normalize import softmaxes
from fa3_compile.frontend.shadow.trace import Shadow

EVALUATE = "In training batch_norm takes statistics of all weights; after model.eval() it is fused."
FACTORS = (
    "Between the softmax and V only factors may stand: weigh V by each head's own weights, and mix "
    "what comes out of it."
)


def opaque_weights(shadow: Shadow) -> Iterator[Decline]:
    """A `Decline` for every softmax of scores that meets V only by way of a call that the shadow
    does not run: talking heads as a layer or a convolution, a norm of the weights."""
    for softmax in softmaxes(shadow):
        if not products_before(softmax.scores) or products_after(shadow, softmax.node):
            continue
        holders = shadow.dynamo_of.get(softmax.node, [])
        shape = softmax.node.meta["val"].shape
        for call in _calls_before_a_product(holders[-1:], shape):
            why = f"{target_name(call)} of the weights is no factor on each of them"
            hint = EVALUATE if target_name(call) == "batch_norm" else FACTORS
            yield Decline("opaque-weights", call, hint, message=why, stage="detect")
            break


def _calls_before_a_product(nodes: Sequence[fx.Node], shape: Sequence) -> Iterator[fx.Node]:
    """The calls not looked into by way of which values of this shape lead to a product."""
    for way in ways_to_a_product(nodes, shape, None):
        yield from (x for x in way if opaque_target(x))
