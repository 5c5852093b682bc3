"""Splicing `fa3::attention` into the Dynamo graph in the place of a product with V."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fa3_compile.frontend.dynamo.gradients import has_gradient, learned_inputs
from fa3_compile.frontend.dynamo.graph import example_value
from fa3_compile.frontend.dynamo.liveness import depends_on_values
from fa3_compile.frontend.dynamo.mutations import written_later
from fa3_compile.frontend.lift.captured import Captured
from fa3_compile.frontend.lift.lift import ancestors
from fa3_compile.frontend.region import Operand, Region
from fa3_compile.frontend.rewrite.check import place_of, reads_of
from fa3_compile.frontend.rewrite.coefficient import (
    about_its_mean,
    coefficient,
    scaled_queries,
    with_beside,
)
from fa3_compile.frontend.rewrite.emit import Emitter
from fa3_compile.frontend.rewrite.gathers import gather_in_float32
from fa3_compile.spec.expr import KV, load, where


def rewrite(graph: fx.Graph, regions: list[Region], texts: list[str]) -> dict[fx.Node, fx.Node]:
    """Replaces one output by the sum of its regions, and statistics by theirs; returns what was
    replaced by what. Dead nodes are left to `remove_dead`. A graph that cannot be rewritten is as
    it was.

    texts  the regions' specs, as the op takes them
    """
    before = {*graph.nodes}
    try:
        return _replaced(graph, regions, texts)
    except Exception:
        for node in reversed([*graph.nodes]):
            if node not in before:
                graph.erase_node(node)
        raise


def _replaced(graph: fx.Graph, regions: list[Region], texts: list[str]) -> dict[fx.Node, fx.Node]:
    output, before = regions[0].output, [*graph.nodes]
    loads = [x for region in regions for x in region.loads]
    learned_biases = [x.source for x in loads if isinstance(x, Captured) and x.needs_grad]
    place = place_of(graph, regions)
    replacements: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(place):
        emit = Emitter(graph, place, example_value(regions[0].value.source))
        parts = [
            _attention(emit, region, text, replacements)
            for region, text in zip(regions, texts, strict=True)
        ]
        result = parts[0]
        for part in parts[1:]:
            result = emit.function(operator.add, result, part)
        if example_value(output).requires_grad:
            lost = learned_inputs(output).difference(ancestors(result))
            for learned in [x for x in before if x in lost]:
                # It cancels in the scores, and has a gradient of zeros, not none.
                none = emit.call("narrow", emit.call("flatten", learned), 0, 0, 0)
                result = emit.function(operator.add, result, emit.call("sum", none))
        replacements[output] = result
        for replaced, made in replacements.items():
            if _loses_its_order(example_value(replaced), example_value(made)):
                replacements[replaced] = emit.call("contiguous", made)
        if example_value(output).requires_grad:
            # The backward reads what the operator gave: a product does not keep its result.
            for replaced in written_later(replacements, emit.before.prev):
                replacements[replaced] = emit.call("clone", replacements[replaced])
        if _differentiates(regions):
            # What the program holds constant past this node: its own detach() may be replaced.
            for replaced, made in replacements.items():
                if not has_gradient(replaced):
                    replacements[replaced] = emit.call("detach", made)
    for replaced, made in replacements.items():
        made.meta.update(replaced.meta)
        replaced.replace_all_uses_with(made)
    for bias in learned_biases:
        gather_in_float32(emit, bias)
    return replacements


def _loses_its_order(replaced: torch.Tensor, made: torch.Tensor) -> bool:
    """Whether elements that lay side by side do not: the operator writes those of a head side by
    side, and V^T P^T has queries there. What views it, or asks for its strides, counts on them."""
    if not replaced.dim():
        return False
    first, then = (x.stride(-1) for x in (replaced, made))
    return statically_known_true(first == 1) and not statically_known_true(then == 1)


def _differentiates(regions: list[Region]) -> bool:
    """Whether the operator's results have a gradient where it stands outside `no_grad`."""
    read = [source for region in regions for source, _ in reads_of(region)]
    return torch.is_grad_enabled() and any(has_gradient(x) for x in read)


