"""Attention whose softmax is in the body of a call and one of its products outside, or whose
weights an autograd function makes otherwise: told, not passed over.

Bodies of checkpoints, torch.cond, scans and autograd functions are graphs of their own, and each is
rewritten for itself. An attention that is in one of them as a whole is found there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from fa3_compile.errors import Decline
from fa3_compile.frontend.dynamo.activations import activations
from fa3_compile.frontend.dynamo.graph import example_value, is_softmax_like, target_name
from fa3_compile.frontend.dynamo.products import leads_to_a_product, made_of_a_product
from fa3_compile.frontend.expand import flex

HINT = "Put the softmax and both of its products into the call, or none of them."


def split_attention(gm: fx.GraphModule) -> Iterator[Decline]:
    """A `Decline` for every call that holds the softmax of scores, and not both products."""
    for call in gm.graph.nodes:
        if not isinstance(call.target, torch._ops.HigherOrderOperator) or flex.is_call(call):
            continue
        for body in _bodies(gm, call):
            if any(_is_split(call, softmax) for softmax in _softmaxes(body)):
                why = f"the softmax of the scores is in the body of {target_name(call)}"
                yield Decline(
                    "split-attention", call, HINT, message=f"{why}, V is not", stage="detect"
                )
                break
        else:
            if "autograd_function_apply" in str(call.target) and _normalises(call):
                yield Decline(
                    "opaque-weights",
                    call,
                    "Write the function in PyTorch, without its own backward.",
                    message="the weights are made of the scores by an autograd function without a "
                    "softmax",
                    stage="detect",
                )


def _normalises(call: fx.Node) -> bool:
    """Whether a call makes weights of V of scores, products of what comes with the data."""
    value = example_value(call)
    made = [x for x in tree_leaves(value) if isinstance(x, torch.Tensor) and x.dim() > 2]
    given = activations(call.graph)
    return any(
        made_of_a_product(call.all_input_nodes, x.shape, given)
        and leads_to_a_product(call, x.shape, given)
        for x in made[:1]
    )


def _bodies(gm: fx.GraphModule, call: fx.Node) -> list[fx.GraphModule]:
    """The graphs that a call runs forward."""
    given = [n for n in call.args if isinstance(n, fx.Node) and n.op == "get_attr"]
    found = [getattr(gm, str(n.target), None) for n in given]
    bodies = [x for x in found if isinstance(x, fx.GraphModule)]
    return bodies[:1] if "autograd_function_apply" in str(call.target) else bodies


def _softmaxes(body: fx.GraphModule) -> list[fx.Node]:
    named = [n for n in body.graph.nodes if is_softmax_like(n) and "attention" not in str(n.target)]
    return [n for n in named if isinstance(example_value(n), torch.Tensor)]


def _is_split(call: fx.Node, softmax: fx.Node) -> bool:
    shape = example_value(softmax).shape
    before = made_of_a_product(softmax.all_input_nodes, shape)
    after = leads_to_a_product(softmax, shape)
    if before and after:
        return False
    before = before or made_of_a_product(call.all_input_nodes, shape)
    return before and (after or leads_to_a_product(call, shape))
