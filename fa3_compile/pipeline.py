"""The stages, from a Dynamo graph to the same graph with its attention rewritten.

expand     nn.MultiheadAttention's one call, and products of several tensors, written out
trace      a functional core-aten shadow of the graph, to be read only
detect     softmax(f(Q K^T)) V, or f(Q K^T) V, in the axes of its output (skeletons, weights,
           scores)
layout     which axes are b, h, q, d; score and mask in those terms (lift, simplify)
check      what else reads the weights, nothing is written in between
choose     a kernel family that computes it here
rewrite    one fa3::attention node in the original graph, or a sum of several
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from torch import fx

from fa3_compile import mask_tensors, report, selection
from fa3_compile.errors import Decline, InternalError
from fa3_compile.frontend.detect import detect, joined
from fa3_compile.frontend.detect.skeletons import Skeleton, skeletons
from fa3_compile.frontend.dynamo.linear import mark_products
from fa3_compile.frontend.dynamo.liveness import live_nodes, remove_dead
from fa3_compile.frontend.expand import flex
from fa3_compile.frontend.expand.einsum import expand_products
from fa3_compile.frontend.expand.encoder_layer import expand_encoder_layers
from fa3_compile.frontend.expand.flex_captures import detach_captures
from fa3_compile.frontend.expand.multi_head_attention import expand_calls
from fa3_compile.frontend.layout import dense_reads, layout
from fa3_compile.frontend.reasons.graph_breaks import broken_attention
from fa3_compile.frontend.reasons.hints import hints
from fa3_compile.frontend.reasons.opaque_scores import opaque_scores
from fa3_compile.frontend.reasons.opaque_weights import opaque_weights
from fa3_compile.frontend.reasons.split_bodies import split_attention
from fa3_compile.frontend.region import Region
from fa3_compile.frontend.rewrite import check, rewrite
from fa3_compile.frontend.shadow import contractions, trace
from fa3_compile.lower.choose import Choice
from fa3_compile.options import Options
from fa3_compile.report import RegionReport
from fa3_compile.source import where

log = logging.getLogger(__name__)
# Why products cannot be read as one, which is what to say where they cannot be read otherwise.
APART = ("no-kernel", "queries-apart", "products-apart")
# In the `meta` of a graph that uses the weights of a rewritten attention elsewhere.
KEEPS_WEIGHTS = "fa3_keeps_weights"


# What was the output of each recorded region before the graph was rewritten; None where the two
# products of an attention that was left alone are not seen.
Outputs = list["fx.Node | None"]


def rewrite_attention(
    gm: fx.GraphModule,
    options: Options,
    graph_name: str = "",
    build: bool = False,
    outputs: Outputs | None = None,
) -> int:
    """Rewrites every attention of `gm`, bodies of checkpoints included; returns how many.

    The graph computes what it computed before. What is left alone is recorded with its reason.

    build    the kernels will run: they are built while the graph is compiled
    outputs  is added to, in the order of the records
    """
    fused = 0
    outputs = [] if outputs is None else outputs
    for module in graphs(gm):
        try:
            fused += _rewrite_graph(module, options, graph_name, fused, build, outputs)
        except Exception as error:
            if options.strict:
                raise InternalError(f"{type(error).__name__}: {error}", where=graph_name) from error
            log.warning("graph %s left as it was: %s", graph_name, error, exc_info=True)
    return fused


def graphs(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """`gm` and the bodies in it that attention is looked for in, in that order."""
    mods = flex.mods(gm)
    return [m for m in gm.modules() if isinstance(m, fx.GraphModule) and m not in mods]


def expand(gm: fx.GraphModule) -> int:
    """Writes out the calls that hold more than one product, so that there is a node for each, and
    marks the layers that are products of two activations; returns how many calls were changed."""
    count = expand_calls(gm.graph) + expand_encoder_layers(gm.graph)
    count += expand_products(gm.graph) + detach_captures(gm)
    mark_products(gm.graph)
    return count


def traced(gm: fx.GraphModule) -> trace.Shadow | None:
    """The shadow of an expanded graph, with a product for each sum of products."""
    shadow = trace.shadow(gm)
    if shadow:
        contractions.read_as_products(shadow)
    return shadow


def _rewrite_graph(
    gm: fx.GraphModule,
    options: Options,
    graph_name: str,
    fused: int,
    build: bool,
    outputs: Outputs,
) -> int:
    expanded = expand(gm)
    shadow = traced(gm)
    entries: list[tuple[RegionReport, Region | None, fx.Node | None]] = []
    hidden: tuple[Decline, ...] = ()
    if shadow:
        hidden = (*shadow.declined, *opaque_scores(shadow), *opaque_weights(shadow))
    for decline in (*split_attention(gm), *broken_attention(gm), *hidden):
        at = where(decline.node) if decline.node is not None else ""
        entry = RegionReport.declined(len(entries), graph_name, decline, where=at)
        entries.append((entry, None, None))
    replaced: dict[fx.Node, fx.Node] = {}
    rewritten: list[Region] = []
    attended: set[fx.Node] = set()
    dear: dict[fx.Node, Decline] = {}
    for skeleton in skeletons(shadow) if shadow else ():
        assert shadow is not None
        if skeleton.values in attended:
            continue
        known: dict[str, Any] = {"where": where(skeleton.softmax_holder(shadow))}
        try:
            _check_fuel(options, fused + len(rewritten))
            found = _analyse(gm.graph, shadow, skeleton, attended, replaced, options, known)
            regions = [region for region, _ in found]
            texts = [selection.spec_text(region, options) for region in regions]
            replaced |= rewrite.rewrite(gm.graph, regions, texts)
        except Exception as error:
            declined = _declined(error, skeleton, options)
            if declined.code == "products-apart":
                dear |= dict.fromkeys(skeleton.parts, declined)
            elif declined.code == "weights-partly-used":
                # Of V in parts, each sees a part of the keys: why they are not read as one.
                declined = dear.get(skeleton.values, declined)
            if skeleton.worth_saying(declined):
                entry = RegionReport.declined(len(entries), graph_name, declined, **known)
                entries.append((entry, None, skeleton.output))
            continue
        rewritten += regions
        attended |= {skeleton.values, *skeleton.parts}
        for region, choice in found:
            if build:
                selection.begin(region, choice, options)
            known |= selection.formulas(region)
            known |= selection.described(region, choice, options)
            entry = RegionReport(len(entries), graph_name, True, **known)
            entries.append((entry, region, skeleton.output))
    if rewritten or expanded:
        remove_dead(gm.graph, [node for region in rewritten for node in region.dropouts])
        gm.graph.lint()
        gm.recompile()
    live = live_nodes(gm.graph, by_values=True) if rewritten else set()
    for entry, region, output in entries:
        if region is not None:
            read = check.reader_of(region.interior, live)
            gm.meta[KEEPS_WEIGHTS] = gm.meta.get(KEEPS_WEIGHTS, False) or read is not None
            said = [check.hint(read), joined.hint(region), *hints(region.spec)]
            entry = dataclasses.replace(entry, hint=" ".join(x for x in said if x))
            mask_tensors.keep(gm, region, entry)
        report.record(entry)
        outputs.append(output)
    return len(rewritten)


def _check_fuel(options: Options, rewrites: int) -> None:
    if options.fuel is not None and rewrites >= options.fuel:
        raise Decline(
            "fuel",
            None,
            "Raise options={'fuel': n}.",
            message=f"the option fuel allows {options.fuel} fused regions",
            stage="rewrite",
        )


def _declined(error: Exception, skeleton: Skeleton, options: Options) -> Decline:
    """Why a skeleton is left alone: a stage's own word, or a bug of ours, raised if `strict`."""
    if isinstance(error, Decline):
        error.stage = error.stage or "rewrite"
        return error
    if options.strict:
        raise error
    log.warning("%s left as it was: %s", skeleton.output, error, exc_info=error)
    return Decline(
        "internal-error",
        skeleton.output,
        "Please report it with the log of TORCH_LOGS=+fa3_compile.",
        message=f"{type(error).__name__}: {error}",
        stage="analysis",
    )


