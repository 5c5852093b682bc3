"""What V is weighed by: softmaxes, each times factors that come after it.

Dropout, gates, masks multiplied in or filled with 0, and differences of softmaxes all stand
between a softmax and the product with V. The weight of element (query, key) is read as a sum of
terms; a product is linear in its weights, so that each term is an attention of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.detect.weight_terms import apart, beside_softmaxes, weight_terms
from fa3_compile.frontend.lift.captured import Captured, Seed
from fa3_compile.frontend.lift.lift import Index, Lifter, number, shape_of
from fa3_compile.frontend.lift.placeholders import (
    ROW_SUM,
    held,
    prob,
    row_total,
    weighed_total,
    without_some,
    zeroed_prob,
)
from fa3_compile.frontend.shadow.normalize import Softmax, added_up
from fa3_compile.frontend.shadow.trace import Shadow
from fa3_compile.spec.expr import KV, Expr, depends_on, uniform, where
from fa3_compile.spec.index import Ranges, same, within
from fa3_compile.spec.selects import replaced


@dataclass
class Term:
    """coefficient * weight * softmax[at], and 0 where `kept` does not hold."""

    softmax: Softmax
    at: Index
    # Free of the key: it may as well multiply the output.
    coefficient: Expr
    weight: Expr
    kept: Boolean
    # NaN of rows without keys was replaced by 0 right after the softmax.
    zeroed: bool
    # Where the product with V is divided by the rows' sums, if that comes after it.
    divided_at: Index | None = None

    @property
    def may_be_gated(self) -> bool:
        """Whether V is weighed by a softmax by hand alone, over sums that gates may have any sign
        in, whose rows without keys are NaN."""
        summed = self.softmax.summed
        if summed is None or added_up(summed).sizes or self.softmax.dead_rows_zero:
            return False
        return self.weight == 1 and self.kept == sympy.true and not self.zeroed

    def gate(self, gates: Expr) -> None:
        """Weighs by the softmax times gates, over the sum of that."""
        self.weight *= gates
        self.coefficient /= ROW_SUM

    def merge_into(self, score: Expr) -> Expr:
        """What weights without a softmax are, given what they were before their factors, which
        are none of the term's then."""
        merged = where(self.kept, score * self.weight, 0)
        self.weight, self.kept = sympy.S.One, sympy.true
        return merged


@dataclass
class Weights:
    """All of V's weight, with what its loads read and the dropouts that it absorbs.

    beside  what is added to the softmaxes: the product with V has it in common with them
    """

    terms: list[Term]
    beside: Expr
    loads: list[Captured | Seed]
    dropouts: list[fx.Node]
    # The Dynamo node in whose place loads are read.
    read_at: fx.Node
    # The type in which the product with V has them.
    dtype: torch.dtype


def weights(
    shadow: Shadow,
    softmaxes: Sequence[Softmax],
    node: fx.Node,
    index: Index,
    ranges: Ranges,
    at: fx.Node,
    read_at: fx.Node,
) -> Weights:
    """The weight at [index] of `node`, in terms of the softmaxes; `Decline` at `at` if it is no
    sum of them. Loads are read at `read_at`."""
    special = {s.node: _element_of(n) for n, s in enumerate(softmaxes)}
    special |= {s.summed: _row_sum for s in softmaxes if s.summed and not s.normalizes}
    dtype = node.meta["val"].dtype
    lifter = Lifter(shadow, ranges, special, weighs=True, result=dtype, read_at=read_at)
    lifter.adding_up = {
        n: s.dim
        for n, s in enumerate(softmaxes)
        if s.adds_up and same(shape_of(s.node)[s.dim], ranges[KV])
    }
    element = number(lifter.element(node, index))
    entries: dict[prob, list[tuple[Expr, Boolean]]] = {}
    found = weight_terms(element)
    beside = beside_softmaxes(found or [])
    softmax_alone = beside == 0 or all(s.normalizes for s in softmaxes)
    if not found or not element.has(prob) or not softmax_alone or beside.has(uniform):
        raise Decline(
            "softmax-result-changed" if element.has(prob) else "no-softmax",
            at,
            "Weigh V by each of what is added up alone, and add the results."
            if beside != 0
            else "Between the softmax and V only factors may stand: apply anything else to the "
            "output, or inside the score.",
            message="a dropout is of the sum of a softmax and other weights, which lose the same "
            "elements"
            if beside.has(uniform)
            else f"V is weighted by {element}",
        )
    for factor, kept, which in found:
        if which is not None:
            entries.setdefault(which, []).append((factor, kept))
    ones = _sums_that_are_one(entries)  # or NaN, which conditions tell from 1
    beside = replaced(beside, ones, in_conditions=False)
    terms = []
    for which, parts in sorted(entries.items(), key=lambda x: str(x[0])):
        softmax = softmaxes[int(which.args[0])]
        kept = sympy.Or(*(k for _, k in parts))
        factor = parts[0][0] if len(parts) == 1 else sympy.Add(*(where(k, f, 0) for f, k in parts))
        factor = without_some(sympy.sympify(factor))
        coefficient, weight = apart(replaced(factor, ones, in_conditions=False))
        if softmax.normalizes:
            own = weighed_total.of(weight, kept, which)
            coefficient = coefficient.xreplace({own: ROW_SUM})
            _check_no_total([coefficient, weight, kept, beside], at)
        else:
            kept = without_some(kept)
            softmax = replace(softmax, dim=_keys_at(which.args[1:], at))
            coefficient = _of_own_row(coefficient, softmax, which.args[1:])
            changed = weight != 1 or kept != sympy.true
            if softmax.summed and (coefficient.has(row_total) or changed):
                raise _other_sums(at)
        _check_inside(softmax, which.args[1:], kept, ranges, at)
        zeroed = isinstance(which, zeroed_prob)
        terms.append(Term(softmax, which.args[1:], coefficient, weight, kept, zeroed))
    return Weights(terms, without_some(beside), lifter.loads, lifter.dropouts, read_at, dtype)


