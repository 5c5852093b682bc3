"""The gradients of an `AttentionSpec` as the source text of Triton kernels.

d(score)/ds and d(score)/d(captured tensor) come from `spec.derivative`; everything else of an
element is printed as the forward prints it, once for the loop over KV blocks and once for the
loop over query blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import sympy

from fa3_compile.lower.printers import hoist
from fa3_compile.lower.printers.shared_parts import shared_parts
from fa3_compile.lower.printers.text import Text
from fa3_compile.lower.render import render
from fa3_compile.lower.render.render import Common, Writer, common
from fa3_compile.lower.render.render_blocks import owner
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.blocks import kv_bounds, kv_full_bounds, q_bounds, q_full_bounds
from fa3_compile.spec.derivative import derivative
from fa3_compile.spec.shared_loads import keys_share

FIRST, LAST = sympy.symbols("first_of_tile last_of_tile", integer=True, nonnegative=True)


@dataclass(frozen=True)
class BackwardKey:
    """As ForwardKey, with `parts` as in Common.

    wanted        the captured tensors whose gradient the kernels compute
    renormalised  the weights of a row are made to sum to 1 and its dS to 0, both to float32, at the
                  cost of two products more: from the LSE and the output, rounded to float32 each,
                  gradients are up to five times as far from float64 as eager's
    """

    spec: AttentionSpec
    dim: int
    v_dim: int
    wanted: tuple[int, ...] = ()
    fast_tanh: bool = False
    upcast: bool = False
    lists: bool = False
    renormalised: bool = False
    parts: bool = False

    @property
    def digest(self) -> str:
        """Names the kernels on disk."""
        return render.digest(self)

    def source(self) -> str:
        """The kernels' source. UnprintableError or TypeError where there is no text for it."""
        return render_backward(self)


@dataclass(frozen=True)
class Slopes:
    """What the gradient of a load is made of: dS * score + P * dP * weight, dP without w; in rows
    without a key, where the score is the fill, dS * fill + P * dP * weight."""

    score: E.Expr
    weight: E.Expr
    fill: E.Expr

    @property
    def every(self) -> tuple[E.Expr, E.Expr, E.Expr]:
        return self.score, self.weight, self.fill


def gradient_text(by_score: str, by_weight: str, ds: str = "ds") -> str:
    """The gradient of an element in terms of `ds` and `dw`; "0.0" is no slope."""
    terms = [(ds, by_score), ("dw", by_weight)]
    terms = [n if f in ("1", "1.0") else f"{n} * ({f})" for n, f in terms if f not in ("0", "0.0")]
    return " + ".join(terms)


@dataclass(frozen=True)
class Sum:
    """A gradient that a kernel sums over the axis it walks: of a load without that axis.

    name  of the sum in the kernel; its float32 tensor is `<name>_ptr`, [B, H, Sq] or [B, H, Skv]
    fill  its gradient in rows without a key, "" for none
    share, fill_share  the two with P for dS
    """

    name: str
    element: E.load
    gradient: str
    fill: str
    share: str
    fill_share: str


@dataclass(frozen=True)
class Dense:
    """The gradient of a load that has both q and kv in its index.

    name      of its kernel; the kernel writes to `<name>_ptr`
    missing   coordinates that the load does not have, over which a program loops ("b", "h")
    address   offset of the element in a tensor like the captured one, whose strides are
              `<name>_stride<d>`; "" where elements share a place in it
    diagonal  the index has q and kv only as kv - q
    """

    name: str
    element: E.load
    missing: tuple[str, ...]
    gradient: str
    fill: str
    address: str
    strides: tuple[str, ...]
    diagonal: bool


