"""Softmaxes of scores that no product is seen in: told, not passed over."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from fa3_compile.errors import NOTHING, Decline
from fa3_compile.frontend.detect.operands import is_movement
from fa3_compile.frontend.detect.product import PRODUCTS, products_before, sides_of
from fa3_compile.frontend.detect.skeletons import products_after
from fa3_compile.frontend.dynamo.graph import example_value, opaque_target, target_name
from fa3_compile.frontend.dynamo.products import leads_to_a_product, made_of_a_product
from fa3_compile.frontend.dynamo.sizes import hint
from fa3_compile.frontend.lift.lift import ancestors, descendants, shape_of
from fa3_compile.frontend.reasons.broadcasting import DISTANCES, broadcasts, by_broadcasting
from fa3_compile.frontend.shadow.activations import comes_with_data
from fa3_compile.frontend.shadow.normalize import Softmax, softmaxes
from fa3_compile.frontend.shadow.trace import Shadow
from fa3_compile.spec.index import same

aten = torch.ops.aten
LAYERS = ("linear", "conv1d", "conv2d", "batch_norm")
WEIGH = "Write weights @ v, which needs no tensor of all queries, keys and features."
EVALUATE = "model.eval() makes it use its running statistics, which is fused."
KEEP = "Keep what lies between the two products to element-wise operations."


def opaque_scores(shadow: Shadow) -> Iterator[Decline]:
    """A `Decline` for every softmax that leads to a product with V and whose scores are made of a
    product by way of such a call, of distances by torch.cdist, or of queries and keys otherwise
    than by a product, by layers of pairs among others."""
    found = [*softmaxes(shadow)]
    # What is weighed by scores of a product: positions may be added to these (ConViT).
    attended = {
        product
        for softmax in found
        if products_before(softmax.scores)
        for product in products_after(shadow, softmax.node)
    }
    for softmax in found:
        scores = softmax.scores
        summed = _weighs_by_broadcasting(shadow, softmax)
        if summed is not None and (
            _given_product(shadow, scores) or by_broadcasting(shadow, scores)
        ):
            why = "V is weighed by a sum of element-wise products"
            yield Decline("no-product", summed, WEIGH, message=why, stage="detect")
        elif not products_before(scores) and _leads_on(shadow, softmax):
            declined = _by_a_call(shadow, scores) or by_broadcasting(shadow, scores)
            if declined is None and not products_after(shadow, softmax.node) & attended:
                declined = _by_a_layer(shadow, scores) or _of_one_tensor(shadow, softmax)
            if declined is not None:
                declined.stage = "detect"
                yield declined


def _by_a_call(shadow: Shadow, scores: fx.Node) -> Decline | None:
    for holder in _taken_as_given(shadow, scores):
        call = _call_of(holder)
        if call is None:
            continue
        if target_name(call) == "cdist":
            why = "the scores are distances, not products"
            return Decline("opaque-scores", call, DISTANCES, message=why)
        if made_of_a_product(call.all_input_nodes, scores.meta["val"].shape):
            why = f"{target_name(call)} of the scores is not element-wise"
            if target_name(call) in LAYERS[:3]:
                why += ": it mixes those of several heads or keys"
            if target_name(call) == "batch_norm":
                why += ": in training it takes its mean and variance from the scores of the batch"
                return Decline("opaque-scores", call, EVALUATE, message=why)
            return Decline("opaque-scores", call, KEEP, message=why)
    return None


def _by_a_layer(shadow: Shadow, scores: fx.Node) -> Decline | None:
    """Scores that a layer makes of something for every pair of a query and a key, as additive
    attention does (Bahdanau et al. 2015)."""
    pair = [*scores.meta["val"].shape[-2:]]
    for holder in _taken_as_given(shadow, scores):
        if target_name(holder) != "linear" or len(pair) < 2 or hint(pair[0]) == 1:
            continue
        layer_input = example_value(holder.all_input_nodes[0])
        if [*layer_input.shape[-3:-1]] == pair:
            why = "the scores are made by a layer of every query and key together, not by a product"
            return Decline("no-product", holder, NOTHING, message=why)
    return None


def _of_one_tensor(shadow: Shadow, softmax: Softmax) -> Decline | None:
    """A softmax of what a layer makes of one tensor, whose axis the next product contracts with
    what another layer makes: outlook attention (Yuan et al. 2021), linear attention by a softmax of
    the keys. Routers and poolings weigh experts and tokens as they are."""
    if len(shape_of(softmax.node)) < 3 or not _by_layers(shadow, softmax.scores):
        return None
    weights, length = descendants([softmax.node]), shape_of(softmax.node)[softmax.dim]
    for product in products_after(shadow, softmax.node):
        left, right = sides_of(product)
        for side, other, axis in ((left, right, -1), (right, left, -2)):
            contracts = side in weights and same(shape_of(side)[axis], length)
            if contracts and _by_layers(shadow, other):
                why = "the scores are made of one tensor by a layer: no query is multiplied by keys"
                holder = next(iter(shadow.dynamo_of.get(softmax.node, ())), None)
                return Decline("no-product", holder, NOTHING, message=why)
    return None


def _by_layers(shadow: Shadow, node: fx.Node) -> bool:
    """Whether a value is made of the results of layers alone."""
    given = _taken_as_given(shadow, node)
    return bool(given) and all(target_name(x) in LAYERS for x in given)


def _given_product(shadow: Shadow, scores: fx.Node) -> bool:
    """Whether scores are made of a product of two tensors that both come with the data."""
    is_given = comes_with_data(shadow)
    return any(all(map(is_given, sides_of(p))) for p in products_before(scores)[:1])


def _weighs_by_broadcasting(shadow: Shadow, softmax: Softmax) -> fx.Node | None:
    """What holds the sum over the keys of weights times V, element by element."""
    stack = [softmax.node]
    while stack:
        for user in shadow.users(stack.pop()):
            if broadcasts(user, aten.mul.Tensor):
                sums = [x for x in shadow.users(user) if x.target is aten.sum.dim_IntList]
                keys = shape_of(softmax.node)[softmax.dim]
                for x in sums:
                    if any(same(shape_of(user)[d], keys) for d in x.args[1]):
                        return next(iter(shadow.dynamo_of.get(x, ())), None)
            elif is_movement(user) or user.target is aten._to_copy.default:
                stack.append(user)
    return None


def _leads_on(shadow: Shadow, softmax: Softmax) -> bool:
    """Whether a softmax leads to a product, in the shadow or past what is not in it."""
    node = softmax.node
    shape = node.meta["val"].shape
    if any(leads_to_a_product(x, shape) for x in shadow.dynamo_of.get(node, [])[-1:]):
        return True
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
