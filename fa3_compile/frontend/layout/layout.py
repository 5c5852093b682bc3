"""From a reading to a region: which axes are b, h, q and d, and the spec in those terms."""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch
from torch import fx

from fa3_compile.errors import NOTHING, Decline
from fa3_compile.frontend.detect.detect import Reading, Skeleton
from fa3_compile.frontend.dynamo.graph import example_value
from fa3_compile.frontend.dynamo.sizes import hint
from fa3_compile.frontend.layout.axes import axes_of, layout_of, places, substituted
from fa3_compile.frontend.layout.fields import check_finite, read_fields, read_unnormalised
from fa3_compile.frontend.lift.captured import Captured, Seed
from fa3_compile.frontend.lift.lift import descendants
from fa3_compile.frontend.lift.placeholders import D
from fa3_compile.frontend.region import Layout, Region
from fa3_compile.frontend.shadow.trace import Shadow
from fa3_compile.spec.attention import OUT_ORDERS, AttentionSpec
from fa3_compile.spec.expr import (
    KV,
    SKV,
    SQ,
    B,
    Expr,
    H,
    Q,
    S,
    load,
    loads_in,
    size_symbol,
)
from fa3_compile.spec.normal_form import tidy

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def region(shadow: Shadow, reading: Reading) -> Region:
    """The region that a reading describes. `Decline` where the op cannot say it."""
    skeleton = reading.skeleton
    _checked_operands(reading, skeleton)
    _check_not_router(reading, skeleton)
    layout = layout_of(reading, skeleton)
    substitution, ranges = _coordinates(layout, reading)
    _check_axes_known(reading, substitution, skeleton)

    def in_coordinates(expr):
        return substituted(expr, substitution, ranges)

    interior = _interior(shadow, reading)
    read = read_fields if reading.term.softmax.normalizes else read_unnormalised
    of_spec = read(reading, in_coordinates, ranges, interior)
    check_finite(of_spec, skeleton.output)
    separated, weight, rows, sinks = of_spec
    if S not in separated.score.free_symbols:
        raise Decline(
            "no-product",
            skeleton.output,
            NOTHING,
            message=f"the score of a visible key is {separated.score}, whatever Q and K are",
        )
    fields = [separated.score, separated.mask, separated.fill, weight, *sinks]
    fields, loads = _renumbered(fields, reading.loads)
    fields, sizes = _with_sizes(fields, layout, reading.key_length)
    score, mask, fill, weight, *sinks = fields
    # Rows of NaN beside rows of zeros: the op gives zeros for both, which have a gradient of 0.
    nan_rows = rows != sympy.true and separated.dead == "nan"
    spec = AttentionSpec(
        score=score,
        mask=mask,
        dead="zero" if nan_rows else separated.dead,
        fill=fill,
        sinks=tuple(sinks),
        aux=tuple(_kind(x) for x in loads),
        out_order=_out_order(reading, layout, skeleton.output),
        weight=weight,
        normalize="softmax" if reading.term.softmax.normalizes else "none",
    )
    [coefficient, beside, rows], coefficient_loads = _renumbered(
        [in_coordinates(reading.term.coefficient), in_coordinates(reading.beside), rows],
        reading.loads,
    )
    factors, factor_loads = _renumbered(
        [in_coordinates(pair.factor) for pair in reading.pairs], reading.loads
    )
    return Region(
        output=skeleton.output,
        output_axes=reading.axes,
        interior=interior,
        products=_holders(shadow, {dot.node for dot in reading.scores.dots}),
        pairs=[replace(x, factor=factor) for x, factor in zip(reading.pairs, factors)],
        value=reading.value,
        layout=layout,
        key_length=reading.key_length,
        spec=AttentionSpec.parse(str(spec)),
        loads=loads,
        sizes=sizes,
        coefficient=tidy(coefficient),
        beside=tidy(beside),
        rows=rows,
        nan_rows=nan_rows,
        coefficient_loads=coefficient_loads,
        factor_loads=factor_loads,
        dropouts=reading.dropouts,
        statistics=[] if separated.dead == "score" else reading.statistics,
    )


