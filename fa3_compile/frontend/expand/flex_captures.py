"""What a score_mod captures and holds constant, detached before the call of flex_attention.

`bias[h, q, kv].detach()` is a value that no node of Dynamo's graph holds; `bias.detach()`, captured
in the tensor's place, is one, and can be read like any other tensor.
"""

from __future__ import annotations

from torch import fx

from fa3_compile.frontend.dynamo.graph import example_value
from fa3_compile.frontend.expand import flex


def detach_captures(gm: fx.GraphModule) -> int:
    """Detaches every captured tensor that no gradient reaches; returns how many."""
    count = 0
    for node in gm.graph.nodes:
        if flex.is_call(node):
            count += _detach(gm, node)
    return count


def _detach(gm: fx.GraphModule, node: fx.Node) -> int:
    given = flex.arguments(node)
    captures = [*given.get("score_mod_other_buffers", ())]
    score_mod = getattr(gm, str(given["score_mod"].target))
    # The score and its four coordinates come before them.
    inside = [x for x in score_mod.graph.nodes if x.op == "placeholder"][5:]
    stops = flex.stops(score_mod)
    count = 0
    for i, (x, seen) in enumerate(zip(captures, inside)):
        learned = isinstance(x, fx.Node) and getattr(example_value(x), "requires_grad", False)
        if learned and not _reaches_output(seen, stops):
            with gm.graph.inserting_before(node):
                captures[i] = gm.graph.call_method("detach", (x,))
            captures[i].meta.update(node.meta, example_value=example_value(x).detach())
            count += 1
    if count:
        node.args = tuple(
            tuple(captures) if name == "score_mod_other_buffers" else value
            for name, value in zip(flex.ARGUMENTS, node.args)
        )
        if "score_mod_other_buffers" in node.kwargs:
            node.kwargs = {**node.kwargs, "score_mod_other_buffers": tuple(captures)}
    return count


def _reaches_output(node: fx.Node, stops: set[fx.Node]) -> bool:
    """Whether a gradient flows from the score_mod's result to one of its inputs."""
    stack, seen = [node], set()
    while stack:
        for user in stack.pop().users:
            if user.op == "output":
                return True
            if user not in stops and user not in seen:
                seen.add(user)
                stack.append(user)
    return False
