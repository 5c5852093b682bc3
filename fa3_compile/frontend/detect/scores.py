"""What a softmax is taken of: the element's score, the sinks beside it, and the product in it."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import sympy
import torch
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.detect import beside, row_terms
from fa3_compile.frontend.detect.joined import joined
from fa3_compile.frontend.detect.logarithms import logarithm, without_gates
from fa3_compile.frontend.detect.product import (
    Dot,
    Products,
    products_before,
    several_elements,
    sides_of,
)
from fa3_compile.frontend.detect.row_terms import RowTerms, Statistic
from fa3_compile.frontend.detect.weights import Term, Weights
from fa3_compile.frontend.lift.lift import (
    Index,
    Lifter,
    Opaque,
    declined,
    descendants,
    number,
    shape_of,
)
from fa3_compile.frontend.lift.placeholders import row_stat, total, without_some
from fa3_compile.frontend.reasons.near_softmax import check_rows, not_exponential, of_its_row
from fa3_compile.frontend.shadow.normalize import Softmax, largest_is_one
from fa3_compile.frontend.shadow.row_statistics import row_statistic, statistic_of
from fa3_compile.frontend.shadow.trace import Shadow
from fa3_compile.spec.expr import KV, Expr, S, depends_on
from fa3_compile.spec.index import Ranges, same, simplify_index

aten = torch.ops.aten
WIDE = (torch.float32, torch.float64)
# What may be taken of the scores before the softmax of V's weights: a softmax, or its logarithm.
INSIDE = (aten._softmax.default, aten._log_softmax.default)
# The most columns beside the keys that a softmax may have: attention sinks.
MOST_SINKS = 4


@dataclass
class Scores:
    """The score of [row, kv] and the sinks of a row, as read around one product or several.

    `s` in the score is the sum of `dots`, each times its factor."""

    dots: list[Dot]
    factors: list[Expr]
    lifter: Lifter
    score: Expr
    sinks: list[Expr] = field(default_factory=list)
    # Whether a maximum was taken off: else a row without keys is 0 / 0 whatever its fill is.
    shifted: bool = True
    # Whether a row that has nothing but fills is another one than the program's.
    fills_show: bool = False
    # Whether the score is less something of its row than what the program has.
    less_row_terms: bool = False
    # Whether `s` is one of the dots instead, that of the key: they have their keys side by side.
    beside: bool = False
    # What exponentials are multiplied by before their sum is taken: the softmax is taken without.
    gates: Expr = sympy.S.One


def read_scores(
    shadow: Shadow,
    term: Term,
    batches: set[sympy.Symbol],
    ranges: Ranges,
    holder: Callable[[fx.Node], fx.Node],
    weights: Weights,
    joins: bool,
) -> Scores:
    """The scores that one term of V's weights is a softmax of, its gates made the term's weight.
    `Decline` where they are none.

    batches  the axes of the product with V that are not its rows or columns
    holder   the Dynamo node that stands for a shadow node
    weights  what was read between the softmax and V, whose loads come first
    joins    whether a sum of products is one; else all but one of them are biases
    """
    softmax = term.softmax
    index, extra = _positions(softmax, term.at, ranges[KV], holder)

    def read(nodes: list[fx.Node], are_beside: bool = False) -> Scores:
        products = Products(nodes, batches)
        return _read(
            shadow, term, products, index, extra, ranges, holder, weights, joins, are_beside
        )

    found = _around_a_product(softmax, holder, read, shadow, joins)
    if found.gates != 1:
        term.gate(found.gates)
    return found


def _around_a_product(softmax: Softmax, holder, read, shadow: Shadow, joins: bool) -> Scores:
    """The reading around a product before the softmax: the largest that can be read around, since
    what the others give, position terms of a few heads, is read from memory. The nearest of equals.
    """
    first: Decline | None = None
    products = sorted(products_before(softmax.scores), key=_extent, reverse=True)
    for node in products:
        try:
            return read([node, *_addends(node, products)] if joins else [node])
        except Opaque as opaque:
            first = first or declined(opaque, shadow)
        except Decline as decline:
            first = first or decline
    if joins and len(products) > 1:
        with contextlib.suppress(Opaque, Decline):
            return read(products, are_beside=True)
    raise first or Decline(
        "no-product",
        holder(softmax.scores),
        "Take the softmax of a product of queries and keys.",
        message="the softmax is not of a product's result",
    )


def _addends(product: fx.Node, others: list[fx.Node]) -> list[fx.Node]:
    """Other products that may be added to one: of as many elements, and neither of the other's."""
    return [
        x
        for x in others
        if x is not product
        and same(_elements(x), _elements(product))
        and not {*sides_of(x)} & descendants([product])
        and not {*sides_of(product)} & descendants([x])
    ]


def _elements(product: fx.Node) -> Expr:
    return sympy.Mul(*shape_of(product))


def _extent(product: fx.Node) -> tuple[int, int]:
    """What products are compared by: dimensions, then elements where their number is known."""
    shape = product.meta["val"].shape
    return len(shape), math.prod(shape) if all(isinstance(n, int) for n in shape) else 0


