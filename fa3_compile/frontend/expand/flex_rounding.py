"""What a score_mod computes of captured tensors in bfloat16: it is computed in float32.

PyTorch's eager code rounds each step of it, `slopes[h] * (kv - q)`, to numbers that no tensor holds
and no kernel of PyTorch's rounds to. Where a step is decided by the rounding, it stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fa3_compile.frontend.dynamo.graph import example_value, target_name

STEPS = frozenset(
    "floor ceil round trunc frac sign sgn floordiv floor_divide mod remainder fmod".split()
)
# A score and its four coordinates come before what a score_mod captures.
COORDINATES = 5


def widened(score_mod: fx.GraphModule, captures: Sequence[Any]) -> list[Any]:
    """The captured tensors, those in bfloat16 as float32 where that changes no more than digits."""
    given = [n for n in score_mod.graph.nodes if n.op == "placeholder"][COORDINATES:]
    rounded = {n for n, x in zip(given, captures, strict=True) if _is_rounded(x)}
    if not rounded or _decides(score_mod.graph, rounded):
        return [*captures]
    return [x.float() if _is_rounded(x) else x for x in captures]


def _is_rounded(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def _decides(graph: fx.Graph, rounded: set[fx.Node]) -> bool:
    """Whether something other than numbers is made of the rounded ones: a comparison, an integer, a
    step, or an infinity of a number that bfloat16 does not hold."""
    for node in graph.nodes:
        if node.op == "output" or not rounded.intersection(node.all_input_nodes):
            continue
        value = example_value(node)
        steps = target_name(node) in STEPS or node.kwargs.get("rounding_mode") is not None
        if steps or not isinstance(value, Tensor) or not value.is_floating_point():
            return True
        if any(isinstance(x, (int, float)) and _is_beyond(x) for x in node.args):
            return True
        rounded = rounded | {node}
    return False


def _is_beyond(number: float) -> bool:
    held = torch.tensor(float(number), dtype=torch.float64).to(torch.bfloat16)
    return math.isfinite(number) and bool(held.isinf())