@dataclass(frozen=True)
class Side:
    """The text of an element in one direction of walking.

    preamble, carried  statements before the loop, and the names that its body needs of them
    loop               statements of the body; `mask_loop` those of the mask alone
    x, shift           as in hoist.Logits
    slope              d score / ds without its constant factor; "" where that is all of it
    weight             the factor after the softmax, with `weight_loop`; "" where it is 1
    fill, fill_slope   as x and slope, with `fill_loop`, of rows whose keys are all masked
    """

    preamble: list[str]
    carried: list[str]
    loop: list[str]
    x: str
    shift: str
    slope: str
    weight_loop: list[str]
    weight: str
    fill_loop: list[str]
    fill: str
    fill_slope: str
    sums: list[Sum]
    mask_loop: list[str]
    mask: str
    lo: str
    hi: str
    full_lo: str
    full_hi: str
    has_full: bool


@dataclass(frozen=True)
class Rendered(Common):
    """The fields that the template prints.

    balanced  what a row's dS sums to beyond what it should, as O and the LSE are rounded, is taken
              off the gradients of captured tensors, P of it for each key: see spec/shared_loads.py
    """

    rows: Side
    columns: Side
    dense: list[Dense]
    needs_s: bool
    factor: float
    weight_slopes: bool
    zero_rows: bool
    fill: bool
    fill_rows: bool
    norm: bool
    renormalised: bool
    balanced: bool
    sinks: list[str]
    lists: str


def render_backward(key: BackwardKey) -> str:
    """The source of the kernels of one backward."""
    spec = key.spec
    plain = key.renormalised or not spec.normalized
    logits = hoist.plain(spec.score) if plain else hoist.arrange(spec.score)
    slope = derivative(spec.score, E.S)
    factor, slope = (sympy.S.One, slope) if slope == 0 else slope.as_coeff_Mul()
    found = slopes(spec, key.wanted)
    rows = _Writer(spec, key.fast_tanh, "kv")
    columns = _Writer(spec, key.fast_tanh, "q")
    by_row = {x: found[x] for x in row_sums(spec, key.wanted)}
    by_key = {x: found[x] for x in key_sums(spec, key.wanted)}
    by_both = {x: found[x] for x in dense_loads(spec, key.wanted)}
    row_side, dense = rows.side(logits, factor, slope, by_row, "row_sum", by_both)
    balanced = keys_share(spec, key.wanted)
    _, sinks = rows.block(spec.sinks if has_norm(key) or balanced else (), "sink")
    column_side, _ = columns.side(logits, factor, slope, by_key, "key_sum")
    rendered = Rendered(
        **common(key, logits, rows, sums_values=True),
        rows=row_side,
        columns=column_side,
        dense=dense,
        needs_s=E.S in logits.x.free_symbols,
        factor=float(factor),
        weight_slopes=any(x.weight != 0 for x in found.values()),
        zero_rows=spec.normalized and spec.dead == "zero",
        fill=spec.has_mask and spec.dead == "score",
        fill_rows=has_fill_rows(spec),
        norm=has_norm(key),
        renormalised=key.renormalised,
        balanced=balanced,
        sinks=sinks,
        lists=owner(spec) if key.lists else "",
    )
    return render.render_template("attention_backward.py.jinja", rendered)


