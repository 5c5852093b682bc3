"""Tensors of two positions that are the same along their diagonals, whatever the lengths are: T5's
buckets of kv - q, whose logarithms are read because their rounding is the program's.

Such a tensor is its first row and its first column, a vector by the distance, and that is what is
read of it. Its numbers are not computed here, only what they are computed from: integers of
positions are followed exactly, and any other element-wise operator is some function of its
operands' elements, the same one in every place.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Iterable

import sympy
import torch
from sympy.core.relational import Relational
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.dynamo.sizes import UnknownScalar, sym
from fa3_compile.frontend.lift.captured import Captured, Diagonals, is_by_distance
from fa3_compile.frontend.lift.elements.casts import EXACT_INTEGERS
from fa3_compile.frontend.lift.elements.movement import slice_arguments
from fa3_compile.frontend.lift.lift import (
    MOST_PARTS,
    RULES,
    Element,
    Index,
    Lifter,
    Opaque,
    number,
    shape_of,
)
from fa3_compile.frontend.lift.same_numbers import INTEGERS, check_same_numbers
from fa3_compile.frontend.shadow.operators import DROPOUT, STOP, UNKNOWN
from fa3_compile.frontend.shadow.same import is_random
from fa3_compile.frontend.shadow.trace import Shadow
from fa3_compile.frontend.shadow.varying import is_element_wise
from fa3_compile.spec.expr import Expr, load, where
from fa3_compile.spec.index import Ranges, bounds

aten = torch.ops.aten
# Element-wise operators that PyTorch does not say so of.
UNTAGGED = (
    aten._to_copy.default,
    aten.copy.default,
    aten.rsub.Tensor,
    aten.floor_divide.default,
    aten.masked_fill.Tensor,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
    aten.where.Scalar,
)
# Whose rules are for what is made of the scores.
REDUCED = (aten.sum.dim_IntList, aten.all.dim, aten.any.dim)
RANDOM = (UNKNOWN, DROPOUT, aten.native_dropout.default)
# Integers up to this are exact in the type; dynamic lengths are below 2**24.
EXACT = {**EXACT_INTEGERS, torch.float64: 1 << 53}
WIDE = (torch.float32, torch.float64)


# In everything that is not known, so that nothing takes it for a number.
A = sympy.Symbol("a", real=True)


class some_number(sympy.Function):
    """`some_number(n, A, *x)`: what operator n computes of x alone, or element [x] of tensor n."""

    is_real = True


class some_integer(sympy.Function):
    """As `some_number`, of integers and booleans."""

    is_integer = True


def by_distance(read: Captured, node: fx.Node, index: Index, ctx: Lifter) -> tuple[Captured, Index]:
    """What is read in the place of element [index] of a tensor, and where, if there is a vector by
    the distance to read: of the tensor, or of its rows at places that are such a vector."""
    shape = shape_of(node)
    # A gradient would go through the gather of the vector, whose own is as large as the tensor.
    if not read.needs_grad and (found := _diagonals_of(node, ctx.shadow)):
        row, column, idle = found
        distance = index[column] - index[row] + shape[row] - 1
        others = (x for d, x in enumerate(index) if d not in (row, column, *idle))
        return read._replace(diagonals=found), (*others, distance)
    for d, x in enumerate(index):
        if (at := _place(x, shape[d], ctx)) is not None:
            places = ctx.loads[at.tensor]
            assert isinstance(places, Captured)
            read = read._replace(places=places, dim=d)
            return read, (*index[:d], *index[d + 1 :], at.index[0])
    return read, index


def _place(x: Expr, size: Expr, ctx: Lifter) -> load | None:
    """The element of a vector by the distance that x is, negative ones counted from the end."""
    for at in x.atoms(load):
        if is_by_distance(at, ctx.loads) and len(at.index) == 1:
            if x in (at, where(at < 0, at + size, at)):
                return at
    return None


def _diagonals_of(node: fx.Node, shadow: Shadow) -> Diagonals | None:
    """The two dimensions by whose difference alone the node's elements depend on them."""
    if "diagonals" not in node.meta:
        node.meta["diagonals"] = _diagonals(node, shadow)
    return node.meta["diagonals"]


def _diagonals(node: fx.Node, shadow: Shadow) -> Diagonals | None:
    shape = shape_of(node)
    long = [d for d, size in enumerate(shape) if size != 1]
    if node.op != "call_function" or len(long) < 2:
        return None
    axes = [sympy.Dummy(f"i{d}", integer=True, nonnegative=True) for d in range(len(shape))]
    try:
        element = number(_Origins(shadow, dict(zip(axes, shape))).element(node, axes))
    except Opaque:
        return None
    used = [d for d in long if axes[d] in element.free_symbols]
    for i, j in itertools.combinations(used, 2):
        if _is_by_distance(element, axes[i], axes[j]):
            return Diagonals(i, j, tuple(d for d in range(len(shape)) if d not in used))
    return None


