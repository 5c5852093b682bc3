"""The stages, from a Dynamo graph to the same graph with its attention rewritten.

expand     nn.MultiheadAttention's one call, written out
trace      a functional core-aten shadow of the graph, to be read only
detect     softmax(f(Q K^T)) V, in the axes of its output
layout     which axes are b, h, q, d; score and mask in those terms (lift, simplify)
check      nothing else reads the weights, nothing is written in between
choose     a kernel family that computes it here
rewrite    one fa3::attention node in the original graph
"""

from __future__ import annotations

import logging

from torch import fx

from fa3_compile import report, selection
from fa3_compile.errors import Decline, InternalError
from fa3_compile.frontend import detect, expand, flex, layout, rewrite, trace
from fa3_compile.frontend.region import Region
from fa3_compile.options import Options
from fa3_compile.source import where

log = logging.getLogger(__name__)


def rewrite_attention(gm: fx.GraphModule, options: Options, graph_name: str = "") -> int:
    """Rewrites every attention of `gm`, bodies of checkpoints included; returns how many.

    The graph computes what it computed before. What is left alone is recorded with its reason.
    """
    fused = 0
    for module in graphs(gm):
        try:
            fused += _rewrite_graph(module, options, graph_name, fused)
        except Exception as error:
            if options.strict:
                raise InternalError(f"{type(error).__name__}: {error}", where=graph_name) from error
            log.warning("graph %s left as it was: %s", graph_name, error, exc_info=True)
    return fused


def graphs(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """`gm` and the bodies in it that attention is looked for in, in that order."""
    mods = flex.mods(gm)
    return [m for m in gm.modules() if isinstance(m, fx.GraphModule) and m not in mods]


def _rewrite_graph(gm: fx.GraphModule, options: Options, graph_name: str, fused: int) -> int:
    expanded = expand.expand_calls(gm.graph)
    shadow = trace.shadow(gm)
    if shadow is None:
        return 0
    for index, decline in enumerate(shadow.declined):
        known = {"where": where(decline.node) if decline.node is not None else ""}
        report.record(report.RegionReport.declined(index, graph_name, decline, **known))
    count, replaced = 0, {}
    for index, skeleton in enumerate(detect.skeletons(shadow), len(shadow.declined)):
        known = {"where": where(skeleton.softmax_holder(shadow))}
        try:
            if options.fuel is not None and fused + count >= options.fuel:
                raise Decline("fuel", None, "Raise options={'fuel': n}.", stage="rewrite")
            region, choice = _analyse(gm.graph, shadow, skeleton, replaced, options, known)
            text = selection.spec_text(region, options)
            replaced[region.output] = rewrite.rewrite(gm.graph, region, text)
            count += 1
            report.record(
                report.RegionReport(
                    index, graph_name, True, **known, **selection.described(region, choice, options)
                )
            )
        except Decline as decline:
            report.record(report.RegionReport.declined(index, graph_name, decline, **known))
        except Exception as error:
            if options.strict:
                raise
            log.warning("region %d left as it was: %s", index, error, exc_info=True)
            unforeseen = Decline("internal-error", None, message=f"{type(error).__name__}: {error}")
            report.record(report.RegionReport.declined(index, graph_name, unforeseen, **known))
    if count or expanded:
        rewrite.remove_dead(gm.graph)
        gm.graph.lint()
        gm.recompile()
    return count


def _analyse(graph, shadow, skeleton, replaced, options: Options, known: dict):
    """The stages that only read."""
    stage = "detect"
    try:
        reading = detect.read(shadow, skeleton)
        stage = "lift"
        region: Region = layout.region(shadow, skeleton, reading)
        rewrite.follow_replacements(region, replaced)
        known |= selection.formulas(region)
        stage = "check"
        rewrite.check(graph, region)
        stage = "choose"
        return region, selection.kernel_for(region, options)
    except Decline as decline:
        decline.stage = decline.stage or stage
        raise
