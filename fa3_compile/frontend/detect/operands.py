"""Where Q, K and V come from: operands followed back through views, copies, casts and scales.

`expand + reshape` and `repeat_interleave` (GQA), `contiguous`, `transpose` and a scale on q or k
all vanish here: what is left is a tensor of the program and the index at which it is read.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import sympy
import torch
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.lift.lift import RULES, Index, Lifter, Opaque, shape_of, sym
from fa3_compile.frontend.shadow.same import same_value
from fa3_compile.spec.expr import KV, Expr, depends_on, floordiv, mod
from fa3_compile.spec.index import Ranges, quotient, same, simplify_index

aten = torch.ops.aten

MOVEMENT = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.expand.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.repeat.default,
        aten.clone.default,
        torch.ops.prims.copy_strided.default,
        aten.alias.default,
        aten.detach.default,
        aten.contiguous.default,
    }
)
WIDER = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 2, torch.float64: 3}

# What a norm may pass on its way to the division: it only grows.
NORM_KEEPERS = (aten.clamp.default, aten.clamp_min.default, aten.expand.default)
# The size of the product of two rows of norm 1, rounded in bfloat16.
UNIT_PRODUCT = 1.05


@dataclass
class Place:
    """An operand read as `factor * node[index]`, the node cast first where `cast` is a dtype."""

    node: fx.Node
    index: Index
    factor: Expr = sympy.S.One
    cast: torch.dtype | None = None


@dataclass
class _Step:
    """Stands in for a Lifter while one movement rule is asked where an element comes from."""

    ranges: Ranges
    found: list[tuple[fx.Node, Index]] = field(default_factory=list)

    def element(self, node, index):
        self.found.append((node, tuple(index)))
        return sympy.S.Zero

    operand = broadcast = element


def is_movement(node: fx.Node) -> bool:
    """Whether the node only moves the elements of one tensor."""
    if node.target is operator.getitem:
        return node.args[0].target in (aten.split_with_sizes.default, aten.unbind.int)
    return node.target in MOVEMENT


def moved(node: fx.Node) -> fx.Node:
    """The tensor whose elements a movement moves."""
    source = node.args[0].args[0] if node.target is operator.getitem else node.args[0]
    return source  # pyright: ignore[reportReturnType]


def step_back(node: fx.Node, index: Sequence[Expr], ranges: Ranges) -> tuple[fx.Node, Index]:
    """Where element [index] of a movement's result lies in its source."""
    step = _Step(ranges)
    RULES[node.target](node, tuple(index), step)
    source, moved = step.found[0]
    sizes = source.meta["val"].shape
    return source, tuple(
        sympy.S.Zero if isinstance(n, int) and n == 1 else sympy.sympify(i)
        for i, n in zip(moved, sizes, strict=True)
    )


def origins(
    node: fx.Node,
    index: Sequence[Expr],
    lifter: Lifter,
    *,
    inner: sympy.Symbol,
    casts: bool,
    varying: set[sympy.Symbol],
) -> Iterator[Place]:
    """The operand's places, nearest first. A scale that varies along `inner` (the contracted
    axis) or with `varying` (q, kv) ends the walk. Behind a cast that is kept, such as autocast
    makes and no node of the program holds, only movements are followed."""
    place = Place(node, tuple(index))
    while True:
        yield place
        node, index = place.node, place.index
        try:
            if is_movement(node):
                place = Place(*step_back(node, index, lifter.ranges), place.factor, place.cast)
            elif place.cast is not None:
                return
            elif node.target is aten._to_copy.default and casts and _widens(node):
                place = Place(node.args[0], index, place.factor)
            elif node.target is aten._to_copy.default and (_narrows(node) or _widens(node)):
                place = Place(node.args[0], index, place.factor, node.meta["val"].dtype)
            elif scaled := _scale(node, index, lifter, {inner, *varying}):
                source, source_index, factor = scaled
                place = Place(source, source_index, place.factor * factor)
            else:
                return
        except (Opaque, Decline):
            return


def _widens(node: fx.Node) -> bool:
    source, target = node.args[0].meta["val"].dtype, node.meta["val"].dtype
    return (
        source in WIDER and target in WIDER and (source == target or WIDER[source] < WIDER[target])
    )


def _narrows(node: fx.Node) -> bool:
    source, target = node.args[0].meta["val"].dtype, node.meta["val"].dtype
    return source in WIDER and target in WIDER and WIDER[target] < WIDER[source]


def _scale(node: fx.Node, index: Index, lifter: Lifter, varying: set[sympy.Symbol]):
    """(tensor, its index, factor) for a product of a tensor and something free of `varying`."""
    scalar = node.target in (aten.mul.Scalar, aten.div.Scalar)
    if node.target is aten.neg.default:
        return node.args[0], index, -sympy.S.One
    if not scalar and node.target not in (aten.mul.Tensor, aten.div.Tensor):
        return None
    divides = node.target in (aten.div.Tensor, aten.div.Scalar)
    sides = [node.args[:2]] if divides else [node.args[:2], node.args[1::-1]]
    for tensor, other in sides:
        if not isinstance(tensor, fx.Node) or not isinstance(tensor.meta["val"], torch.Tensor):
            continue
        if shape_of(tensor) != shape_of(node):
            continue
        if isinstance(other, fx.Node) and isinstance(other.meta["val"], torch.Tensor):
            shape = other.meta["val"].shape
            if len(shape) and not (isinstance(shape[-1], int) and shape[-1] == 1):
                # A factor for each element of the head: rotary embeddings, norms' weights.
                if depends_on(index[-1], varying):
                    continue
            if other in lifter.inside:
                continue
        factor = lifter.broadcast(other, index)
        if depends_on(factor, varying) or not factor.is_finite and factor.is_number:
            continue
        if divides:
            factor = sym(1 / float(factor)) if factor.is_number else 1 / factor
        return tensor, index, factor
    return None


