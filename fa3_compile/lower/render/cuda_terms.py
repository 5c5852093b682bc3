"""Which part of an attention goes where in the Hopper kernel: what kernels/include/fa3/variant.cuh
has a place for, and what is left to be asked of each element."""

# sympy gives the parts of an expression as Basic.
# pyright: reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import functools
from dataclasses import dataclass

import sympy

from fa3_compile.lower.binaries.remembered import remembered
from fa3_compile.lower.printers import hoist
from fa3_compile.lower.render import block_map
from fa3_compile.lower.render.render import aux_parameters
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.blocks import row_interval

# Below this, float32 has no room for any ordinary score beside the fill.
ABSORBING = -1e33


@dataclass(frozen=True)
class Terms:
    """The score as the kernel takes it: exp(score) = exp2((x + slope*(kv - q)) * scale + ...).

    scale  positive and the same for a whole head, in natural units
    slope  of the affine term, in the score's units; only where x is s itself
    shift  what is the same for a whole row, which the weights do not depend on
    wide   scores may be near float32's limits
    """

    x: E.Expr
    scale: E.Expr
    slope: E.Expr = sympy.S.Zero
    shift: E.Expr = sympy.S.Zero
    wide: bool = False


@functools.lru_cache(maxsize=1024)
def arrange(score: E.Expr) -> Terms:
    """The score as `Terms`."""
    if hoist.may_be_huge(score):
        return Terms(score, sympy.S.One, wide=True)
    terms = [y for x in sympy.Add.make_args(score) for y in hoist.distributed(x)]
    with_s = [x for x in terms if E.S in x.free_symbols]
    per_key = [x for x in terms if hoist.coefficient_of(x, E.KV) is not None]
    per_row = [x for x in terms if hoist.level(x) in (hoist.HEAD, hoist.ROW)]
    rest = [x for x in terms if x not in with_s and x not in per_key and x not in per_row]
    if len(with_s) == 1 and not rest:
        coefficient, s = with_s[0].as_independent(E.S, as_Add=False)
        known = coefficient.is_number and coefficient >= hoist.LEAST_SCALE
        # A slope is divided by it.
        takes = known or (not coefficient.is_number and not per_key)
        if (
            s == E.S
            and takes
            and coefficient.is_positive
            and hoist.level(coefficient) == hoist.HEAD
        ):
            slope = sympy.Add(*(x / E.KV for x in per_key))
            shift = sympy.expand(sympy.Add(*per_row) + slope * E.Q)
            return Terms(E.S, coefficient, slope, shift)
    # Only what stays beside (kv - q) keeps that difference small.
    shift = [] if per_key else per_row
    x = sympy.Add(*(x for x in terms if x not in shift))
    coefficient, inner = x.as_coeff_Mul()
    if coefficient >= hoist.LEAST_SCALE:
        return Terms(inner, coefficient, shift=sympy.Add(*shift))
    return Terms(x, sympy.S.One, shift=sympy.Add(*shift))


def capped(terms: Terms) -> float:
    """c where the score is tanh(c*s) times a scale, as a softcap is; 0 where it is not."""
    if not isinstance(terms.x, sympy.tanh):
        return 0.0
    coefficient = hoist.coefficient_of(terms.x.args[0], E.S)
    if coefficient is None or not coefficient.is_number:
        return 0.0
    # The kernel takes powers of it up to the fifth.
    return float(coefficient) if 1e-5 < coefficient < 1e5 else 0.0


@functools.lru_cache(maxsize=1024)
def factor_beside(score: E.Expr, tile: E.load, dtype: str) -> float:
    """c where the score is c*s + tile and Q times c is as good as Q but for its rounding; else 0.

    dtype  "Bf16" or "Fp16": the type of Q
    """
    coefficient = sympy.sympify(score.coeff(E.S))
    if not coefficient.is_number or score != coefficient * E.S + tile:
        return 0.0
    factor = float(coefficient)
    # Of Fp16: no element may be infinite, and few may be subnormal.
    least, most = {"Bf16": (2.0**-20, 2.0**20), "Fp16": (2.0**-6, 1.0)}[dtype]
    return factor if least <= factor <= most else 0.0


@functools.lru_cache(maxsize=1024)
def head_scalars(spec: AttentionSpec) -> dict[E.load, sympy.Symbol]:
    """A name for each integer of the mask that is the same for a whole head: the position in a
    static cache, the length of a sequence."""
    return {
        x: sympy.Symbol(f"scalar{i}", integer=True)
        for i, x in enumerate(E.loads_in(spec.mask))
        if spec.aux[x.tensor] == "int" and hoist.level(x) == hoist.HEAD
    }