def _sums_that_are_one(entries: dict[prob, list[tuple[Expr, Boolean]]]) -> dict[Expr, Expr]:
    """1 for the sum of a row of each softmax that V is weighed by for all keys: where the sum is
    NaN, so is the output."""
    whole = [p for p, parts in entries.items() if sympy.Or(*(k for _, k in parts)) == sympy.true]
    whole = [p for p in whole if not isinstance(p, zeroed_prob)]
    return {weighed_total.of(sympy.S.One, sympy.true, p): sympy.S.One for p in whole}


def _check_inside(softmax: Softmax, at: Index, kept: Boolean, ranges: Ranges, node: fx.Node):
    """`Decline` of weights that are read, where they are kept, at places which run out of them
    elsewhere."""
    places = enumerate(zip(at, shape_of(softmax.node), strict=True))
    others = [(x, n) for d, (x, n) in places if d != softmax.dim]
    if not all(within(x, n, ranges) for x, n in others if depends_on(x, kept.free_symbols)):
        raise Decline(
            "operand-unclear",
            node,
            "Put queries and keys in that order before their product, or the output after it.",
            message="weights of other heads, rows or batches are put together before they weigh V, "
            "as by cat or pad",
        )


def _check_no_total(parts: Sequence[Expr | Boolean], at: fx.Node) -> None:
    if any(x.has(weighed_total) for x in parts):
        raise _other_sums(at)


def _other_sums(at: fx.Node) -> Decline:
    return Decline(
        "row-sums",
        at,
        "Divide each row of weights by its own sum over the keys.",
        message="weights are divided by the sums of other weights, or of other rows",
    )


def _row_sum(index: Index) -> Expr:
    return row_total(*index)


def _keys_at(at: Index, node: fx.Node) -> int:
    """The dimension of weights without a softmax that runs over the keys."""
    dims = [d for d, x in enumerate(at) if x == KV]
    if len(dims) != 1:
        raise Decline(
            "product-axes",
            node,
            "One axis of the weights has to be the keys.",
            message="no axis of the weights is that of the product with V",
        )
    return dims[0]


def _of_own_row(coefficient: Expr, softmax: Softmax, at: Index) -> Expr:
    """The coefficient in terms of its row's sum, where it has that."""
    if softmax.summed is None:
        return coefficient
    dim = softmax.dim
    kept = [sympy.S.Zero] if len(softmax.summed.args) > 2 and softmax.summed.args[2] else []
    own = row_total(*at[:dim], *kept, *at[dim + 1 :])
    dims = [int(d) % len(at) for d in softmax.summed.args[1]]  # pyright: ignore
    if dims != [dim]:
        return coefficient
    constant = added_up(softmax.summed).constant
    return coefficient.xreplace({own: held(ROW_SUM) if constant else ROW_SUM})


def _element_of(n: int):
    return lambda index: prob(sympy.Integer(n), *index)
