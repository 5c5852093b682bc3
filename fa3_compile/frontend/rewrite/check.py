"""Whether a rewrite would change what the program computes or keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.dynamo import transforms
from fa3_compile.frontend.dynamo.gradients import has_gradient
from fa3_compile.frontend.dynamo.graph import opaque_target, target_name, values_read
from fa3_compile.frontend.dynamo.liveness import depends_on_values
from fa3_compile.frontend.dynamo.mutations import overwrite
from fa3_compile.frontend.expand import flex
from fa3_compile.frontend.lift.captured import Captured
from fa3_compile.frontend.lift.lift import written_between
from fa3_compile.frontend.reasons.selected_keys import selected, selecting_call
from fa3_compile.frontend.region import Region
from fa3_compile.frontend.rewrite.statistics import keep_statistics
from fa3_compile.spec.expr import loads_in

# What enters and leaves one in Dynamo's graph.
INFERENCE_MODES = (
    torch.autograd.grad_mode._enter_inference_mode,
    torch.autograd.grad_mode._exit_inference_mode,
)


def check(graph: fx.Graph, regions: Sequence[Region]) -> None:
    """`Decline` where the regions of one output cannot be computed in its place."""
    if not has_gradient(regions[0].output):
        # Nor would the operator give a gradient to a statistic, within `no_grad`.
        for region in regions:
            kept = [x for x in region.statistics if not has_gradient(x.node)]
            region.statistics = kept
    _check_inference_mode(regions[0].output)
    for region in regions:
        _check_mutations(region)
        _check_loads(region)
    _check_interior(graph, regions)
    place_of(graph, regions)
    for region in regions:
        if not region.spec.normalized:
            outputs = "sums" if region.reads_sums else "none"
            region.spec = replace(region.spec, normalize=outputs)


def reads_of(region: Region) -> list[tuple[fx.Node, fx.Node]]:
    """(what is read, the node since which it holds the value) of a region's op."""
    loads = (*region.loads, *region.coefficient_loads, *region.factor_loads)
    captured = [x for x in loads if isinstance(x, Captured)]
    places = [x.places for x in captured if x.places is not None]
    return [(x.source, x.since) for x in (*region.operands, *captured, *places)]


def hint(read: tuple[fx.Node, fx.Node] | None) -> str:
    """What the user of a rewritten region should know: weights, as `reader_of` finds them, that are
    computed once more."""
    if read is None:
        return ""
    held, reader = read
    return (
        f"The scores or weights ({held}) are also used by {target_name(reader)} and computed once "
        "more for it; where that is not needed, do not return them (output_attentions=False)."
    )


def place_of(graph: fx.Graph, regions: Sequence[Region]) -> fx.Node:
    """Before which node the ops stand: what they replace, and after any vmap around that.

    Statistics that are used before the op can stand are left to the program.
    """
    late = _misplaced(graph, regions)
    if late is not None and any(region.statistics for region in regions):
        for region in regions:
            region.statistics = []
        late = _misplaced(graph, regions)
    if late is not None:
        raise Decline(
            "order",
            late,
            "Leave vmap after the attention as a whole.",
            message="a part of the attention is used before the whole can be computed",
        )
    return _place(graph, regions)


def _place(graph: fx.Graph, regions: Sequence[Region]) -> fx.Node:
    replaced = _replaced(regions)
    around = [span for span in transforms.spans(graph) if any(n in span.nodes for n in replaced)]
    if around:
        return around[-1].nodes[-1].next
    return min(replaced)


def _replaced(regions: Sequence[Region]) -> list[fx.Node]:
    return [regions[0].output, *(x.node for region in regions for x in region.statistics)]


def _misplaced(graph: fx.Graph, regions: Sequence[Region]) -> fx.Node | None:
    """Something that is made too late for the op, or used too early; None if all is well."""
    place = _place(graph, regions)
    for region in regions:
        for _, since in reads_of(region):
            if not since < place:
                return since
    users = [u for n in _replaced(regions) for u in n.users]
    return next((u for u in users if u < place), None)