def _interior(shadow: Shadow, reading: Reading) -> list[fx.Node]:
    """The Dynamo nodes that hold something between the two products."""
    skeleton = reading.skeleton
    behind, stack = set(), [skeleton.total or skeleton.values]
    while stack:
        node = stack.pop()
        for source in node.all_input_nodes:
            if source not in behind:
                behind.add(source)
                stack.append(source)
    return _holders(shadow, behind & descendants(dot.node for dot in reading.scores.dots))


def _holders(shadow: Shadow, values: set[fx.Node]) -> list[fx.Node]:
    """The Dynamo nodes that hold some of the values, or make them inside."""
    held = [d for d, a in shadow.aten_of.items() if a in values]
    return [*dict.fromkeys([*held, *(d for a, d in shadow.within.items() if a in values)])]


def _checked_operands(reading: Reading, skeleton: Skeleton) -> None:
    operands = reading.operands
    for operand in operands:
        if operand.view is None:
            raise Decline(
                "operand-unclear",
                skeleton.output,
                "Give the products tensors whose axes are heads, positions and head dimension.",
                message=f"{operand.source} cannot be seen as [batch, heads, length, head dim]",
            )
    values = [example_value(x.source) for x in operands]
    dtypes = [x.dtype for x in operands]
    if len(set(dtypes)) > 1:
        raise Decline(
            "mixed-dtypes",
            skeleton.output,
            "Cast q, k and v to one dtype before the attention.",
            message="q, k, v are " + ", ".join(map(str, dtypes)),
        )
    if dtypes[0] not in DTYPES:
        raise Decline(
            "dtype",
            skeleton.output,
            "Use bfloat16, float16 or float32.",
            message=f"q, k and v are {dtypes[0]}",
        )
    if len({v.device for v in values}) > 1:
        raise Decline(
            "mixed-devices",
            skeleton.output,
            "Move q, k and v to one device.",
            message="q, k and v are on " + ", ".join(sorted({str(v.device) for v in values})),
        )
    out = example_value(skeleton.output)
    if isinstance(out, torch.Tensor) and out.dtype != dtypes[0]:
        raise Decline(
            "mixed-dtypes",
            skeleton.output,
            "Cast the output instead of q, k and v.",
            message=f"q, k, v are {dtypes[0]} and the output is {out.dtype}",
        )


def _check_not_router(reading: Reading, skeleton: Skeleton) -> None:
    """Tokens weighing a table of parameters are a router or a codebook, not attention; a table of
    any kind, with no softmax in between, is a perceptron."""
    if not reading.term.softmax.normalizes and _is_perceptron(reading):
        raise Decline("perceptron", skeleton.output, NOTHING, message="K or V is one for all rows")
    flat = all(example_value(x.source).dim() == 2 for x in reading.operands)
    keys = [example_value(x.source) for pair in reading.pairs for x in pair.key.parts]
    if flat and all(isinstance(x, torch.nn.Parameter) for x in keys):
        raise Decline(
            "router",
            skeleton.output,
            NOTHING,
            message="a softmax over a table of parameters: a router or a codebook",
        )


def _is_perceptron(reading: Reading) -> bool:
    """Whether K or V is a given matrix that the rows of several batches meet; where there are no
    batches, whether K has its keys as columns, as the weights of a layer do."""
    rows = {a for axes in reading.axes for a in axes} - reading.head_dim.free_symbols
    keys = (x for pair in reading.pairs for x in pair.key.parts)
    for operand in (*keys, *reading.value.parts):
        given = operand.source.op == "placeholder" and example_value(operand.source).dim() == 2
        if not given:
            continue
        order = [a for i in operand.place.index for a in (D, KV) if a in i.free_symbols]
        if len(rows) > 1 and not rows & axes_of(operand) or order == [D, KV]:
            return True
    return False


