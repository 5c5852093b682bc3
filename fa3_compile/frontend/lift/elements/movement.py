"""Element rules: operators that only move elements. The index changes, the value does not."""

from __future__ import annotations

import operator

import sympy
import torch
from torch import fx

from fa3_compile.frontend.lift.lift import (
    Cheaper,
    Element,
    Lifter,
    Opaque,
    element_of,
    number,
    shape_of,
    sym,
    truth,
)
from fa3_compile.spec.expr import Expr, floordiv, load, mod, where
from fa3_compile.spec.index import bounds, is_nonnegative, remainder, reshape_index

aten = torch.ops.aten
MAX_SLICE = (1 << 63) - 1


def dimension(d: int, rank: int) -> int:
    return d + rank if d < 0 else d


def read_inside(
    element: Element, axis: Expr, start: Expr | int, size: Expr, node: fx.Node, ctx: Lifter
) -> Element:
    """An element that counts only where `axis` is in [start, start + size), without reads
    elsewhere: its loads wrap around there. `Opaque` where it may as well be read as a whole."""
    if not element.atoms(load):
        return element
    if node not in ctx.inside:
        raise Opaque(node, "a seam between values that are read")
    if not axis.is_Symbol:
        raise Opaque(node, "scores are put together or padded at computed places, not key by key")
    wrapped = {axis: mod(axis - start, size) + start}
    return element.xreplace({x: x.xreplace(wrapped) for x in element.atoms(load)})