def _attention(
    emit: Emitter, region: Region, text: str, replacements: dict[fx.Node, fx.Node]
) -> fx.Node:
    """One region's share of the output; what else it replaces is added to `replacements`."""
    device = example_value(region.value.source).device
    operands = _operands(emit, region)
    valued = _valued(region)
    for i, x in enumerate(region.loads):
        read = emit.captured(x, device)
        learns = isinstance(x, Captured) and example_value(x.source).requires_grad
        held_constant = i not in valued and (learns or example_value(read).requires_grad)
        if isinstance(x, Captured) and (x.diagonals or x.places or x.arranged):
            x = region.loads[i] = Captured(read, read)
        operands.append(
            (getattr(x, "source", None), emit.call("detach", read) if held_constant else read)
        )
    if example_value(region.output).requires_grad:
        # The backward reads them again; a sum, say, does not keep what it adds.
        sources = [source for source, _ in operands if source is not None]
        written = written_later(sources, emit.before.prev)
        operands = [(s, emit.call("clone", x) if s in written else x) for s, x in operands]
    q, k, v, *aux = (x for _, x in operands)
    v = about_its_mean(emit, region, v)
    numbers = [emit.size(size) for size in region.sizes]
    ones = (v, (0, region.columns_of_ones), "constant", 1.0)
    wide = emit.function(torch.nn.functional.pad, *ones) if region.columns_of_ones else v
    pair = emit.function(torch.ops.fa3.attention.default, q, k, wide, aux, numbers, text)
    out = with_beside(emit, region, coefficient(emit, region, pair, device), v, device)
    replacements |= {x.node: emit.statistic(pair, x, region) for x in region.statistics}
    return emit.output(out, region)


def _valued(region: Region) -> set[int]:
    """The loads that a value is made of; the others decide between values, and eager gives them no
    gradient: not one of zeros, which an optimizer would take for one."""
    spec = region.spec
    found, stack = set(), [x for x in spec.expressions if x is not spec.mask]
    while stack:
        expr = stack.pop()
        if isinstance(expr, load):
            found.add(expr.tensor)
        stack += expr.args[1:] if isinstance(expr, (load, where)) else expr.args
    return found


def _operands(emit: Emitter, region: Region) -> list[tuple[fx.Node | None, fx.Node]]:
    """(the node whose memory it is, None where it is a copy; the operand) of Q, K and V."""
    layout = region.layout
    heads = [*layout.kv_heads, *layout.group]
    sizes = {**layout.size, KV: region.key_length}
    device = example_value(region.value.source).device
    queries, keys = [], []
    for pair in region.pairs:
        rows = ([*layout.batch], heads, [*layout.query], pair.axes)
        query = emit.operand(pair.query, rows, {**sizes, **pair.contracted})
        queries.append(scaled_queries(emit, region, query, pair.factor, device))
        columns = ([*layout.batch], [*layout.kv_heads], [KV], pair.axes)
        keys.append(emit.operand(pair.key, columns, {**sizes, **pair.contracted}))
    values = ([*layout.batch], [*layout.kv_heads], [KV], [*layout.head_dim])
    value = (_memory(region.value), emit.operand(region.value, values, sizes))
    if len(region.pairs) > 1:
        # Keys that are the values too come first: kernels load what both are once.
        both = [i for i, x in enumerate(keys) if _same_reads(x, value[1])][:1]
        for parts in (queries, keys):
            parts[:0] = [parts.pop(i) for i in both]
        beside = [emit.beside(parts, region.padding) for parts in (queries, keys)]
        if both:
            value = (
                None,
                emit.call("narrow", beside[1], -1, 0, emit.size(region.pairs[both[0]].width)),
            )
        return [(None, beside[0]), (None, beside[1]), value]
    [pair] = region.pairs
    return [(pair.query.source, queries[0]), (_memory(pair.key), keys[0]), value]


def _memory(operand: Operand) -> fx.Node | None:
    """The node whose memory an operand is."""
    return None if operand.behind else operand.source


def _same_reads(a: Any, b: Any) -> bool:
    """Whether two operands are made by the same methods of the same node."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same_reads, a, b))
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b:
        return a is b or a == b
    alike = a.op == b.op == "call_method" and a.target == b.target
    return alike and _same_reads(a.args, b.args)


def follow_replacements(region: Region, replaced: dict[fx.Node, fx.Node]) -> None:
    """Reads the results of earlier rewrites in place of what they replaced. V that was made of
    another softmax of the same scores, as in Soft MoE, is then made of them no more."""
    products, results = {*region.products}, {*replaced.values()}
    region.interior = [
        x
        for x in region.interior
        if depends_on_values(x, products) or not depends_on_values(x, results)
    ]
    for operand in region.operands:
        operand.source = replaced.get(operand.source, operand.source)
    for loads in (region.loads, region.coefficient_loads, region.factor_loads):
        loads[:] = [
            x._replace(source=replaced.get(x.source, x.source)) if isinstance(x, Captured) else x
            for x in loads
        ]
