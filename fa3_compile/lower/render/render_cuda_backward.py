"""The gradients of an `AttentionSpec` as the source text of Hopper CUDA kernels.

The kernels are kernels/sm90/attention_bwd.cuh and kernels/include/fa3/backward_rows.cuh; what is
printed is the forward's variant with d(score)/ds, and the queries that a KV block meets.
"""

# sympy gives the parts of an expression as Basic.
# pyright: reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import sympy

from fa3_compile import resources
from fa3_compile.lower.render.cuda_terms import arrange, drawn, map_kind, mask_parts, named_mask
from fa3_compile.lower.render.cuda_variant import SITE, VariantWriter, method
from fa3_compile.lower.render.render_cuda import template
from fa3_compile.lower.tiles.config_sm90_backward import Sm90BackwardConfig
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.blocks import may_have_holes, q_bounds, q_full_bounds
from fa3_compile.spec.derivative import derivative

KV_BEGIN, KV_LAST = sympy.symbols("kv_begin kv_last", integer=True, nonnegative=True)


@dataclass(frozen=True)
class CudaBackwardKey:
    """As CudaKey.

    dead_rows      whether rows without a key have to be found
    tile_gradient  "", or how dS becomes the gradient of the tile's tensor: "store", or "add" where
                   it broadcasts
    nan_rows       whether rows may be NaN
    """

    spec: AttentionSpec
    dtype: str
    dim_qk: int
    dim_v: int
    config: Sm90BackwardConfig
    elements: tuple[str, ...] = ()
    unit: tuple[tuple[int, ...], ...] = ()
    dead_rows: bool = False
    tile: int | None = None
    tile_gradient: str = ""
    nan_rows: bool = False

    def source(self) -> str:
        """The kernels' text. UnprintableError or TypeError where there is none."""
        return render_backward(self)

    @property
    def digest(self) -> str:
        """Names the kernels on disk; other sources of ours give another name."""
        rest = (self.dtype, self.dim_qk, self.dim_v, self.config, self.elements, self.unit)
        rows = (self.dead_rows, self.nan_rows)
        fields = ("backward", str(self.spec), rest, rows, self.tile, self.tile_gradient)
        return hashlib.sha256(repr((fields, resources.source_hash())).encode()).hexdigest()[:24]


@functools.lru_cache(maxsize=1024)
def slope(score: E.Expr) -> tuple[float, E.Expr]:
    """d score / d s as a constant and the rest, which is 1 where that is all of it."""
    factor, rest = sympy.factor_terms(derivative(score, E.S)).as_coeff_Mul()
    return (float(factor), rest) if rest != 0 else (0.0, sympy.S.One)


def two_weights(weight: E.Expr | None) -> tuple[E.Expr, float, float] | None:
    """(a condition, the factor after the softmax where it holds, where not), if that is all that
    the factor is: dropout."""
    if weight is None:
        return None
    factor, rest = weight.as_coeff_Mul()
    if rest.func is not E.where or not all(x.is_number for x in rest.args[1:]):
        return None
    condition, kept, dropped = rest.args
    return condition, float(factor * kept), float(factor * dropped)


def asks_elements(spec: AttentionSpec) -> bool:
    """Whether an element is asked for its mask, or for one of two weights: see `bits` of
    Sm90BackwardConfig."""
    element = spec.has_mask and mask_parts(named_mask(spec)).element != sympy.true
    return element or two_weights(spec.weight) is not None


def query_map_kind(spec: AttentionSpec, grouped: bool) -> str:
    """As map_kind, and as CudaKey's where lists are made but once; heads that share a KV head
    share its list too."""
    if grouped and E.H in spec.mask.free_symbols:
        return ""
    return "Dense" if spec.has_mask and may_have_holes(spec.mask) else map_kind(spec)


def render_backward(key: CudaBackwardKey) -> str:
    """The kernels' source."""
    writer = _BackwardWriter(key)
    text = template("attention_bwd").render(
        c=key.config,
        dtype=key.dtype,
        dim_qk=key.dim_qk,
        dim_v=key.dim_v,
        block_map=query_map_kind(key.spec, key.config.grouped),
        nan_rows=key.nan_rows,
        aux_fields="\n".join(writer.aux_members()),
        variant="\n".join(writer.variant()),
    )
    lines = (line.rstrip() for line in text.splitlines())
    return f"// backward of {key.spec}\n" + "\n".join(lines) + "\n"


class _BackwardWriter(VariantWriter):
    """Prints the forward's hooks, and what PlainBackward adds to them."""

    key: CudaBackwardKey  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, key: CudaBackwardKey) -> None:
        super().__init__(key)  # pyright: ignore[reportArgumentType]
        self.names |= {"kv_last": "(kv_end - 1)"}

    def variant(self) -> list[str]:
        body = [
            *self.score(arrange(self.spec.score)),
            *self.mask(),
            *self.weight(),
            *self.derivative(),
        ]
        return [*self.structs(), *body]

    def weight(self) -> list[str]:
        lines = super().weight()
        found = two_weights(self.spec.weight)
        if found is None or not self.key.config.bits:
            return lines
        condition, kept, dropped = found
        site = SITE["element"].replace("float tile", "auto number")
        lines += ["static constexpr bool kTwoWeights = true;"]
        for name, value in (("kKept", kept), ("kDropped", dropped)):
            lines += [f"static constexpr float {name} = {self.printer.number(value)};"]
        number = drawn(self.spec.weight)
        return lines + self.element_method("bool", "kept", site, condition, False, number)

    def derivative(self) -> list[str]:
        factor, rest = slope(self.spec.score)
        lines = [f"static constexpr float kFactor = {self.printer.number(factor)};"]
        if self.key.dead_rows:
            lines += ["static constexpr bool kFindDead = true;"]
        if rest != 1:
            lines += ["static constexpr bool kDerivative = true;"]
            site = "float s, " + SITE["element"]
            lines += self.element_method("float", "derivative", site, rest)
        if self.key.tile is not None:
            site = SITE["element"]
            [load] = [x for x in E.loads_in(self.spec.score) if x.tensor == self.key.tile]
            lines += self.element_method("float", "dense", site, load, tile=False)
        if self.key.tile_gradient:
            lines += ["static constexpr bool kTileGradient = true;"]
        if self.key.tile_gradient == "add":
            lines += ["static constexpr bool kTileSum = true;"]
        return lines

    def blocks(self) -> list[str]:
        """The query blocks of a KV block: listed before the launch, or in closed form."""
        if kind := query_map_kind(self.spec, self.key.config.grouped):
            intervals = self.intervals() if kind == "Interval" else []
            return ["static constexpr bool kBlockMap = true;", *intervals]
        mask = named_mask(self.spec)
        bounds = (*q_bounds(mask, KV_BEGIN, KV_LAST), *q_full_bounds(mask, KV_BEGIN, KV_LAST))
        texts = ", ".join(f"int({self.query_bound(x)})" for x in bounds)
        site = "const At& at, int kv_begin, int kv_end"
        return [method("QueryBounds", "query_bounds", site, f"{{{texts}}}")]

    def query_bound(self, bound: E.Expr) -> str:
        """A number of queries; what a captured integer gives has 64 bits until it is one."""
        if bound.free_symbols & self.loads.keys():
            bound = sympy.Min(sympy.Max(bound, 0), E.SQ)
        return self.expression(bound, "bound", None)
