"""The forward of an `AttentionSpec` as the source text of a Triton kernel."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from fa3_compile.lower.printers import hoist
from fa3_compile.lower.render import render
from fa3_compile.lower.render.render import Common, Writer, common
from fa3_compile.lower.render.render_blocks import owner
from fa3_compile.lower.tiles.config import WIDEST
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.blocks import kv_bounds, kv_full_bounds

Q_LO, Q_HI = sympy.symbols("q_lo q_hi", integer=True, nonnegative=True)


@dataclass(frozen=True)
class ForwardKey:
    """Everything that the source text depends on, beside our own sources.

    dim, v_dim       head dims of Q and K, and of V
    fast_tanh        the hardware's approximate tanh (16-bit inputs on a GPU)
    tma              K and V by tensor descriptors: last stride 1, others multiples of 16 bytes
    warp_specialize  loads, products and softmax in warps of their own, where the target can
    lists            the blocks to walk come from `render_blocks`
    lazy_rescale     O is scaled only where the maximum of a row grows by 2^8
    upcast           products of float32 operands: Triton's interpreter has none of bfloat16
    packed           a tile's rows are of all query heads that share a KV head
    split            the KV blocks of a tile are dealt to several programs; `attention_combine` puts
                     their parts together
    shared           V is the first columns of K, in the same memory
    natural          float32 operands: scores stay as they are until the maximum is taken off, for
                     a product with log2(e) before it rounds in the scores' own last digit
    parts            as in Common
    """

    spec: AttentionSpec
    dim: int
    v_dim: int
    fast_tanh: bool = False
    tma: bool = False
    warp_specialize: bool = False
    upcast: bool = False
    lists: bool = False
    lazy_rescale: bool = False
    packed: bool = False
    split: bool = False
    shared: bool = False
    natural: bool = False
    parts: bool = False

    @property
    def digest(self) -> str:
        """Names the kernel on disk."""
        return render.digest(self)

    def source(self) -> str:
        """The kernel's source, as `render_forward` has it."""
        return render_forward(self)


@dataclass(frozen=True)
class Piece:
    """An expression as text, and the statements of the loop's body that it needs."""

    text: str
    loop: list[str]
    needs_s: bool


@dataclass(frozen=True)
class Rendered(Common):
    """The fields that the template prints."""

    tma: bool
    warp_specialize: bool
    lazy: str
    preamble: list[str]
    carried: list[str]
    score: Piece
    mask: Piece
    fill: Piece | None
    weight: Piece | None
    sinks: list[str]
    shift: str
    dead: str
    track: bool
    lists: str
    has_full: bool
    kv_lo: str
    kv_hi: str
    full_lo: str
    full_hi: str
    one_loop: bool
    packed: bool
    split: bool
    shared: bool
    state_names: list[str]
    combine_preamble: list[str]


def render_forward(key: ForwardKey) -> str:
    """The kernel's source. UnprintableError where Triton has no text for an expression."""
    spec = key.spec
    writer = Writer(spec, key.fast_tanh)
    plain = key.natural or not spec.normalized
    logits = hoist.plain(spec.score) if plain else hoist.arrange(spec.score)
    score = _piece(writer, logits.x, "score")
    shift = _piece(writer, logits.shift, "shift")
    mask = _piece(writer, spec.mask, "mask")
    fill = None if spec.fill is None else _piece(writer, spec.fill, "fill")
    weight = None if spec.weight is None else _piece(writer, spec.weight, "weight")
    # Those of a split are added when its parts are put together.
    finisher = Writer(spec, key.fast_tanh) if key.split else writer
    sinks = [_piece(finisher, x, f"sink{i}_").text for i, x in enumerate(spec.sinks)]
    lo, hi = kv_bounds(spec.mask, Q_LO, Q_HI)
    full_lo, full_hi = kv_full_bounds(spec.mask, Q_LO, Q_HI)
    rendered = Rendered(
        **common(key, logits, writer, sums_values=key.shared),
        tma=key.tma,
        warp_specialize=key.warp_specialize,
        lazy=_lazy_limit(logits.log2) if key.lazy_rescale else "",
        preamble=writer.preamble,
        carried=writer.aux_pointers + writer.integers + writer.carried,
        score=Piece(score.text, score.loop + shift.loop, score.needs_s),
        mask=Piece(f"in_kv & ({mask.text})" if spec.has_mask else "in_kv", mask.loop, False),
        fill=fill,
        weight=weight,
        sinks=sinks,
        shift=shift.text,
        dead=spec.dead,
        track=tracks_live_rows(spec),
        lists=owner(spec) if key.lists else "",
        has_full=full_lo != full_hi,
        kv_lo=writer.bound_text(sympy.Max(lo, 0)),
        kv_hi=writer.bound_text(sympy.Min(hi, E.SKV)),
        full_lo=writer.bound_text(sympy.Max(full_lo, 0)),
        full_hi=writer.bound_text(sympy.Max(sympy.Min(full_hi, E.SKV), 0)),
        # A mask costs little beside products of wide heads, and a second loop their registers.
        one_loop=max(key.dim, key.v_dim) > WIDEST,
        packed=key.packed,
        split=key.split,
        shared=key.shared,
        state_names=part_state(spec),
        combine_preamble=finisher.preamble,
    )
    return render.render_template("attention_forward.py.jinja", rendered)


def _lazy_limit(log2: bool) -> str:
    """By how much a score may exceed the maximum in use: weights up to 2^8."""
    return "8.0" if log2 else "8.0 * LN2"


def _piece(writer: Writer, expr, prefix: str) -> Piece:
    hoister = hoist.Hoister(prefix, writer.known)
    placed = hoister.place(writer.printer.rewrite(expr))
    loop = writer.statements(hoister)
    return Piece(writer.body(placed), loop, E.S in expr.free_symbols)


def part_state(spec: AttentionSpec) -> list[str]:
    """What a part of a split keeps of a row, beside its output: each a float32."""
    if not spec.normalized:
        return ["row_sum"] if spec.sums else []
    return ["row_max", "row_sum", *(["alive"] if spec.fill is not None else [])]


def is_prefix(dim: int, v_dim: int, parts: bool = False) -> bool:
    """Whether chunks of V are also chunks of K, so that `shared` can be."""
    widest = render.LONGEST_CHAIN if parts else None
    pairs = zip(render.chunks("k", dim, widest), render.chunks("v", v_dim, widest))
    return v_dim <= dim and all((k.start, k.width) == (v.start, v.width) for k, v in pairs)


def tracks_live_rows(spec: AttentionSpec) -> bool:
    """Whether a zero row sum does not yet say that the mask held nowhere in the row."""
    return spec.has_mask and spec.dead == "score" and hoist.may_be_minus_inf(spec.score)