def _is_by_distance(element: Element, row: sympy.Symbol, column: sympy.Symbol) -> bool:
    distance = sympy.Dummy("distance", integer=True)
    return row not in _at(element, {column: row + distance}).free_symbols


def _at(x, moved: dict):
    """x after a substitution, with positions that cancel taken out: on both sides of a comparison
    too."""
    if x in moved:
        return moved[x]
    if not x.args:
        return x
    args = [_at(y, moved) for y in x.args]
    if isinstance(x, Relational):
        return x.func(sympy.expand(args[0] - args[1]), 0)
    found = x.func(*args)
    return sympy.expand(found) if isinstance(found, (sympy.Add, sympy.Mul)) else found


class _Origins(Lifter):
    """Answers what an element is computed from. Nothing is a load, and nothing is refused."""

    def __init__(self, shadow: Shadow, ranges: Ranges):
        super().__init__(shadow, ranges, {})
        self.computes = True
        self._numbers: dict[tuple[fx.Node, str], int] = {}
        self._starts = collections.defaultdict(
            lambda: sympy.Dummy("start", integer=True, nonnegative=True)
        )

    def load(self, node: fx.Node, index: Index) -> Element:
        return self._some(node, index)

    def _element(self, node: fx.Node, index: Index) -> Element:
        try:
            found = self._followed(node, index)
            if self._parts(found) <= MOST_PARTS:
                return found
        except (Opaque, UnknownScalar, Decline):
            pass
        return self._some(node, index)

    def _followed(self, node: fx.Node, index: Index) -> Element:
        if node.op != "call_function" or node.target in RANDOM or is_random(node):
            return self._some(node, index)
        if node.target is STOP:
            return self._remembered(node.args[0], index)
        if node.target is aten.slice.Tensor:
            return self._sliced(node, index)
        calculates = _is_element_wise(node)
        if node.target in REDUCED or node.target not in RULES and not calculates:
            return self._without_rule(node, index)
        if node.target in RULES:
            with contextlib.suppress(Opaque, UnknownScalar):
                found = RULES[node.target](node, index, self)
                check_same_numbers(node, found, self)
                if not calculates or self._is_exact(node, index, found):
                    return found
        return (
            self._some(node, self._operands(node, index), "of")
            if calculates
            else self._some(node, index)
        )

    def _sliced(self, node: fx.Node, index: Index) -> Element:
        """Where it starts may be unknown: in the same place for all elements."""
        source, d, start, _, step = slice_arguments(*node.args)
        first = sym(start) if isinstance(start, int) and start >= 0 else self._starts[node]
        return self._remembered(source, (*index[:d], first + sym(step) * index[d], *index[d + 1 :]))

    def _is_exact(self, node: fx.Node, index: Index, found: Element) -> bool:
        """Whether operands and result are integers that the types hold."""
        integers = all(_is_integer(x) for x in (*self._operands(node, index), number(found)))
        dtype = node.meta["val"].dtype
        if not integers or dtype in INTEGERS or dtype == torch.bool:
            return integers
        if dtype not in EXACT:
            return False
        limits = bounds(sympy.expand(number(found)), self.ranges)
        if limits is None or found.has(some_integer, some_number):
            return False
        known = all(x.is_Integer for x in limits)
        return max(map(abs, limits)) <= EXACT[dtype] if known else dtype in WIDE

    def _operands(self, node: fx.Node, index: Index) -> list[Expr]:
        """Their elements. A number that is none of a tensor is the same for all."""
        tensors = (x for x in node.all_input_nodes if isinstance(x.meta["val"], torch.Tensor))
        return [self.broadcast(x, index) for x in tensors]

    def _some(self, node: fx.Node, of: Iterable[Expr], what: str = "at") -> Element:
        n = self._numbers.setdefault((node, what), len(self._numbers))
        dtype = node.meta["val"].dtype
        if dtype == torch.bool:
            return sympy.Ne(some_integer(n, A, *of), 0)
        return (some_integer if dtype in INTEGERS else some_number)(n, A, *of)


def _is_integer(x: Expr) -> bool:
    return bool(x.is_integer) or bool(x.is_Float and x == int(x))


def _is_element_wise(node: fx.Node) -> bool:
    return node.target in UNTAGGED or is_element_wise(node)
