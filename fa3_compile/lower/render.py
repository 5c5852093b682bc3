"""An `AttentionSpec` as the source text of a Triton kernel.

Only printed expressions, integers and fixed words reach the source; no string of the user's does.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, fields

import jinja2
import sympy

from fa3_compile import resources
from fa3_compile.lower import hoist
from fa3_compile.lower.printer import Env, Session, Text
from fa3_compile.lower.printer_triton import TritonPrinter
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.blocks import kv_bounds, kv_full_bounds

Q_LO, Q_HI = sympy.symbols("q_lo q_hi", integer=True, nonnegative=True)


@dataclass(frozen=True)
class RenderKey:
    """Everything that the source text depends on, beside our own sources.

    dim, v_dim       head dims of Q and K, and of V
    fast_tanh        the hardware's approximate tanh (16-bit inputs on a GPU)
    tma              K and V by tensor descriptors: last stride 1, others multiples of 16 bytes
    warp_specialize  loads, products and softmax in warps of their own, where the target can
    upcast           products of float32 operands: Triton's interpreter has none of bfloat16
    """

    spec: AttentionSpec
    dim: int
    v_dim: int
    fast_tanh: bool = False
    tma: bool = False
    warp_specialize: bool = False
    upcast: bool = False

    @property
    def digest(self) -> str:
        """Names the kernel on disk; other sources of ours give another name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        named["spec"] = str(self.spec)
        return hashlib.sha256(repr((named, _sources())).encode()).hexdigest()[:24]

    def source(self) -> str:
        """The kernel's source, as `render` has it."""
        return render(self)


@functools.cache
def _sources() -> str:
    """Hash of the template and of the modules that print into it."""
    from fa3_compile.lower import formulas, printer, printer_triton
    from fa3_compile.spec import blocks

    modules = [hoist, formulas, printer, printer_triton, blocks, E]
    files = [__file__, *(x.__file__ for x in modules)]
    digest = hashlib.sha256(_template_path().read_bytes())
    for file in files:
        with open(file, "rb") as stream:
            digest.update(stream.read())
    return digest.hexdigest()


@dataclass(frozen=True)
class Chunk:
    """Columns [start, start + width) of a head; `tail` where the head ends inside, at `end`."""

    name: str
    start: int
    width: int
    end: int

    @property
    def tail(self) -> bool:
        return self.start + self.width > self.end


def chunks(letter: str, dim: int) -> list[Chunk]:
    """A head dim as one or two tiles whose widths are powers of two (`tl.dot` needs them)."""
    whole = max(16, 1 << (dim - 1).bit_length())
    low = whole // 2
    if dim > low >= 16 and (high := max(16, 1 << (dim - low - 1).bit_length())) < low:
        return [Chunk(f"{letter}0", 0, low, dim), Chunk(f"{letter}1", low, high, dim)]
    return [Chunk(f"{letter}0", 0, whole, dim)]


def padded(dim: int) -> int:
    """The columns that the chunks of a head dim have in all."""
    return sum(x.width for x in chunks("k", dim))


@dataclass(frozen=True)
class Aux:
    """What the kernel has to be told about a captured tensor, beside its pointer."""

    tensor: int
    strides: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def integers(self) -> list[str]:
        name = f"aux{self.tensor}"
        strides = [f"{name}_stride{d}" for d in self.strides]
        return [*strides, *(f"{name}_size{d}" for d in self.sizes)]


def aux_parameters(spec: AttentionSpec) -> list[Aux]:
    """The captured tensors that the expressions read, in order of their numbers."""
    found = {}
    for x in E.loads_in(*spec.expressions):
        strides, sizes = found.setdefault(x.tensor, (set(), set()))
        strides |= {d for d, index in enumerate(x.index) if index != 0}
        sizes |= {d for d, index in enumerate(x.index) if not _in_range(index)}
    return [Aux(i, tuple(sorted(s)), tuple(sorted(n))) for i, (s, n) in sorted(found.items())]


def _in_range(index: E.Expr) -> bool:
    """Whether an index cannot leave the tensor: a literal, or a coordinate itself."""
    return bool(index.is_Integer) or index in E.COORDINATES


@dataclass(frozen=True)
class Piece:
    """An expression as text, and the statements of the loop's body that it needs."""

    text: str
    loop: list[str]
    needs_s: bool


@dataclass(frozen=True)
class Rendered:
    """The fields that the template prints."""

    spec_text: str
    dim: int
    v_dim: int
    k_chunks: list[Chunk]
    v_chunks: list[Chunk]
    fast_tanh: bool
    tma: bool
    warp_specialize: bool
    upcast: bool
    aux_pointers: list[str]
    integers: list[str]
    preamble: list[str]
    carried: list[str]
    score: Piece
    mask: Piece
    fill: Piece | None
    sinks: list[str]
    shift: str
    times_scale: str
    log2: bool
    dead: str
    track: bool
    has_mask: bool
    has_full: bool
    kv_lo: str
    kv_hi: str
    full_lo: str
    full_hi: str


