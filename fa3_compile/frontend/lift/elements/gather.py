"""Element rules: reads at computed places.

A gather whose place is exact integer arithmetic of the coordinates is followed, so that a table
of relative positions is read in the kernel and masks that index a padding vector stay masks. One
whose place was itself read for every (q, kv) is not: its result is read instead, once, where the
program has it in memory; a score_mod's is not.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import sympy
import torch
from sympy import And
from sympy.logic.boolalg import Boolean
from torch import fx

from fa3_compile.frontend.lift.captured import Captured, is_by_distance
from fa3_compile.frontend.lift.elements.casts import cast
from fa3_compile.frontend.lift.elements.movement import (
    MAX_SLICE,
    dimension,
    read_inside,
    slice_arguments,
)
from fa3_compile.frontend.lift.lift import (
    Cheaper,
    Element,
    Index,
    Lifter,
    Opaque,
    element_of,
    number,
    shape_of,
    sym,
    truth,
)
from fa3_compile.spec.expr import Expr, depends_on, load, where
from fa3_compile.spec.index import bounds, is_nonnegative, within

aten = torch.ops.aten


def place(node, at: Expr, ctx: Lifter, from_end: Expr | None = None) -> Expr:
    """A gather's position. Negative ones are counted from the end, if that is given; in the places
    of other gathers there are none."""
    inner = at.atoms(load)
    held = bool(ctx.shadow.dynamo_of.get(node))
    if len({y for x in inner if not is_by_distance(x, ctx.loads) for y in x.free_symbols}) > 1:
        if held or not ctx.computes:
            raise Cheaper(node, "places that are read for every element")
    elif inner and not held and not ctx.computes:
        raise Cheaper(node, "places that are read")
    limits = bounds(at, ctx.ranges)
    if from_end is None or limits is not None and is_nonnegative(limits[0]):
        return at
    if at.is_number:
        return at + from_end if at < 0 else at
    return where(at < 0, at + from_end, at)


def positions(node: fx.Node, index: Index, ctx: Lifter) -> Expr:
    """An element of the places that are gathered from. Where a part of it is read by the distance,
    all of it is, if it can be."""
    at = number(ctx.element(node, index))
    if not any(is_by_distance(x, ctx.loads) for x in at.atoms(load)):
        return at
    try:
        whole = number(ctx.load(node, index))
    except Opaque:
        return at
    return whole if all(is_by_distance(x, ctx.loads) for x in whole.atoms(load)) else at


def _gathered(node, source: fx.Node, at: Sequence[Expr], ctx: Lifter) -> Element:
    """What is read there: not, for every query and key, from a row for each query."""
    for i, x in enumerate(at):
        others = {symbol for y in (*at[:i], *at[i + 1 :]) for symbol in y.free_symbols}
        for y in x.atoms(load):
            if is_by_distance(y, ctx.loads) and y.free_symbols & others:
                raise Cheaper(node, "places that are read for every element")
    return ctx.element(source, at)


@element_of(aten.index.Tensor, aten._unsafe_index.Tensor)
def _(node, index, ctx: Lifter) -> Element:
    source, places = node.args
    places = list(places)
    shape = shape_of(source)
    places += [None] * (len(shape) - len(places))
    tensors = [p for p in places if p is not None]
    if any(p.meta["val"].dtype in (torch.bool, torch.uint8) for p in tensors):
        raise Opaque(node, "indexing by a boolean tensor")
    rank = max(p.meta["val"].dim() for p in tensors)
    first = next(d for d, p in enumerate(places) if p is not None)
    last = max(d for d, p in enumerate(places) if p is not None)
    adjacent = all(p is not None for p in places[first : last + 1])
    # Advanced indices that stand together take their place; apart, they come first.
    start = first if adjacent else 0
    gathered = index[start : start + rank]
    rest = [*index[:start], *index[start + rank :]]
    moved: list[Expr] = []
    for d, p in enumerate(places):
        if p is None:
            moved.append(rest.pop(0))
        else:
            at = positions(p, gathered[rank - p.meta["val"].dim() :], ctx)
            moved.append(place(node, at, ctx, from_end=shape[d]))
    return _gathered(node, source, moved, ctx)


def _needs_grad(node: fx.Node, ctx: Lifter) -> bool:
    holders = ctx.shadow.dynamo_of.get(node)
    return not holders or Captured(holders[0], holders[0]).needs_grad


@element_of(aten.embedding.default)
def _(node, index, ctx: Lifter) -> Element:
    weight, places, padding, by_frequency, *_ = (*node.args, *(-1, False)[len(node.args) - 2 :])
    if (padding >= 0 or by_frequency) and _needs_grad(weight, ctx):
        raise Opaque(node, "a table whose gradient leaves rows out, or weighs them")
    at = positions(places, index[:-1], ctx)
    return ctx.element(weight, (place(node, at, ctx), index[-1]))


@element_of(aten.gather.default)
def _(node, index, ctx: Lifter) -> Element:
    source, d, places = node.args[:3]
    d = dimension(d, len(index))
    at = positions(places, index, ctx)
    moved = [*index]
    moved[d] = place(node, at, ctx)
    return _gathered(node, source, moved, ctx)


@element_of(aten.index_select.default)
def _(node, index, ctx: Lifter) -> Element:
    source, d, places = node.args
    d = dimension(d, len(index))
    at = number(ctx.element(places, (index[d],)))
    return ctx.element(source, (*index[:d], place(node, at, ctx), *index[d + 1 :]))


@element_of(aten.copy.default)
def _(node, index, ctx: Lifter) -> Element:
    return cast(node, node.args[1], index, ctx)


@element_of(aten.index_put.default)
def _(node, index, ctx: Lifter) -> Element:
    """x[mask] = value and x[rows, columns] = value, of one number."""
    base, places, value, *accumulate = node.args
    given = [(d, p) for d, p in enumerate(places) if p is not None]
    if any(accumulate):
        raise Opaque(node, "a write that adds up")
    if value.meta["val"].numel() != 1:
        raise Opaque(node, "a write of as many values as there are places")
    (d, first), *more = given
    if first.meta["val"].dtype == torch.bool and not more:
        written = truth(ctx.element(first, index[d : d + first.meta["val"].dim()]))
    else:
        written = _is_written(node, [(index[d], p) for d, p in given], ctx)
    put = ctx.element(value, (sympy.S.Zero,) * value.meta["val"].dim())
    kept = ctx.element(base, index)
    if node.meta["val"].dtype == torch.bool:
        put, kept = truth(put), truth(kept)
        return sympy.Or(sympy.And(written, put), sympy.And(sympy.Not(written), kept))
    return where(written, number(put), number(kept))


def _is_written(node: fx.Node, places: list[tuple[Expr, fx.Node]], ctx: Lifter) -> Boolean:
    """Whether an element at these positions is one that the tensors beside them name together.
    Along each of their axes one of them has to count: a row that is written says which."""
    if (triangle := _in_triangle(places, ctx)) is not None:
        return triangle
    rank = max(p.meta["val"].dim() for _, p in places)
    shape = torch.broadcast_shapes(*(p.meta["val"].shape for _, p in places))
    axes = [sympy.Dummy(integer=True, nonnegative=True) for _ in range(rank)]
    outer, ctx.ranges = ctx.ranges, {**ctx.ranges, **dict(zip(axes, map(sym, shape)))}
    try:
        named = [(at, _at_axes(p, axes, ctx)) for at, p in places]
        kept = [is_nonnegative((bounds(x, ctx.ranges) or (-sympy.S.One,))[0]) for _, x in named]
    finally:
        ctx.ranges = outer
    counted = {a: at - (x - a) for at, x in named for a in axes if not depends_on(x - a, axes)}
    if not all(kept) or any(size != 1 and a not in counted for a, size in zip(axes, shape)):
        raise Opaque(node, "a write to places that are read")
    counted = {a: counted.get(a, sympy.S.Zero) for a in axes}
    reached = [(counted[a], sym(n)) for a, n in zip(axes, shape)]
    inside = [And(x >= 0, x < n) for x, n in reached if not within(x, n, ctx.ranges)]
    return And(*inside, *(sympy.Eq(at, x.xreplace(counted)) for at, x in named))


def _in_triangle(places: list[tuple[Expr, fx.Node]], ctx: Lifter) -> Boolean | None:
    """Whether an element is in the triangle whose rows and columns `triu_indices` or `tril_indices`
    list; None of other places."""
    listed = [_listed(p) for _, p in places]
    indices = listed[0][0]
    if sorted(i for _, i in listed) != [0, 1] or any(x is not indices for x, _ in listed):
        return None
    if indices.target not in (aten.triu_indices.default, aten.tril_indices.default):
        return None
    row, column = (at for _, at in sorted((i, at) for (_, i), (at, _) in zip(listed, places)))
    rows, columns, offset = map(sym, (*indices.args, 0)[:3])
    upper = indices.target is aten.triu_indices.default
    distance = column - row
    inside = [x < n for x, n in ((row, rows), (column, columns)) if not within(x, n, ctx.ranges)]
    return And(distance >= offset if upper else distance <= offset, *inside)


def _listed(places: fx.Node) -> tuple[fx.Node, int]:
    """(x, i) of x[i], and -1 for i of anything else."""
    if places.target is aten.select.int and places.args[1] == 0:
        return places.args[0], places.args[2]  # pyright: ignore[reportReturnType]
    taken = places.args[0] if places.target is operator.getitem else None
    if isinstance(taken, fx.Node) and taken.target is aten.unbind.int and len(taken.args) == 1:
        return taken.args[0], places.args[1]  # pyright: ignore[reportReturnType]
    return places, -1


def _at_axes(places: fx.Node, axes: list[sympy.Dummy], ctx: Lifter) -> Expr:
    shape = places.meta["val"].shape
    if places.meta["val"].dtype in (torch.bool, torch.uint8):
        raise Opaque(places, "indexing by a boolean tensor")
    own = zip(axes[len(axes) - len(shape) :], shape)
    return number(ctx.element(places, [sympy.S.Zero if n == 1 else a for a, n in own]))


@element_of(aten.slice_scatter.default)
def _(node, index, ctx: Lifter) -> Element:
    base, patch, *rest = node.args
    _, d, start, stop, step = slice_arguments(base, *rest)
    size, whole = shape_of(patch)[d], shape_of(base)[d]
    start, stop, step = sym(start), sym(stop), sym(step)
    if step != 1:
        raise Opaque(node, "a strided write")
    if stop == MAX_SLICE:
        start = whole - size  # the last so many
    elif start.is_negative and whole.is_Integer:
        start = sympy.Max(start + whole, 0)
    elif not is_nonnegative(start):
        raise Opaque(node, "a write to a slice that begins at an unknown place")
    at = index[d] - start
    low, high = bounds(at, ctx.ranges) or (None, None)
    inside = [] if low is not None and is_nonnegative(low) else [at >= 0]
    inside += [] if high is not None and is_nonnegative(size - 1 - high) else [at < size]
    patched = ctx.element(patch, (*index[:d], at, *index[d + 1 :]))
    if not inside:
        return patched
    patched = number(read_inside(patched, index[d], start, size, node, ctx))
    kept = number(ctx.element(base, index))
    value = where(sympy.And(*inside), patched, kept)
    return sympy.Ne(value, 0) if node.meta["val"].dtype == torch.bool else value
