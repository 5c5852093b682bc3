"""V in parts: w[:, :n] @ v + w[:, n:] @ u, of one softmax w, is w @ cat([v, u])."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from torch import fx

from fa3_compile.frontend.detect.product import several_elements
from fa3_compile.frontend.detect.weights import Weights
from fa3_compile.frontend.lift.lift import Index
from fa3_compile.spec.expr import KV, Expr
from fa3_compile.spec.index import same


@dataclass
class Part:
    """A product of weights with V or a part of it: where it is read, its keys, and its weights."""

    batch: Index
    row: Expr
    column: Expr
    keys: Expr
    values: fx.Node
    values_index: Index
    weights: Weights
    alpha: Expr

    @property
    def start(self) -> Expr:
        """Which of the softmax's keys is its first."""
        term = self.weights.terms[0]
        return sympy.expand(term.at[term.softmax.dim] - KV)

    def is_beside(self, other: Part) -> bool:
        """Whether the other one is of the same rows, weighed by the softmax alone as this one."""
        [own, *_], [term, *more] = self.weights.terms, other.weights.terms
        dim = term.softmax.dim
        alike = (self.column, self.alpha, own.coefficient, own.zeroed) == (
            *(other.column, other.alpha, term.coefficient, term.zeroed),
        )
        # Loads are told apart by their place in these lists.
        alike = alike and self.weights.loads == other.weights.loads
        # One product may have as batches what another one has as rows.
        rows = all(same(x, y) for d, (x, y) in enumerate(zip(own.at, term.at)) if d != dim)
        return alike and rows and not more and term.weight == 1 and term.kept == sympy.true


def side_by_side(parts: list[Part]) -> list[Part]:
    """The parts in the order of their keys. `Decline` unless these are without gaps, and nothing
    but the softmax weighs them."""
    ends = [x.start + x.keys for x in parts]
    ordered = [x for x in parts if not any(same(x.start, end) for end in ends)][:1]
    for _ in parts[1:]:
        ordered += [x for x in parts if same(x.start, ordered[-1].start + ordered[-1].keys)][:1]
    if len(ordered) < len(parts) or not all(map(ordered[0].is_beside, ordered)):
        raise several_elements()
    return ordered