def render(key: RenderKey) -> str:
    """The kernel's source. UnprintableError where Triton has no text for an expression."""
    spec = key.spec
    writer = _Writer(spec, key.fast_tanh)
    logits = hoist.arrange(spec.score)
    score = writer.piece(logits.x, "score")
    shift = writer.piece(logits.shift, "shift")
    mask = writer.piece(spec.mask, "mask")
    fill = None if spec.fill is None else writer.piece(spec.fill, "fill")
    sinks = [writer.piece(x, f"sink{i}_").text for i, x in enumerate(spec.sinks)]
    lo, hi = kv_bounds(spec.mask, Q_LO, Q_HI)
    full_lo, full_hi = kv_full_bounds(spec.mask, Q_LO, Q_HI)
    rendered = Rendered(
        spec_text=str(spec),
        dim=key.dim,
        v_dim=key.v_dim,
        k_chunks=chunks("k", key.dim),
        v_chunks=chunks("v", key.v_dim),
        fast_tanh=key.fast_tanh and any(x.has(sympy.tanh) for x in spec.expressions),
        tma=key.tma,
        warp_specialize=key.warp_specialize,
        upcast=key.upcast,
        aux_pointers=writer.aux_pointers,
        integers=writer.integers,
        preamble=writer.preamble,
        carried=writer.aux_pointers + writer.integers + writer.carried,
        score=Piece(score.text, score.loop + shift.loop, score.needs_s),
        mask=Piece(f"in_kv & ({mask.text})" if spec.has_mask else "in_kv", mask.loop, False),
        fill=fill,
        sinks=sinks,
        shift=shift.text,
        times_scale="" if logits.scale == 1.0 else f" * {logits.scale!r}",
        log2=logits.log2,
        dead=spec.dead,
        track=tracks_live_rows(spec),
        has_mask=spec.has_mask,
        has_full=full_lo != full_hi,
        kv_lo=writer.bound_text(sympy.Max(lo, 0)),
        kv_hi=writer.bound_text(sympy.Min(hi, E.SKV)),
        full_lo=writer.bound_text(sympy.Max(full_lo, 0)),
        full_hi=writer.bound_text(sympy.Max(sympy.Min(full_hi, E.SKV), 0)),
    )
    text = _template().render(r=rendered)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def tracks_live_rows(spec: AttentionSpec) -> bool:
    """Whether a zero row sum does not yet say that the mask held nowhere in the row."""
    return spec.has_mask and spec.dead == "score" and hoist.may_be_minus_inf(spec.score)


class _Printer(TritonPrinter):
    """Triton's printer, with names for loads and hoisted parts."""

    def __init__(self, fast_tanh: bool) -> None:
        self.fast_tanh = fast_tanh
        if fast_tanh:
            self.FUNCTIONS = {**TritonPrinter.FUNCTIONS, "tanh": "fast_tanh"}

    def rewrite(self, expr):
        if not self.fast_tanh:
            return super().rewrite(expr)
        opaque = sympy.Function("_tanh")
        expr = super().rewrite(expr.replace(sympy.tanh, opaque))
        return expr.replace(opaque, sympy.tanh)


class _Writer:
    """Turns expressions into statements, and collects what the kernel has to be given."""

    def __init__(self, spec: AttentionSpec, fast_tanh: bool) -> None:
        self.spec = spec
        self.printer = _Printer(fast_tanh)
        self.aux = {x.tensor: x for x in aux_parameters(spec)}
        self.aux_pointers = [f"aux{i}" for i in self.aux]
        self.integers = [p for x in self.aux.values() for p in x.integers]
        self.integers += [f"n{i}" for i in range(spec.size_count)]
        self.preamble: list[str] = []
        self.carried: list[str] = []
        self.bound: dict[sympy.Basic, Text] = {}
        self.known: dict[sympy.Basic, sympy.Symbol] = {}

    def piece(self, expr, prefix: str) -> Piece:
        """The expression hoisted; its scalars and row parts go to the preamble."""
        hoister = hoist.Hoister(prefix, self.known)
        expr = self.printer.rewrite(expr)
        placed = hoister.place(expr)
        loop = []
        for outside, symbol, value in hoister.statements:
            text = self.load(value, outside) if isinstance(value, E.load) else self.print(value)
            self.bound[symbol] = Text(symbol.name, text.kind)
            if outside:
                self.preamble.append(f"{symbol.name} = {text.body}")
                self.carried.append(symbol.name)
            else:
                loop.append(f"{symbol.name} = {text.body}")
        is_condition = isinstance(expr, sympy.logic.boolalg.Boolean)
        text = self.print(placed)
        body = text.body if is_condition else self.printer.to_float(text).body
        return Piece(body, loop, E.S in expr.free_symbols)

    def bound_text(self, expr) -> str:
        """An integer expression of the tile's first and last query."""
        return self.print(self.printer.rewrite(expr)).body

    def print(self, expr) -> Text:
        return Session(self.printer, Env(aux=self.spec.aux), self.bound).text(expr)

    def load(self, value: E.load, outside: bool) -> Text:
        """`tl.load` by pointer and strides; keys beyond Skv and computed indices are guarded."""
        name, guards = f"aux{value.tensor}", []
        if not outside:
            guards.append("in_kv")
        address = name
        for d, index in enumerate(value.index):
            body = self.print(index)
            body = self.printer.to_int(body).body
            if index != 0:
                address += f" + tl.cast({body}, tl.int64) * {name}_stride{d}"
            if d in self.aux[value.tensor].sizes and not _in_range(index):
                guards.append(f"({body} >= 0) & ({body} < {name}_size{d})")
        kind = self.spec.aux[value.tensor]
        guard = f", mask={' & '.join(guards)}, other=0" if guards else ""
        body = f"tl.load({address}{guard})"
        if kind == "float":
            body = f"tl.cast({body}, tl.float32)"
        elif kind == "bool":
            body = f"tl.cast({body}, tl.int32)"
        return Text(body, "int" if kind == "bool" else kind)


def _template_path():
    return resources.templates() / "triton" / "attention_forward.py.jinja"


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True
    )
    return environment.from_string(_template_path().read_text())
