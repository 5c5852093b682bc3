"""`Region`: one attention found in a graph, in the terms that a rewrite needs."""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.detect.logsumexp import Lse
from fa3_compile.frontend.detect.operands import Axis, Place, View
from fa3_compile.frontend.dynamo.graph import example_value
from fa3_compile.frontend.lift.captured import Captured, Seed
from fa3_compile.frontend.lift.placeholders import ROW_SUM
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.expr import Expr


@dataclass
class Operand:
    """Q, K or V: the Dynamo node that holds it, and how to see it as atomic axes."""

    source: fx.Node
    # The node since which the source holds the value: itself, or the last write to it.
    since: fx.Node
    place: Place
    view: View | None
    # How many keys it has, and the operands whose keys come behind them, where there are such.
    length: Expr | None = None
    behind: list[Operand] = field(default_factory=list)

    @property
    def parts(self) -> list[Operand]:
        """It and what is behind it along the keys."""
        return [self, *self.behind]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the attention reads it."""
        return self.place.cast or example_value(self.source).dtype

    @property
    def axes(self) -> list[Axis]:
        """The atomic axes of its view."""
        parts = self.view.parts if self.view else ()
        return [part[1] for part in parts if part[0] == "axis"]


@dataclass
class Pair:
    """Queries and keys whose dot products are a part of s, times a factor on the queries."""

    query: Operand
    key: Operand
    # The axes that the product contracts, outermost first, and their sizes.
    contracted: dict[sympy.Symbol, Expr]
    # In b, h, q, free of d and of the key.
    factor: Expr = sympy.S.One

    @property
    def width(self) -> Expr:
        """The head dimension."""
        return sympy.Mul(*self.contracted.values())

    @property
    def axes(self) -> list[sympy.Symbol]:
        """The contracted axes as views have them: one of length 1 is none."""
        return [] if self.width == 1 else [*self.contracted]


def operands_of(pairs: list[Pair], value: Operand) -> list[Operand]:
    """The queries and keys of every pair, and V, part by part."""
    return [x for pair in pairs for x in (pair.query, *pair.key.parts)] + value.parts


@dataclass
class Layout:
    """Which atomic axes make up b, the KV heads, the query heads of a KV head, q and d.

    Axes are symbols; `size` maps each to its size. h = kv_heads, then group.
    """

    batch: list[sympy.Symbol]
    kv_heads: list[sympy.Symbol]
    group: list[sympy.Symbol]
    query: list[sympy.Symbol]
    head_dim: list[sympy.Symbol]
    size: dict[sympy.Symbol, Expr]

    def total(self, axes: list[sympy.Symbol]) -> Expr:
        """The product of the sizes of some axes."""
        return sympy.Mul(*(self.size[a] for a in axes))


@dataclass
class Region:
    """One attention: what to compute, from what, and in which node's place."""

    # The Dynamo node whose value the fused op replaces, its axes outermost first.
    output: fx.Node
    output_axes: list[list[sympy.Symbol]]
    # Dynamo nodes that hold scores or weights: dead once the output is replaced.
    interior: list[fx.Node]
    # The first of them: products of queries and keys.
    products: list[fx.Node]
    # s is the sum of their products: several stand side by side along d.
    pairs: list[Pair]
    value: Operand
    layout: Layout
    key_length: Expr
    spec: AttentionSpec
    # What load(i, ...) reads, and the values of n0, n1, ...
    loads: list[Captured | Seed]
    sizes: list[Expr]
    # A factor on the output, and which of its rows stay, the others being 0; in b, h, q. Their
    # loads, and those of `beside`, read `coefficient_loads`.
    coefficient: Expr = sympy.S.One
    # What else V is weighed by, in b, h, q, kv: a matrix whose product with V the output has added.
    beside: Expr = sympy.S.Zero
    rows: Boolean = sympy.true
    # Whether rows that stay are NaN where they have no key.
    nan_rows: bool = False
    coefficient_loads: list[Captured | Seed] = field(default_factory=list)
    # What the loads of the pairs' factors read.
    factor_loads: list[Captured | Seed] = field(default_factory=list)
    # Dynamo nodes whose random numbers the op draws itself.
    dropouts: list[fx.Node] = field(default_factory=list)
    # Why products that the scores are a sum of could not be read as one, if they could not.
    apart: Decline | None = None
    # What else the op replaces: its LSE.
    statistics: list[Lse] = field(default_factory=list)

    @property
    def reads_sums(self) -> bool:
        """Whether the program uses the sums of rows of weights that no softmax normalises."""
        return bool(self.statistics) or ROW_SUM in self.coefficient.free_symbols

    @property
    def columns_of_ones(self) -> int:
        """How many columns of ones V gets, the first of which gives the sums of rows that a softmax
        and factors after it make; as many as kernels want it to have."""
        return 8 if self.spec.normalized and ROW_SUM in self.coefficient.free_symbols else 0

    @property
    def operands(self) -> list[Operand]:
        """The queries and keys of every pair, and V, part by part."""
        return operands_of(self.pairs, self.value)

    @property
    def width(self) -> Expr:
        """The head dimension of Q and K: that of all pairs and, where they are several, of zeros
        to the next multiple of 8, as kernels want it."""
        return sympy.Add(*(pair.width for pair in self.pairs), self.padding)

    @property
    def padding(self) -> int:
        total = sympy.Add(*(pair.width for pair in self.pairs))
        return -int(total) % 8 if len(self.pairs) > 1 and total.is_Integer else 0
