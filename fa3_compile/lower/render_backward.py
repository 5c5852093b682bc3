"""The gradients of an `AttentionSpec` as the source text of Triton kernels.

d(score)/ds and d(score)/d(captured tensor) come from `spec.derivative`; everything else of an
element is printed as the forward prints it, once for the loop over KV blocks and once for the
loop over query blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import sympy

from fa3_compile.lower import hoist, render
from fa3_compile.lower.printer import Text, shared_parts
from fa3_compile.lower.render import Common, Writer, common
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.blocks import kv_bounds, kv_full_bounds, q_bounds, q_full_bounds
from fa3_compile.spec.derivative import derivative

FIRST, LAST = sympy.symbols("first_of_tile last_of_tile", integer=True, nonnegative=True)


@dataclass(frozen=True)
class BackwardKey:
    """As ForwardKey; `wanted` are the captured tensors whose gradient the kernels compute."""

    spec: AttentionSpec
    dim: int
    v_dim: int
    wanted: tuple[int, ...] = ()
    fast_tanh: bool = False
    upcast: bool = False

    @property
    def digest(self) -> str:
        """Names the kernels on disk."""
        return render.digest(self)

    def source(self) -> str:
        """The kernels' source. UnprintableError or TypeError where there is no text for it."""
        return render_backward(self)


@dataclass(frozen=True)
class Sum:
    """A gradient that a kernel sums over the axis it walks: of a load without that axis.

    name    of the sum in the kernel; its float32 tensor is `<name>_ptr`, [B, H, Sq] or [B, H, Skv]
    factor  text of d score / d load
    """

    name: str
    element: E.load
    factor: str


@dataclass(frozen=True)
class Dense:
    """The gradient of a load with an element per query and key.

    missing  coordinates that the load does not have, over which a program loops ("b", "h")
    address  offset of the element in the gradient, whose strides are `grad<i>_stride<d>`
    """

    tensor: int
    element: E.load
    missing: tuple[str, ...]
    factor: str
    address: str
    strides: tuple[str, ...]


@dataclass(frozen=True)
class Side:
    """The text of an element in one direction of walking.

    preamble, carried  statements before the loop, and the names that its body needs of them
    loop               statements of the body; `mask_loop` those of the mask alone
    x, shift           as in hoist.Logits
    slope              d score / ds without its constant factor; "" where that is all of it
    """

    preamble: list[str]
    carried: list[str]
    loop: list[str]
    x: str
    shift: str
    slope: str
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
    """The fields that the template prints."""

    rows: Side
    columns: Side
    dense: list[Dense]
    needs_s: bool
    factor: float
    zero_rows: bool
    fill: bool


def render_backward(key: BackwardKey) -> str:
    """The source of the kernels of one backward."""
    spec = key.spec
    logits = hoist.arrange(spec.score)
    factor, slope = derivative(spec.score, E.S).as_coeff_Mul()
    wanted = [x for x in E.loads_in(spec.score) if x.tensor in key.wanted]
    slopes = {x: derivative(spec.score, x) for x in wanted}
    slopes = {x: d for x, d in slopes.items() if d != 0}
    by_row = {x: d for x, d in slopes.items() if hoist.level(x) in (hoist.HEAD, hoist.ROW)}
    by_key = {x: d for x, d in slopes.items() if hoist.level(x) == hoist.COLUMN}
    by_both = {x: d for x, d in slopes.items() if hoist.level(x) == hoist.ELEMENT}
    rows = _Writer(spec, key.fast_tanh, "kv")
    columns = _Writer(spec, key.fast_tanh, "q")
    row_side, dense = rows.side(logits, slope, by_row, "row_sum", by_both)
    column_side, _ = columns.side(logits, slope, by_key, "key_sum")
    rendered = Rendered(
        **common(key, logits, rows),
        rows=row_side,
        columns=column_side,
        dense=dense,
        needs_s=E.S in logits.x.free_symbols,
        factor=float(factor) if slope != 0 else 0.0,
        zero_rows=spec.dead == "zero",
        fill=spec.has_mask and spec.dead == "score",
    )
    return render.render_template("attention_backward.py.jinja", rendered)


class _Writer(Writer):
    """Coordinates never leave the lengths here, so loads need no guard for them."""

    def __init__(self, spec: AttentionSpec, fast_tanh: bool, streamed: str) -> None:
        super().__init__(spec, fast_tanh, streamed, guards_keys=False)

    def side(
        self,
        logits: hoist.Logits,
        slope: E.Expr,
        summed: dict[E.load, E.Expr],
        name: str,
        dense: Mapping[E.load, E.Expr] = MappingProxyType({}),
    ) -> tuple[Side, list[Dense]]:
        """The Side, and the dense gradients, whose factors are printed with it."""
        exprs = [logits.x, logits.shift, slope, *summed.values(), *dense.values()]
        loop, (x, shift, slope_text, *factors) = self.block(exprs, "t")
        mask_loop, [mask] = self.block([self.spec.mask], "m")
        sums = [Sum(f"{name}{i}", e, factors[i]) for i, e in enumerate(summed)]
        found = [self.dense(e, f) for e, f in zip(dense, factors[len(summed) :])]
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
            slope="" if slope in (0, 1) else slope_text,
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

    def dense(self, element: E.load, factor: str) -> Dense:
        name = f"grad{element.tensor}"
        used = [(d, x) for d, x in enumerate(element.index) if x != 0]
        terms = [f"tl.cast({self.print(x).body}, tl.int64) * {name}_stride{d}" for d, x in used]
        present = {str(x) for x in element.free_symbols}
        return Dense(
            element.tensor,
            element,
            tuple(x for x in ("b", "h") if x not in present),
            factor,
            " + ".join(terms),
            tuple(f"{name}_stride{d}" for d, _ in used),
        )


def row_sums(spec: AttentionSpec, wanted: Sequence[int]) -> list[E.load]:
    """The loads whose gradient comes as a sum over keys, in the order of `Side.sums`."""
    return _found(spec, wanted, (hoist.HEAD, hoist.ROW))


def key_sums(spec: AttentionSpec, wanted: Sequence[int]) -> list[E.load]:
    """The same for sums over queries."""
    return _found(spec, wanted, (hoist.COLUMN,))


def dense_loads(spec: AttentionSpec, wanted: Sequence[int]) -> list[E.load]:
    """The loads with an element per query and key."""
    return _found(spec, wanted, (hoist.ELEMENT,))


def _found(spec: AttentionSpec, wanted: Sequence[int], levels: tuple[int, ...]) -> list[E.load]:
    loads = [x for x in E.loads_in(spec.score) if x.tensor in wanted and hoist.level(x) in levels]
    return [x for x in loads if derivative(spec.score, x) != 0]
