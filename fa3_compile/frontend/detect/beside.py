"""Scores of keys side by side: softmax(cat([q k, q l])), of several products of the same queries.

A row of them is the product of q and the concatenation of k and l, which is read for them: keys of
memory, or of the whole and its surroundings, under one softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import sympy
from sympy.core.relational import Relational

from fa3_compile.errors import Decline
from fa3_compile.frontend.detect.product import Dot, Products, several_elements
from fa3_compile.frontend.lift.lift import shape_of
from fa3_compile.frontend.region import Operand, Pair
from fa3_compile.spec.expr import KV, Expr, depends_on
from fa3_compile.spec.index import Ranges, same

HINT = "Put keys and values side by side: softmax(q @ cat([k, l]).mT) @ cat([v, w]) is the same."


def side_by_side(element: Expr, products: Products, ranges: Ranges) -> list[Dot]:
    """The products that the scores' element is made of, each by its own keys, in the order in
    which these fill the keys of the scores without a gap. `Decline` if they do not, or if the
    element of a key has another key's product in it."""
    dots = [*products.dots]
    places = [(start, dot) for dot in dots if (start := _start(dot, ranges)) is not None]
    alone = [dot for dot in dots if _of_one_key(dot)]
    found: list[Dot] = []
    filled: Expr = sympy.S.Zero
    while len(found) < len(dots):
        following = [dot for start, dot in places if same(start, filled)]
        here = _within(element, filled, sympy.S.One).free_symbols
        own = following or [dot for dot in alone if products.dots[dot] in here]
        if not own:
            raise several_elements()
        present = _within(element, filled, own[0].keys).free_symbols
        if present & {*products.dots.values()} != {products.dots[own[0]]}:
            raise several_elements()
        found.append(Dot(own[0].node, tuple(i.subs(KV, KV + filled) for i in own[0].index)))
        filled += found[-1].keys
    if not same(filled, ranges[KV]):
        raise several_elements()
    return found


def _within(element: Expr, start: Expr, keys: Expr) -> Expr:
    """The element of these keys: conditions that hold for all of them, or for none, decided."""
    decided = {}
    for condition in element.atoms(Relational):
        # From the first key on, and back from the last.
        for at in (start + KV, start + keys - 1 - KV):
            answer = condition.subs(KV, at)
            if answer in (sympy.true, sympy.false):
                decided[condition] = answer
    return element.xreplace(decided)


def _start(dot: Dot, ranges: Ranges) -> Expr | None:
    """Which of the scores' keys is the product's first; None if it is not read key by key."""
    *batch, row, column = dot.index
    keys = [x for x in (row, column) if depends_on(x, [KV])]
    if len(keys) != 1 or any(depends_on(x, [KV]) for x in batch):
        return None
    start = (KV - keys[0]).expand()
    return None if depends_on(start, ranges) else start


def _of_one_key(dot: Dot) -> bool:
    """Whether the product has one key, whose place no index tells."""
    return shape_of(dot.node)[-1] == 1 and not any(depends_on(x, [KV]) for x in dot.index)


def paired(pairs: Sequence[Pair], dots: Sequence[Dot]) -> Pair:
    """The products of the same queries as one, of the keys of all. `Decline` of other queries."""
    first = pairs[0]
    if not all(_reads_same(x.query, first.query) for x in pairs) or any(
        x.contracted != first.contracted for x in pairs
    ):
        raise Decline(
            "queries-apart",
            first.query.source,
            "Take the scores of all keys from the same queries.",
            message="products of different queries have their scores side by side",
        )
    keys = [replace(x.key, length=dot.keys) for x, dot in zip(pairs, dots, strict=True)]
    return replace(first, key=replace(keys[0], behind=keys[1:]))


def _reads_same(a: Operand, b: Operand) -> bool:
    return (a.source, a.since, a.view, a.place.index, a.place.cast) == (
        *(b.source, b.since, b.view, b.place.index, b.place.cast),
    )
