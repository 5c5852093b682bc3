"""Keys that are selected by their scores: the largest few, the k-th, the best."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.dynamo.graph import target_name

SELECTING = frozenset("argmax argmin argsort kthvalue median msort quantile sort topk".split())
HINT = (
    "A kernel sees the keys of a row block by block: select them before the attention, by a "
    "cheaper score or by blocks, and give the selection as a mask, which is fused."
)
LARGEST = (torch.ops.aten.max.dim, torch.ops.aten.argmax.default)
ONE_HOT = "Take V at the largest score, scores.argmax(-1), which needs no product with the weights."
# How far a selection is looked for behind what is made of it: an index, a slice, a broadcast.
NEAR = 4


def selecting_call(nodes: Sequence[fx.Node]) -> fx.Node | None:
    """The nearest call that selects, among Dynamo nodes and what they are made of."""
    for _ in range(NEAR):
        if found := [x for x in nodes if target_name(x) in SELECTING]:
            return found[0]
        nodes = [source for x in nodes for source in x.all_input_nodes]
    return None


def marks_the_largest(node: fx.Node) -> bool:
    """Whether a node of the shadow writes one number at the place of a row's largest score, as
    `F.gumbel_softmax(hard=True)` does."""
    if node.target is not torch.ops.aten.scatter.value:
        return False
    sources = [node.args[2]]
    for _ in range(NEAR):
        if any(x.target in LARGEST for x in sources):
            return True
        sources = [source for x in sources for source in x.all_input_nodes]
    return False


def selected(call: fx.Node, stage: str) -> Decline:
    """The decline of scores or weights that depend on a selection among them."""
    return Decline(
        "scores-selected",
        call,
        HINT,
        message=f"{target_name(call)} selects among all scores of a row",
        stage=stage,
    )