def _check_inference_mode(output: fx.Node) -> None:
    """AOTAutograd cannot take a view inside an inference mode of the program's own, and the op's
    operands are views: the compilation would fail, and all later ones of the process."""
    switches = [
        node
        for target in INFERENCE_MODES
        for node in output.graph.find_nodes(op="call_function", target=target)
        if node < output
    ]
    modes: list[bool] = []
    for node in sorted(switches):
        if node.target is INFERENCE_MODES[0]:
            modes.append(bool(node.args[0]))
        else:
            modes.pop()
    if modes and modes[-1]:
        raise Decline(
            "inference-mode",
            output,
            "Use torch.no_grad() there, or torch.inference_mode() around the compiled call.",
            message="PyTorch's compiler takes no views inside a torch.inference_mode() that the "
            "function enters itself",
        )


def _check_mutations(region: Region) -> None:
    """No operand may be written between where it is read in eager and where the op reads it."""
    for source, since in reads_of(region):
        written = overwrite(source, since, until=region.output)
        if written is not None:
            raise written_between(source, written)


def _check_loads(region: Region) -> None:
    """What the op reads may not be computed from the scores that it replaces."""
    interior = {*region.interior}
    weight = region.spec.weight
    weighing = [region.loads[x.tensor] for x in loads_in(weight)] if weight is not None else []
    for source, _ in reads_of(region):
        if depends_on_values(source, interior):
            if call := selecting_call([_call_between(interior, source)]):
                raise selected(call, "check")
            if any(isinstance(x, Captured) and x.source is source for x in weighing):
                raise Decline(
                    "scores-read",
                    source,
                    "Multiply the weights by what does not depend on the scores.",
                    message="the weights are multiplied by what is computed from the scores by "
                    f"{_name(_call_between(interior, source))}",
                )
            raise Decline(
                "scores-read",
                source,
                "Keep what lies between the two products to element-wise operations.",
                message="what is computed from the scores by "
                f"{_name(_call_between(interior, source))} is needed for them",
            )


def _call_between(interior: set[fx.Node], source: fx.Node) -> fx.Node:
    """The first call that is not element-wise of those that make a value of the interior's, or the
    value itself: a sort, a maximum over some of a row."""
    behind, stack = {source}, [source]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node not in behind and node not in interior:
                behind.add(node)
                stack.append(node)
    made = (n for n in source.graph.nodes if n in behind and opaque_target(n))
    return next((n for n in made if depends_on_values(n, interior)), source)


def _name(node: fx.Node) -> str:
    """What a node is the result of, or a part of the result of."""
    first = node.args[0] if node.args else None
    if target_name(node) == "getitem" and isinstance(first, fx.Node):
        return _name(first)
    return target_name(node)


def _check_interior(graph: fx.Graph, regions: Sequence[Region]) -> None:
    """What else uses scores and weights computes them itself, if it gets the same values."""
    read = [source for region in regions for source, _ in reads_of(region)]
    dropouts = [x for region in regions for x in region.dropouts]
    live = keep_statistics(graph, regions, read, dropouts)
    statistics = [x.node for region in regions for x in region.statistics]
    interior = [n for n in {n: n for r in regions for n in r.interior} if n not in statistics]
    found = reader_of(interior, live)
    if found is None:
        return
    _, reader = found
    if any(flex.is_call(n) and n in live for n in interior):
        raise Decline(
            "weights-used",
            reader,
            "Do not ask flex_attention for the maximum of the scores.",
            message="more of flex_attention than its output and log-sum-exp is used",
        )
    dropped = [n for n in interior if n in live and depends_on_values(n, {*dropouts})]
    if dropouts and dropped:
        _, reader = reader_of(dropped, live) or found
        raise Decline(
            "dropped-weights-used",
            reader,
            "Return the weights as they are before their dropout.",
            message=f"the dropped weights are also used by {target_name(reader)}, which would see "
            "another dropout than V",
        )


def reader_of(interior: list[fx.Node], live: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """(a node of the interior that is live, a live reader outside of the interior).

    live  what the graph needs, and not for its shape alone
    """
    inside = {*interior}
    for node in reversed(interior):
        if node in live:
            readers = [u for u in node.users if node in values_read(u)]
            outside = [u for u in readers if u in live and u not in inside]
            if outside:
                return node, outside[0]
    used = [n for n in interior if n in live]
    return (used[-1], used[-1]) if used else None