def _positions(softmax: Softmax, at: Index, key_length: Expr, holder) -> tuple[Index, list[Expr]]:
    """The scores' index, and the positions along the softmax that V does not see."""
    x, dim = softmax.scores, softmax.dim
    offset = sympy.expand(at[dim] - KV)
    rest = sympy.expand(shape_of(x)[dim] - key_length)
    if rest == 0:
        return at, []
    if not (offset.is_Integer and rest.is_Integer and 0 <= offset <= rest <= MOST_SINKS):
        raise Decline(
            "weights-partly-used",
            holder(x),
            beside.HINT
            if len(products_before(x)) > 1
            else "V has to weigh every key of the softmax: mask the others.",
            message=f"V meets {key_length} of the softmax's {shape_of(x)[dim]} positions",
        )
    before = [sympy.Integer(i) for i in range(int(offset))]
    after = [key_length + offset + i for i in range(int(rest - offset))]
    return at, [*before, *after]


def _read(
    shadow: Shadow,
    term: Term,
    products: Products,
    index: Index,
    extra: list[Expr],
    ranges: Ranges,
    holder,
    weights: Weights,
    joins: bool,
    are_beside: bool,
) -> Scores:
    softmax, nodes = term.softmax, products.nodes
    x, dim = softmax.scores, softmax.dim
    around = _around(shadow, products, softmax)

    def lifter_of(products: Products, loads: list) -> Lifter:
        products.lifter = lifter = Lifter(
            shadow,
            ranges,
            {**products.rules},
            wide=all(map(_is_wide, nodes)),
            weighs=not softmax.normalizes,
            result=weights.dtype,
            loads=loads,
            read_at=weights.read_at,
        )
        lifter.special |= {n: _rule(lifter, n, i) for i, n in enumerate(around)}
        return lifter

    lifter = lifter_of(products, weights.loads)
    element = without_some(number(lifter.element(x, index)))
    if are_beside:
        dots = beside.side_by_side(element, products, ranges)
        element = element.xreplace(dict.fromkeys(products.dots.values(), S))
    elif len(nodes) > 1 and (biases := products.biases()):
        alone = Products([n for n in nodes if n not in biases], products.batches)
        return _read(shadow, term, alone, index, extra, ranges, holder, weights, joins, False)
    else:
        products.check(holder(nodes[0]))
        dots = [*products.dots]
    if not are_beside and not all(dot.has_keys(ranges[KV]) for dot in dots):
        raise Decline(
            "keys-apart",
            holder(x),
            beside.HINT,
            message=f"V has {ranges[KV]} keys, and one product of the scores {dots[0].keys}",
        )

    gates: Expr = sympy.S.One
    if softmax.by_hand:
        check_rows(element, holder(x))
        # Without a maximum taken off, they are weights without a softmax: what is too large is
        # infinite, as it is in eager.
        if element.has(row_stat) and term.may_be_gated:
            element, gates = without_gates(element, [S, *products.dots.values()], holder(x))

    def logit(element: Expr) -> Expr:
        return logarithm(element, holder(x)) if softmax.by_hand else element

    score, factors = logit(element), [sympy.S.One] * len(dots)
    shift: Expr = sympy.S.Zero
    shifted, fills_show = True, False
    if softmax.normalizes:
        again = Products(nodes, products.batches)
        again.dots |= products.dots
        outer = lifter_of(again, lifter.loads)
        statistic = functools.partial(_statistic, around=around, lifter=outer, key=index[dim])
        taken_off = RowTerms(score, statistic, outer, holder(x))
        if extra and taken_off.may_be_infinite:
            raise row_terms.row_of_fills(holder(x))
        kept = taken_off.keep_fills(sinks=bool(extra)) if softmax.by_hand else True
        shifted, fills_show = kept is not False, taken_off.shows or kept is None
    if not are_beside:
        score, factors = _joined(score, products, joins)
    if softmax.normalizes:
        score, shift = row_terms.without(score)
    if not shifted:
        score = row_terms.without_underflow(score, x.meta["val"].dtype, shift)
    found = Scores(dots, factors, lifter, score, shifted=shifted, less_row_terms=shift != 0)
    found.beside, found.fills_show, found.gates = are_beside, fills_show, gates
    for position in extra:
        element = number(lifter.element(x, (*index[:dim], position, *index[dim + 1 :])))
        found.sinks.append(logit(element) - shift)
    if softmax.by_hand:
        rest = _rest(softmax, products, index, term.divided_at or index)
        found.sinks += [logarithm(part, holder(x)) - shift for part in rest]
    if found.sinks and gates != 1:
        raise not_exponential(gates, holder(x))
    found.sinks = [_of_the_row(sink, products, holder(x)) for sink in found.sinks]
    if found.score.has(row_stat):
        raise of_its_row(found.score, holder(x))
    found.score = simplify_index(found.score, ranges)
    found.sinks = [simplify_index(sink, ranges) for sink in found.sinks]
    return found


