"""Which axes of an attention are batch, heads and queries."""

from __future__ import annotations

import sympy
from sympy.core.relational import Relational

from fa3_compile.errors import Decline
from fa3_compile.frontend.detect.detect import Reading, Skeleton
from fa3_compile.frontend.region import Layout, Operand, Pair
from fa3_compile.spec.expr import KV, Expr, Q, floordiv, load, mod
from fa3_compile.spec.index import divide, remainder, simplify_index


def axes_of(*operands: Operand) -> set[sympy.Symbol]:
    """The axes that run along any of the operands."""
    return {axis.symbol for x in operands for part in x.parts for axis in part.axes}


def layout_of(reading: Reading, skeleton: Skeleton) -> Layout:
    """Axes that K or V are indexed by are batch and KV heads; of the others, the rows' are
    queries and the rest share their KV head."""
    every = [a for dim in reading.axes for a in dim]
    in_query = axes_of(*(pair.query for pair in reading.pairs))
    in_key, in_value = axes_of(*(pair.key for pair in reading.pairs)), axes_of(reading.value)
    strides = {a: reading.head_dim.coeff(a) for a in reading.head_dim.free_symbols & {*every}}
    head_dim = sorted(strides, key=lambda a: (-_large(strides[a]), a.name))
    if {*head_dim} & (in_query | in_key):
        raise Decline(
            "axes-unclear",
            skeleton.output,
            "Give V a last axis of its own, which neither Q nor K has.",
            message="the head dimension of V is also an axis of Q or K",
        )
    order = _order(reading, every)
    rest = [a for a in order if a not in head_dim]
    shared = [a for a in rest if a in in_key | in_value]
    free = [a for a in rest if a not in shared]
    row = reading.rows[-1].free_symbols
    queries = _queries(reading, [a for a in free if a in row])
    queries = queries or [a for a in free if a in in_query][-1:]
    if KV not in in_value or not all(map(_is_pair, reading.pairs)):
        raise Decline(
            "operand-unclear",
            skeleton.output,
            "Give the products tensors with an axis of keys and an axis of the head dimension.",
            message="K or V is the same for every key, or Q or K along the head dimension",
        )
    free = [a for a in free if a not in queries]
    if len(shared) >= 2:
        batch, kv_heads = shared[:-1], shared[-1:]
        before = [a for a in free if order.index(a) < order.index(shared[0])]
        group = [a for a in free if a not in before]
        if before and len(batch) + len(before) > 2:
            group, before = free, []
        batch = before + batch
    elif shared:
        before = [a for a in free if order.index(a) < order.index(shared[0])]
        group = [a for a in free if a not in before]
        if before:
            batch, kv_heads = before, shared
        else:
            batch, kv_heads = shared, []
    else:
        batch, kv_heads, group = free[:1], [], free[1:]
    return Layout(batch, kv_heads, group, queries, head_dim, dict(reading.sizes))


def _is_pair(pair: Pair) -> bool:
    """Whether the keys differ, and both sides have what is contracted."""
    contracted = {*pair.axes}
    return {KV} | contracted <= axes_of(pair.key) and contracted <= axes_of(pair.query)


def _queries(reading: Reading, rows: list[sympy.Symbol]) -> list[sympy.Symbol]:
    """The axes of queries among those that the rows of one product run over, which others have as
    heads: all of them, if the scores do not tell one from another; those that are compared with
    keys; else the last."""
    if len(rows) < 2:
        return rows
    term = reading.term
    weights = (term.weight, term.kept, term.coefficient, reading.beside)
    fields = (reading.score, *reading.scores.sinks, *weights)
    ranges = {**reading.sizes, KV: reading.key_length}
    ranges[Q] = sympy.Mul(*(reading.sizes[a] for a in rows))
    whole = places(Q, rows, reading.sizes, ranges)
    divided = {x for f in fields for x in substituted(f, whole, ranges).atoms(floordiv, mod)}
    if not any(x.has(Q) for x in divided):
        return rows
    conditions = {c for x in fields for c in x.atoms(Relational) if c.has(KV)}
    bare = [c.replace(load, lambda *_: sympy.Dummy(real=True)) for c in conditions]
    compared = {x for c in bare if c.has(KV) for x in c.free_symbols}
    read = {x for c in conditions for x in c.free_symbols}
    by_place = [a for a in rows if a in compared]
    return by_place or [a for a in rows if a in read][-1:] or rows[-1:]


def places(
    coordinate: Expr, axes: list[sympy.Symbol], sizes: dict, ranges: dict
) -> dict[sympy.Symbol, Expr]:
    """Axes, outermost first, in terms of the coordinate that runs over all of them."""
    found: dict[sympy.Symbol, Expr] = {}
    position = coordinate
    for axis in reversed(axes):
        last = axis == axes[0]
        found[axis] = position if last else remainder(position, sizes[axis], ranges)
        position = divide(position, sizes[axis], ranges)
    return found


def substituted(expr, by: dict[sympy.Symbol, Expr], ranges: dict):
    """The expression with axes replaced by their places."""
    return simplify_index(expr.subs(by, simultaneous=True), ranges)


def _order(reading: Reading, every) -> list[sympy.Symbol]:
    """The axes outermost first, as the product's flattened batch and rows have them."""
    ordered: list[sympy.Symbol] = []
    for position in reading.rows:
        symbols = [s for s in position.free_symbols if s in reading.sizes]
        ordered += sorted(symbols, key=lambda s: (-_large(position.coeff(s)), s.name))
    return [*dict.fromkeys(ordered), *(a for a in every if a not in ordered)]


def _large(stride: Expr) -> Expr:
    """A stride as a number to sort by, dynamic sizes taken as large ones."""
    return stride.subs(dict.fromkeys(stride.free_symbols, 1 << 20))