@functools.lru_cache(maxsize=1024)
def named_mask(spec: AttentionSpec) -> E.Boolean:
    """The mask with `head_scalars` by their names, so that they may bound the keys."""
    return spec.mask.xreplace(head_scalars(spec))


@dataclass(frozen=True)
class MaskParts:
    """A mask as the kernel takes it: what holds in all of three parts.

    interval  (begin, end) of the keys that each row sees, None for all
    column    the same for a whole column of keys
    element   any other
    """

    interval: tuple[E.Expr, E.Expr] | None
    column: E.Boolean
    element: E.Boolean


@functools.lru_cache(maxsize=1024)
def mask_parts(mask: E.Boolean) -> MaskParts:
    """The parts of a mask, each as cheap as it can be."""
    if (whole := row_interval(mask)) is not None:
        return MaskParts(whole, sympy.true, sympy.true)
    parts = sorted(mask.args, key=str) if isinstance(mask, sympy.And) else [mask]
    inside = [x for x in parts if row_interval(x) is not None]
    interval = row_interval(sympy.And(*inside)) if inside else None
    if interval is None:
        inside = []
    rest = [x for x in parts if x not in inside]
    column = [x for x in rest if hoist.level(x) == hoist.COLUMN]
    element = [x for x in rest if x not in column]
    return MaskParts(interval, sympy.And(*column), sympy.And(*element))


@remembered
def map_kind(spec: AttentionSpec) -> str:
    """ "", "Interval" or "Dense": how the lists of key blocks are made, if there are any."""
    mask = named_mask(spec)
    if not spec.has_mask or row_interval(mask) or not block_map.needs_map(mask):
        return ""
    return "Dense" if block_map.reads_dense(spec.mask) else "Interval"


@functools.lru_cache(maxsize=1024)
def fills_dead_rows(spec: AttentionSpec) -> str:
    """ "never", "long" (only where Sq > Skv) or "maybe": whether fill() decides a row."""
    if not spec.has_mask or spec.dead != "score":
        return "never"
    return "maybe" if spec.sinks else hoist.dead_rows(spec.mask)


@functools.lru_cache(maxsize=1024)
def uniform_fill(fill: E.Expr) -> bool:
    """Whether all masked elements of a row have the same score in float32."""
    if any(hoist.level(x) != hoist.HEAD for x in E.loads_in(fill)):
        return False
    constant, rest = fill.as_coeff_Add()
    if constant.is_finite and constant <= ABSORBING:
        return not any(abs(x) > 1e9 for x in rest.atoms(sympy.Number)) and not rest.has(
            sympy.oo, -sympy.oo, sympy.exp, sympy.log, sympy.Pow
        )
    return hoist.level(fill) == hoist.HEAD and not fill.has(sympy.oo, -sympy.oo)


@functools.lru_cache(maxsize=1024)
def drawn(weight: E.Expr) -> E.uniform | None:
    """The one random number of a weight, which the kernel can draw for several elements at once:
    of this very element, under a seed of its head."""
    found = weight.atoms(E.uniform)
    if len(found) != 1:
        return None
    (number,) = found
    seed, *place = number.args
    ordinary = tuple(place) == E.COORDINATES and hoist.level(seed) == hoist.HEAD
    return number if ordinary else None


@dataclass(frozen=True)
class Field:
    """A member of the C++ struct Aux, and where its value comes from.

    kind  "pointer", "stride" (of `axis`), "size" (of `axis`) or "number" (sizes[index])
    """

    kind: str
    index: int
    axis: int = 0

    @property
    def name(self) -> str:
        return {
            "pointer": f"aux{self.index}",
            "stride": f"aux{self.index}_stride{self.axis}",
            "size": f"aux{self.index}_size{self.axis}",
            "number": f"n{self.index}",
        }[self.kind]


@functools.lru_cache(maxsize=1024)
def aux_fields(spec: AttentionSpec) -> tuple[Field, ...]:
    """The members of Aux in their order: pointers, 64-bit strides, 32-bit integers."""
    used = aux_parameters(spec)
    pointers = [Field("pointer", x.tensor) for x in used]
    strides = [Field("stride", x.tensor, d) for x in used for d in x.strides]
    sizes = [Field("size", x.tensor, d) for x in used for d in x.sizes]
    numbers = [Field("number", i) for i in range(spec.size_count)]
    return (*pointers, *strides, *sizes, *numbers)