def _analyse(
    graph, shadow, skeleton, attended, replaced, options: Options, known: dict
) -> list[tuple[Region, Choice]]:
    """The stages that only read. Scores that are a sum of products are read as one product, and,
    where that cannot be had, as one product and biases."""
    apart: Decline | None = None
    said: dict[str, Any] = {}
    for joins in (True, False):
        stage = "detect"
        try:
            readings = detect.read(shadow, skeleton, joins=joins)
            detect.check_not_attended(readings, attended)
            stage = "lift"
            regions = [layout.region(shadow, reading) for reading in readings]
            for region in regions:
                rewrite.follow_replacements(region, replaced)
                dense_reads.keys_side_by_side(region)
                region.apart = apart
            known |= selection.formulas(regions[0])
            stage = "check"
            check.check(graph, regions)
            stage = "choose"
            for region in regions:
                selection.check_beside(region)
                if skeleton.may_join:
                    selection.check_joined(region)
            return [(region, selection.kernel_for(region, options)) for region in regions]
        except Decline as decline:
            decline.stage = decline.stage or stage
            decline.node = decline.node or skeleton.softmax_holder(shadow)
            if apart is None or apart.code not in APART:
                apart, said = decline, dict(known)
            if not skeleton.may_join:
                break
    assert apart is not None
    known |= said
    raise apart