def _joined(score: Expr, products: Products, joins: bool) -> tuple[Expr, list[Expr]]:
    """(the score in `s` alone, each dot's factor)."""
    if len(products.dots) == 1:
        return score, [sympy.S.One]
    found = joined(score, [*products.dots.values()]) if joins else None
    if found is None:
        raise several_elements()
    return found


def _around(shadow: Shadow, products: Products, softmax: Softmax) -> list[fx.Node]:
    """The nodes that stand for something of a row: statistics, and softmaxes in the scores."""
    computed = descendants(products.nodes)
    nodes = [n for n in shadow.graph.nodes if n in computed]
    statistics = [n for n in nodes if row_statistic(n)]
    logarithms = [n for n in nodes if n.target is aten._log_softmax.default]
    softmaxes = [n for n in nodes if n.target is aten._softmax.default]
    return [
        *statistics,
        *(logarithms if softmax.normalizes else []),
        *(softmaxes if softmax.by_hand else []),
    ]


def _rule(lifter: Lifter, node: fx.Node, n: int) -> Callable[[Index], Expr]:
    """The element of node number n of those."""
    if node.target not in INSIDE:
        return lambda index: row_stat(sympy.Integer(n), *index)
    logarithm_inside = _less_row_statistic(lifter, node, n)
    if node.target is aten._log_softmax.default:
        return logarithm_inside
    return lambda index: sympy.exp(logarithm_inside(index))


def _statistic(stat: row_stat, around: list[fx.Node], lifter: Lifter, key: Expr) -> Statistic:
    """What a row statistic is of, at a row's `key`."""
    node, index = around[int(stat.args[0])], stat.args[1:]
    of, dims = (node.args[0], [node.args[1]]) if node.target in INSIDE else statistic_of(node)
    rank = of.meta["val"].dim()
    if len(dims) != 1:
        return Statistic(None, own=False)
    dim = int(dims[0]) % rank
    if len(index) not in (rank, rank - 1):
        return Statistic(None, own=True)
    behind = index[dim + (len(index) == rank) :]
    try:
        element = number(lifter.element(of, (*index[:dim], key, *behind)))
    except Opaque:
        return Statistic(None, own=True)
    more = not same(shape_of(of)[dim], lifter.ranges[KV])
    return Statistic(row_terms.without(without_some(element))[0], own=True, more=more)


def _less_row_statistic(lifter: Lifter, node: fx.Node, n: int):
    """The logarithm of a softmax: x less a statistic of the row."""
    scores = node.args[0]
    dim = int(node.args[1]) % scores.meta["val"].dim()

    def rule(index: Index) -> Expr:
        row = (*index[:dim], *index[dim + 1 :])
        return number(lifter.element(scores, index)) - row_stat(sympy.Integer(n), *row)

    return rule


def _is_wide(node: fx.Node) -> bool:
    return all(n.meta["val"].dtype in WIDE for n in (node, *node.args[-2:]))


def _rest(softmax: Softmax, products: Products, index: Index, divided_at: Index) -> list[Expr]:
    """What a softmax by hand adds to its sum; nothing if that is lost in rounding.

    index       the element of the exponentials
    divided_at  the element of what is divided, on which the divisor is broadcast
    """
    assert softmax.divisor is not None and softmax.summed is not None
    dim = softmax.dim
    keeps = len(softmax.summed.args) > 2 and bool(softmax.summed.args[2])
    row = (*index[:dim], *([sympy.S.Zero] if keeps else []), *index[dim + 1 :])
    lifter = products.lifter
    assert lifter is not None
    special = {**lifter.special, softmax.summed: lambda i: total(*i)}
    outer = Lifter(lifter.shadow, lifter.ranges, special, wide=lifter.wide)
    outer.loads = lifter.loads
    divisor = outer.broadcast(softmax.divisor, divided_at)
    whole = total(*outer._clean(softmax.summed, row))
    eps = torch.finfo(softmax.node.meta["val"].dtype).eps
    if isinstance(divisor, sympy.Max) and largest_is_one(softmax):
        floors = [a for a in divisor.args if a != whole]
        if all(a.is_number and a <= 1 for a in floors):
            divisor = whole
    rest = divisor - whole
    if rest == 0 or (rest.is_number and abs(rest) < eps / 4 and largest_is_one(softmax)):
        return []
    if rest.has(total) or depends_on(rest, [*products.dots.values(), KV]):
        raise Opaque(softmax.divisor, "it is not the sum of the exponentials and a sink")
    return [rest]


def _of_the_row(sink: Expr, products: Products, at: fx.Node) -> Expr:
    sink = sympy.expand(sink) if sink.has(row_stat) else sink
    if sink.has(row_stat):
        raise Decline(
            "sink-of-the-row",
            at,
            "Scale it as the exponentials are: exp(x - m) / (exp(sink - m) + exp(x - m).sum()).",
            message="what is added to the sum of the exponentials is not shifted by the maximum "
            "as they are, so that it depends on the row's largest score",
        )
    if depends_on(sink, [*products.dots.values(), KV]):
        raise Decline(
            "weights-partly-used",
            at,
            "V has to weigh every key of the softmax: mask the others.",
            message="a position of the softmax that V does not see is a score",
        )
    return sink