@dataclass
class Axis:
    """One atomic axis of a source tensor: which symbol runs along it, and its size."""

    symbol: sympy.Symbol
    size: Expr


@dataclass
class View:
    """How to see a tensor as a sequence of atomic axes, by views alone.

    splits: (dimension, inner size) unflattenings in order; then for every resulting dimension
    either ("axis", Axis, start or None) or ("select", position).
    merged: the first and the last of the dimensions that are one before that, as keys are that lie
    in rows and columns; `shape` has them as one.
    """

    shape: list[Expr]
    splits: list[tuple[int, list[Expr]]]
    parts: list[tuple]
    merged: tuple[int, int] | None = None


def view_of(place: Place, sizes: Ranges) -> View | None:
    """The view under which a place's index is one atomic axis a dimension; None if there is
    none (an index that divides, a diagonal, a stride that does not fit)."""
    splits: list[tuple[int, list[Expr]]] = []
    parts: list[tuple] = []
    seen: set[sympy.Symbol] = set()
    index, shape, merged = keys_as_one(place, sizes)
    for size, position in zip(shape, index, strict=True):
        pieces = _pieces(sympy.expand(position), size, sizes)
        if pieces is None:
            return None
        symbols = [p[1].symbol for _, p in pieces if p[0] == "axis"]
        if len(set(symbols)) < len(symbols) or seen & set(symbols):
            return None
        seen |= set(symbols)
        if len(pieces) > 1:
            splits.append((len(parts), [n for n, _ in pieces]))
        parts += [part for _, part in pieces]
    return View(shape, splits, parts, merged)


def keys_as_one(place: Place, sizes: Ranges) -> tuple[Index, list[Expr], tuple[int, int] | None]:
    """(index, shape, dimensions that were merged): a place whose keys run along dimensions side by
    side, as pixels do along rows and columns, with these as one."""
    index, shape = place.index, [*shape_of(place.node)]
    dims = [d for d, i in enumerate(index) if i.atoms(floordiv, mod) and depends_on(i, [KV])]
    if not dims or dims != [*range(dims[0], dims[-1] + 1)]:
        return index, shape, None
    first, last = dims[0], dims[-1]
    position, size = sympy.S.Zero, sympy.S.One
    for d in dims:
        position, size = position * shape[d] + index[d], size * shape[d]
    position = simplify_index(sympy.expand(position), sizes)
    if position.atoms(floordiv, mod):
        return index, shape, None
    shape[first : last + 1] = [size]
    return (*index[:first], position, *index[last + 1 :]), shape, (first, last)


def _pieces(position: Expr, size: Expr, sizes: Ranges) -> list[tuple[Expr, tuple]] | None:
    """A dimension as [(size of the piece, what runs along it)], outermost first."""
    symbols = [s for s in position.free_symbols if s in sizes]
    if not symbols:
        return [(size, ("select", position))]
    terms = {s: position.coeff(s) for s in symbols}
    offset = sympy.expand(position - sum(c * s for s, c in terms.items()))
    if not offset.free_symbols.isdisjoint(sizes):
        return None
    outer = _outermost(terms)
    if outer is None:
        return None
    stride = terms[outer]
    if stride == 1:
        if len(terms) > 1:
            return None
        whole = same(sizes[outer], size) and offset == 0
        return [(size, ("axis", Axis(outer, sizes[outer]), None if whole else offset))]
    count = quotient(size, stride)
    if count is None:
        return None
    start = sympy.floor(offset / stride) if offset.is_Integer and stride.is_Integer else None
    if start is None:
        if offset != 0:
            return None
        start = sympy.S.Zero
    inner = _pieces(sympy.expand(position - stride * (outer + start)), stride, sizes)
    if inner is None:
        return None
    whole = same(sizes[outer], count) and start == 0
    return [(count, ("axis", Axis(outer, sizes[outer]), None if whole else start)), *inner]


def _outermost(terms: dict[sympy.Symbol, Expr]) -> sympy.Symbol | None:
    """The symbol with the largest stride; None where strides do not divide one another."""
    largest = None
    for symbol, stride in terms.items():
        if not stride.is_nonnegative:
            return None
        if largest is None:
            largest = symbol
            continue
        if quotient(stride, terms[largest]) is not None and stride != terms[largest]:
            largest = symbol
        elif quotient(terms[largest], stride) is None or stride == terms[largest]:
            return None
    return largest


def unit_rows(place: Place, inner: sympy.Symbol) -> bool:
    """Whether an operand is divided by its own norm along `inner`, so that no row is longer
    than 1: `F.normalize`, or written by hand."""
    node = place.node
    if node.target is not aten.div.Tensor or place.cast is not None:
        return False
    along = [d for d, i in enumerate(place.index) if depends_on(i, [inner])]
    whole, norm = node.args[:2]
    while isinstance(norm, fx.Node) and norm.target in NORM_KEEPERS:
        norm = norm.args[0]
    if not isinstance(norm, fx.Node) or norm.target is not aten.linalg_vector_norm.default:
        return False
    source, order, dims, keeps = (*norm.args, *(2, None, False)[len(norm.args) - 1 :])
    rank = len(place.index)
    return (
        same_value(source, whole)
        and order == 2
        and bool(keeps)
        and dims is not None
        and [d % rank for d in dims] == along
        and place.index[along[0]] == inner
    )