class _Writer(Writer):
    """Coordinates never leave the lengths here, so loads need no guard for them."""

    def __init__(self, spec: AttentionSpec, fast_tanh: bool, streamed: str) -> None:
        super().__init__(spec, fast_tanh, streamed, guards_keys=False)

    def side(
        self,
        logits: hoist.Logits,
        factor: E.Expr,
        slope: E.Expr,
        summed: Mapping[E.load, Slopes],
        name: str,
        dense: Mapping[E.load, Slopes] = MappingProxyType({}),
    ) -> tuple[Side, list[Dense]]:
        """The Side, and the dense gradients, whose factors are printed with it."""
        every = [*summed.values(), *dense.values()]
        exprs = [logits.x, logits.shift, slope, *(y.score for y in every)]
        loop, (x, shift, slope_text, *by_score) = self.block(exprs, "t")
        if slope in (0, 1):
            slope_text = "0.0" if slope == 0 else ""
        mask_loop, [mask] = self.block([self.spec.mask], "m")
        exprs = [] if self.spec.weight is None else [self.spec.weight, *(y.weight for y in every)]
        weight_loop, [weight, *by_weight] = self.block(exprs, "w") if exprs else ([], [""])
        by_weight = by_weight or ["0.0"] * len(every)
        fill_loop, fill, fill_slope, by_fill = [], "", "", ["0.0"] * len(every)
        if has_fill_rows(self.spec) and self.spec.fill is not None:
            exprs = [self.spec.fill, derivative(self.spec.fill, E.S) / factor]
            exprs += [y.fill for y in every]
            fill_loop, [fill, fill_slope, *by_fill] = self.block(exprs, "f")
        texts = [
            [gradient_text(y, w) for y in (x, fill)]
            + [gradient_text(y, "0.0", "p") for y in (x, fill)]
            for x, w, fill in zip(by_score, by_weight, by_fill)
        ]
        sums = [Sum(f"{name}{i}", e, *texts[i]) for i, e in enumerate(summed)]
        found = [self.dense(i, e, *texts[len(summed) + i][:2]) for i, e in enumerate(dense)]
        bounds, length = (kv_bounds, kv_full_bounds), E.SKV
        if self.streamed == "q":
            bounds, length = (q_bounds, q_full_bounds), E.SQ
        lo, hi = bounds[0](self.spec.mask, FIRST, LAST)
        full = bounds[1](self.spec.mask, FIRST, LAST)
        return Side(
            preamble=self.preamble,
            carried=self.aux_pointers + self.integers + self.carried,
            loop=loop,
            x=x,
            shift=shift,
            slope=slope_text,
            weight_loop=weight_loop,
            weight=weight,
            fill_loop=fill_loop,
            fill=fill,
            fill_slope=fill_slope,
            sums=sums,
            mask_loop=mask_loop,
            mask=mask,
            lo=self.bound_text(sympy.Max(lo, 0)),
            hi=self.bound_text(sympy.Min(hi, length)),
            full_lo=self.bound_text(sympy.Max(full[0], 0)),
            full_hi=self.bound_text(sympy.Max(sympy.Min(full[1], length), 0)),
            has_full=full[0] != full[1],
        ), found

    def block(self, exprs: Sequence, prefix: str) -> tuple[list[str], list[str]]:
        """(statements of the loop's body, text of each expression); what the body does not
        change goes to the preamble."""
        hoister = hoist.Hoister(prefix, self.known, self.streamed)
        placed = [hoister.place(self.printer.rewrite(x)) for x in exprs]
        loop = self.statements(hoister)
        bound = dict(self.bound)
        for i, shared in enumerate(shared_parts(placed)):
            text = self.print(shared)
            loop.append(f"{prefix}_shared{i} = {text.body}")
            self.bound[shared] = Text(f"{prefix}_shared{i}", text.kind)
        texts = [self.body(x) for x in placed]
        self.bound = bound
        return loop, texts

    def dense(self, number: int, element: E.load, gradient: str, fill: str) -> Dense:
        name = f"dense{number}"
        present = {str(x) for x in element.free_symbols}
        missing = tuple(x for x in ("b", "h") if x not in present)
        diagonal = is_diagonal(element)
        if not is_plain(self.spec, element):
            return Dense(name, element, missing, gradient, fill, "", (), diagonal)
        used = [(d, x) for d, x in enumerate(element.index) if x != 0]
        terms = [f"tl.cast({self.print(x).body}, tl.int64) * {name}_stride{d}" for d, x in used]
        strides = tuple(f"{name}_stride{d}" for d, _ in used)
        place = " + ".join(terms)
        return Dense(name, element, missing, gradient, fill, place, strides, diagonal)