def _coordinates(layout: Layout, reading: Reading) -> tuple[dict, dict]:
    """axis -> expression of b, h, q; and the ranges of b, h, q, kv."""
    substitution: dict[sympy.Symbol, Expr] = {}
    ranges = {
        B: layout.total(layout.batch),
        H: layout.total(layout.kv_heads) * layout.total(layout.group),
        Q: layout.total(layout.query),
        KV: reading.key_length,
    }
    for coordinate, axes in (
        (B, layout.batch),
        (H, [*layout.kv_heads, *layout.group]),
        (Q, layout.query),
    ):
        substitution |= places(coordinate, axes, layout.size, ranges)
    return substitution, ranges


def _check_axes_known(reading: Reading, substitution, skeleton: Skeleton) -> None:
    known = set(substitution) | {KV, S}
    term = reading.term
    weights = (term.weight, term.kept, term.coefficient, reading.beside)
    for expr in (reading.score, *reading.scores.sinks, *weights):
        strange = [x for x in expr.free_symbols if x in reading.sizes and x not in known]
        if strange or D in expr.free_symbols:
            raise Decline(
                "axes-unclear",
                skeleton.output,
                "Let scores depend on batch, head, query and key alone.",
                message=f"a score depends on another axis of the output: {expr}",
            )


def _renumbered(fields: list, loads: list):
    """The loads that are used, numbered from 0 in order of use."""
    present = [f for f in fields if f is not None]
    used: list[int] = []
    for x in loads_in(*present):
        if x.tensor not in used:
            used.append(x.tensor)
    new = {old: i for i, old in enumerate(used)}

    def rename(expr):
        if expr is None:
            return None
        return expr.replace(load, lambda i, *index: load(new[int(i)], *index))

    return [rename(f) for f in fields], [loads[i] for i in used]


def _with_sizes(fields: list, layout: Layout, key_length: Expr):
    """Dynamic sizes by the op's names: Sq, Skv, n0, n1, ...; and the values of n0, n1, ...

    Those are positive. An int of the program may be negative: it is the difference of two.
    """
    names: dict[Expr, Expr] = {}
    queries = layout.total(layout.query)
    if _is_multiple(key_length):
        names[key_length] = SKV
    if _is_multiple(queries):
        names.setdefault(queries, SQ)
    fields = [None if f is None else f.subs(names, simultaneous=True) for f in fields]
    names, sizes = {}, []
    known = {S, B, H, Q, KV, SQ, SKV}
    strange = sorted({x for f in fields if f is not None for x in f.free_symbols} - known, key=str)
    for symbol in strange:
        signed = [_positive_part(symbol), _positive_part(-symbol)]
        values = [symbol] if symbol.is_positive else signed
        parts = [size_symbol(len(sizes) + i) for i in range(len(values))]
        names[symbol] = parts[0] - sympy.Add(*parts[1:])
        sizes += values
    return [None if f is None else f.subs(names, simultaneous=True) for f in fields], sizes


def _is_multiple(size: Expr) -> bool:
    """Whether it is a symbol, or so many times one."""
    times, of = size.as_coeff_Mul()
    return bool(of.is_Symbol and times.is_Integer)


def _positive_part(x: Expr) -> Expr:
    return sympy.Max(x, 0) + 1


def _kind(x: Captured | Seed) -> str:
    if x.dtype == torch.bool:
        return "bool"
    return "float" if x.dtype.is_floating_point else "int"


def _out_order(reading: Reading, layout: Layout, output: fx.Node) -> str:
    """The memory order in which the output needs no copy: as eager lays out its tensor."""
    value = example_value(output)
    if not isinstance(value, torch.Tensor) or value.dim() != len(reading.axes):
        # Its dimensions are changed in place later, as by `squeeze_`.
        return "bhqd"
    letters = dict.fromkeys(layout.batch, "b")
    letters |= dict.fromkeys((*layout.kv_heads, *layout.group), "h")
    letters |= dict.fromkeys(layout.query, "q")
    dims = [d for d, axes in enumerate(reading.axes) if axes]
    dims.sort(key=lambda d: -hint(value.stride(d)))
    order = ""
    for d in dims:
        for axis in reading.axes[d]:
            letter = letters.get(axis, "")
            if letter and letter not in order:
                order += letter
    order += "".join(x for x in "bhq" if x not in order)
    order += "d"
    return order if order in OUT_ORDERS else "bhqd"