@element_of(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _(node, index, ctx: Lifter) -> Element:
    source = node.args[0]
    moved = reshape_index(index, shape_of(node), shape_of(source), ctx.ranges)
    found = ctx.element(source, moved)
    if isinstance(ctx, Lifter) and not ctx.computes and node not in ctx.inside:
        before = {x for i in index for x in i.atoms(floordiv, mod)}
        divided = {x for i in moved for x in i.atoms(floordiv, mod)} - before
        # Divisions for every element by numbers that a kernel is not built for.
        if found.has(load) and any(not x.args[1].is_number for x in divided):
            raise Cheaper(node, "places found by dividing by sizes that change")
    return found


@element_of(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default)
def _(node, index, ctx: Lifter) -> Element:
    source = node.args[0]
    if node.target is aten.unsqueeze.default:
        d = dimension(node.args[1], len(index))
        return ctx.element(source, (*index[:d], *index[d + 1 :]))
    rank = len(source.meta["val"].shape)
    dims = range(rank) if len(node.args) < 2 else node.args[1]
    dims = {dimension(d, rank) for d in ([dims] if isinstance(dims, int) else dims)}
    rest, moved = list(index), []
    for d, size in enumerate(source.meta["val"].shape):
        dropped = d in dims and isinstance(size, int) and size == 1
        moved.append(sympy.S.Zero if dropped else rest.pop(0))
    return ctx.element(source, moved)


@element_of(aten.permute.default)
def _(node, index, ctx: Lifter) -> Element:
    moved = [sympy.S.Zero] * len(index)
    for i, d in zip(index, node.args[1], strict=True):
        moved[dimension(d, len(index))] = i
    return ctx.element(node.args[0], moved)


@element_of(aten.transpose.int, aten.t.default)
def _(node, index, ctx: Lifter) -> Element:
    a, b = node.args[1:3] if len(node.args) > 2 else (0, 1)
    moved = list(index)
    if len(moved) > 1:
        moved[a], moved[b] = moved[b], moved[a]
    return ctx.element(node.args[0], moved)


@element_of(aten.expand.default)
def _(node, index, ctx: Lifter) -> Element:
    source = node.args[0]
    rank = len(source.meta["val"].shape)
    return ctx.element(source, index[len(index) - rank :])


@element_of(aten.slice.Tensor)
def _(node, index, ctx: Lifter) -> Element:
    source, d, start, stop, step = slice_arguments(*node.args)
    moved = list(index)
    size = shape_of(source)[d]
    start = sym(start)
    if start.is_Integer and size.is_Integer:
        start = min(max(start + size if start < 0 else start, sympy.S.Zero), size)
    elif (stop, step) == (MAX_SLICE, 1):
        start = size - shape_of(node)[d]  # the last so many
    elif not is_nonnegative(start):
        raise Opaque(node, "a slice that begins at an unknown place")
    moved[d] = start + sym(step) * moved[d]
    return ctx.element(source, moved)


def slice_arguments(source: fx.Node, d=None, start=None, stop=None, step=None):
    """The arguments of a slice of `source`, with its defaults; sizes as numbers."""
    rank = len(source.meta["val"].shape)
    values = [x.meta["val"] if isinstance(x, fx.Node) else x for x in (start, stop, step)]
    start, stop, step = values
    return (
        source,
        dimension(d or 0, rank),
        0 if start is None else start,
        MAX_SLICE if stop is None else stop,
        1 if step is None else step,
    )


@element_of(aten.select.int)
def _(node, index, ctx: Lifter) -> Element:
    source, d, i = node.args
    d = dimension(d, len(source.meta["val"].shape))
    at = sym(i)
    if at.is_negative:
        at += shape_of(source)[d]
    return ctx.element(source, (*index[:d], at, *index[d:]))


@element_of(aten.cat.default)
def _(node, index, ctx: Lifter) -> Element:
    parts = node.args[0]
    d = dimension(node.args[1] if len(node.args) > 1 else 0, len(index))
    parts = [p for p in parts if p.meta["val"].dim() == len(index)]
    at, start = index[d], sympy.S.Zero
    limits = bounds(at, ctx.ranges)
    answer: Element | None = None
    pieces = []
    for part in parts:
        size = shape_of(part)[d]
        pieces.append((start, size, part))
        start += size
    for begin, size, part in pieces:
        if (
            limits is not None
            and is_nonnegative(limits[0] - begin)
            and is_nonnegative(begin + size - 1 - limits[1])
        ):
            return ctx.element(part, (*index[:d], at - begin, *index[d + 1 :]))
    for begin, _, part in reversed(pieces):
        element = ctx.element(part, (*index[:d], at - begin, *index[d + 1 :]))
        element = read_inside(element, at, begin, shape_of(part)[d], node, ctx)
        if answer is None:
            answer = element
        elif node.meta["val"].dtype == torch.bool:
            inside = at - begin < shape_of(part)[d]
            answer = sympy.Or(
                sympy.And(inside, truth(element)), sympy.And(sympy.Not(inside), truth(answer))
            )
        else:
            answer = where(at - begin < shape_of(part)[d], number(element), number(answer))
    if answer is None:
        raise Opaque(node, "an empty concatenation")
    return answer


@element_of(aten.repeat.default)
def _(node, index, ctx: Lifter) -> Element:
    source = node.args[0]
    shape = shape_of(source)
    moved = [
        remainder(i, size, ctx.ranges)
        for i, size in zip(index[len(index) - len(shape) :], shape, strict=True)
    ]
    return ctx.element(source, moved)


@element_of(aten.flip.default)
def _(node, index, ctx: Lifter) -> Element:
    source, dims = node.args
    flipped = {dimension(d, len(index)) for d in dims}
    shape = shape_of(source)
    moved = [shape[d] - 1 - i if d in flipped else i for d, i in enumerate(index)]
    return ctx.element(source, moved)


@element_of(aten.constant_pad_nd.default)
def _(node, index, ctx: Lifter) -> Element:
    source, padding = node.args[:2]
    value = node.args[2] if len(node.args) > 2 else 0
    shape = shape_of(source)
    moved, inside = list(index), []
    padded: list[tuple[int, Expr]] = []
    for n in range(len(padding) // 2):
        d = len(index) - 1 - n
        before = sym(padding[2 * n])
        moved[d] = index[d] - before
        padded += [(d, before)] if before != 0 or sym(padding[2 * n + 1]) != 0 else []
        low, high = bounds(moved[d], ctx.ranges) or (None, None)
        if low is None or high is None:
            inside += [moved[d] >= 0, moved[d] < shape[d]]
            continue
        if is_nonnegative(-1 - high) or is_nonnegative(low - shape[d]):
            return _logical(value) if node.meta["val"].dtype == torch.bool else sym(value)
        inside += [] if is_nonnegative(low) else [moved[d] >= 0]
        inside += [] if is_nonnegative(shape[d] - 1 - high) else [moved[d] < shape[d]]
    element = ctx.element(source, moved)
    if not inside:
        return element
    for d, before in padded:
        element = read_inside(element, index[d], before, shape[d], node, ctx)
    within = sympy.And(*inside)
    if node.meta["val"].dtype == torch.bool:
        outside = sympy.And(sympy.Not(within), _logical(value))
        return sympy.Or(sympy.And(within, truth(element)), outside)
    return where(within, number(element), sym(value))


def _logical(value) -> Element:
    return sympy.true if value else sympy.false


@element_of(aten.split_with_sizes.default, aten.unbind.int, aten.split.Tensor)
def _(node, index, ctx: Lifter) -> Element:
    raise Opaque(node, "a tuple has no element")


@element_of(operator.getitem)
def _(node, index, ctx: Lifter) -> Element:
    split, n = node.args
    if split.target is aten.native_dropout.default and n == 0:
        if len(split.args) > 2 and split.args[2] and split.args[1] != 0:
            raise Opaque(node, "dropout")
        return ctx.element(split.args[0], index)
    if split.target is aten.unbind.int:
        source = split.args[0]
        d = dimension(split.args[1] if len(split.args) > 1 else 0, len(index) + 1)
        return ctx.element(source, (*index[:d], sympy.Integer(n), *index[d:]))
    if split.target is aten.split_with_sizes.default:
        source, sizes = split.args[:2]
        start = sum((sym(size) for size in sizes[:n]), sympy.S.Zero)
    elif split.target is aten.split.Tensor:
        source, size = split.args[:2]
        start = n * sym(size)
    else:
        raise Opaque(node, f"an output of {split.target}")
    d = dimension(split.args[2] if len(split.args) > 2 else 0, len(index))
    moved = list(index)
    moved[d] = moved[d] + start
    return ctx.element(source, moved)