def fill_slope(spec: AttentionSpec) -> float | None:
    """d fill / ds where the fill is the same for every key in float32, so that each has the
    weight 1 / Skv: a number, or one so large that it absorbs `s`. None for any other fill."""
    assert spec.fill is not None
    constant, rest = spec.fill.as_coeff_Add()
    if spec.fill.is_number:
        return 0.0
    slope = derivative(rest, E.S)
    absorbs = constant <= -1e30 and rest.free_symbols == {E.S} and not rest.has(E.load)
    return float(slope) if absorbs and slope.is_number else None


@functools.lru_cache(maxsize=1024)
def has_fill_rows(spec: AttentionSpec) -> bool:
    """Whether the kernels compute the rows without a key themselves: their weights differ, or
    share the row with a sink."""
    if not spec.has_mask or spec.fill is None:
        return False
    return bool(spec.sinks) or spec.weight is not None or fill_slope(spec) is None


def has_norm(key: BackwardKey) -> bool:
    """Whether the LSE does not hold all that the weights of a row are rebuilt from."""
    if not key.spec.normalized:
        return False
    return key.renormalised or hoist.may_be_huge(key.spec.score) or has_fill_rows(key.spec)


@functools.lru_cache(maxsize=1024)
def is_plain(spec: AttentionSpec, x: E.load) -> bool:
    """Whether each element of the captured tensor is one element (b, h, q, kv) of this load,
    and nothing else."""
    axes = [i for i in x.index if not i.is_Integer]
    distinct = all(i in E.COORDINATES for i in axes) and len(set(axes)) == len(axes)
    return distinct and sum(y.tensor == x.tensor for y in E.loads_in(*spec.expressions)) == 1


@functools.lru_cache(maxsize=1024)
def is_diagonal(x: E.load) -> bool:
    """Whether q and kv occur only as their distance, so that a diagonal shares an element."""
    distance = sympy.Symbol("distance", integer=True)
    if any(E.Q in y.free_symbols or E.KV in y.free_symbols for i in x.index for y in E.loads_in(i)):
        return False
    moved = x.func(x.args[0], *(sympy.expand(i.subs(E.KV, E.Q + distance)) for i in x.index))
    return E.Q not in moved.free_symbols


def row_sums(spec: AttentionSpec, wanted: tuple[int, ...]) -> Sequence[E.load]:
    """The loads whose gradient comes as a sum over keys, in the order of `Side.sums`."""
    return _found(spec, wanted, (hoist.HEAD, hoist.ROW))


def key_sums(spec: AttentionSpec, wanted: tuple[int, ...]) -> Sequence[E.load]:
    """The same for sums over queries."""
    return _found(spec, wanted, (hoist.COLUMN,))


def dense_loads(spec: AttentionSpec, wanted: tuple[int, ...]) -> Sequence[E.load]:
    """The loads with both q and kv in their index, in the order of `Rendered.dense`."""
    return _found(spec, wanted, (hoist.ELEMENT,))


# It is asked several times in each call of a backward, and takes 0.2 to 1 ms.
@functools.lru_cache(maxsize=1024)
def slopes(spec: AttentionSpec, wanted: tuple[int, ...]) -> Mapping[E.load, Slopes]:
    """The loads of the wanted tensors that have a gradient."""
    fill = spec.fill if has_fill_rows(spec) else None
    exprs = [sympy.S.Zero if x is None else x for x in (spec.score, spec.weight, fill)]
    found = {}
    for x in E.loads_in(*exprs):
        slope = Slopes(*(derivative(y, x) for y in exprs))
        if x.tensor in wanted and any(y != 0 for y in slope.every):
            found[x] = slope
    return found


@functools.lru_cache(maxsize=1024)
def _found(
    spec: AttentionSpec, wanted: tuple[int, ...], levels: tuple[int, ...]
) -> Sequence[E.load]:
    return [x for x in slopes(spec, wanted) if hoist.level(x) in levels]
