"""What the source text of every Triton kernel of ours is made of.

Only printed expressions, integers and fixed words reach the source; no string of the user's does.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, fields
from typing import Any

import jinja2
import sympy

from fa3_compile import resources
from fa3_compile.lower.printers import hoist
from fa3_compile.lower.printers.printer import Env, Session
from fa3_compile.lower.printers.printer_triton import TritonPrinter
from fa3_compile.lower.printers.text import LOW, Text
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec


def digest(key: Any) -> str:
    """Names the kernel of a key, a dataclass with a spec, on disk; other sources of ours give
    another name."""
    named = {f.name: getattr(key, f.name) for f in fields(key)}
    named["spec"] = str(key.spec)
    text = repr((type(key).__name__, named, resources.source_hash()))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def render_template(name: str, fields: Any) -> str:
    """A template of templates/triton with the fields as `r`."""
    text = _environment().get_template(name).render(r=fields)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(resources.templates() / "triton"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
    )


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


def chunks(letter: str, dim: int, widest: int | None = None) -> list[Chunk]:
    """A head dim as tiles whose widths are powers of two (`tl.dot` needs them): one or two, or as
    many as `widest` makes of it."""
    if widest is not None:
        widths = [min(widest, padded_width(dim - at)) for at in range(0, dim, widest)]
        return [Chunk(f"{letter}{i}", i * widest, n, dim) for i, n in enumerate(widths)]
    whole = padded_width(dim)
    low = whole // 2
    if dim > low >= 16 and (high := padded_width(dim - low)) < low:
        return [Chunk(f"{letter}0", 0, low, dim), Chunk(f"{letter}1", low, high, dim)]
    return [Chunk(f"{letter}0", 0, whole, dim)]


def padded_width(count: int) -> int:
    """The narrowest tile of so many columns."""
    return max(16, 1 << (count - 1).bit_length())


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


@functools.lru_cache(maxsize=1024)
def aux_parameters(spec: AttentionSpec) -> tuple[Aux, ...]:
    """The captured tensors that the expressions read, in order of their numbers."""
    found = {}
    for x in E.loads_in(*spec.expressions):
        strides, sizes = found.setdefault(x.tensor, (set(), set()))
        strides |= {d for d, index in enumerate(x.index) if index != 0}
        sizes |= {d for d, index in enumerate(x.index) if not in_range(index)}
    return tuple(Aux(i, tuple(sorted(s)), tuple(sorted(n))) for i, (s, n) in sorted(found.items()))


def in_range(index: E.Expr) -> bool:
    """Whether an index cannot leave the tensor: a literal, or a coordinate itself."""
    return bool(index.is_Integer) or index in E.COORDINATES


# Terms of a product that a thread adds up one after another, in `parts`. Of 128 products of normal
# numbers the sum is off by 2.3e-6 in one chain (root mean square) and 1.2e-6 in four; in cuBLAS's
# order for few queries by 1.07e-6.
LONGEST_CHAIN = 32


@dataclass(frozen=True)
class Common:
    """The fields that both templates print.

    parts   float32 products without tensor cores: their terms are added up in parts, for in one
            chain each is rounded as the whole sum is

    scores are exp2(x * times_scale + shift) where log2 is set, else exp(x): see hoist.Logits.
    Without a softmax the weight is x itself
    """

    spec_text: str
    dim: int
    v_dim: int
    parts: bool
    k_chunks: list[Chunk]
    v_chunks: list[Chunk]
    fast_tanh: bool
    upcast: bool
    random: bool
    aux_pointers: list[str]
    integers: list[str]
    times_scale: str
    log2: bool
    normalized: bool
    sums: bool
    has_mask: bool
    has_weight: bool


def common(key: Any, logits: hoist.Logits, writer: Writer, sums_values: bool) -> dict[str, Any]:
    """The values of `Common` for a key with the fields of ForwardKey or BackwardKey.

    sums_values  V's columns are summed over, as K's are
    """
    spec = key.spec
    return {
        "spec_text": str(spec),
        "dim": key.dim,
        "v_dim": key.v_dim,
        "parts": key.parts,
        "k_chunks": chunks("k", key.dim, LONGEST_CHAIN if key.parts else None),
        "v_chunks": chunks("v", key.v_dim, LONGEST_CHAIN if key.parts and sums_values else None),
        "fast_tanh": key.fast_tanh and any(x.has(sympy.tanh) for x in spec.expressions),
        "upcast": key.upcast,
        "random": any(x.has(E.uniform) for x in spec.expressions),
        "aux_pointers": writer.aux_pointers,
        "integers": writer.integers,
        "times_scale": "" if logits.scale == 1.0 else f" * {logits.scale!r}",
        "log2": logits.log2,
        "normalized": spec.normalized,
        "sums": spec.sums,
        "has_mask": spec.has_mask,
        "has_weight": spec.weight is not None,
    }


class _Printer(TritonPrinter):
    """Triton's printer, with names for loads and hoisted parts."""

    def __init__(self, fast_tanh: bool) -> None:
        self.fast_tanh = fast_tanh
        if fast_tanh:
            self.FUNCTIONS = {**TritonPrinter.FUNCTIONS, "tanh": "fast_tanh"}

    def relation(self, expr, text) -> Text | None:
        """`uniform(seed, b, h, q, kv) < p` of a whole tile, four keys from each Philox call."""
        drawn, p = expr.args
        if not isinstance(expr, (sympy.StrictLessThan, sympy.GreaterThan)):
            return None
        if not isinstance(drawn, E.uniform) or drawn.args[1:] != E.COORDINATES:
            return None
        steps = float(p) * 2**24 if p.is_number else -1.0
        if not 0 < steps < 2**24 or steps % 1:
            return None
        seed = self.to_int(text(drawn.args[0])).body  # pyright: ignore[reportArgumentType]
        limit = int(steps) << 8
        drop = f"dropped({seed}, b, h, q, kv_start, {limit}, BLOCK_KV)"
        return Text(drop if isinstance(expr, sympy.StrictLessThan) else f"{drop} == 0", "bool", LOW)

    def rewrite(self, expr):
        if not self.fast_tanh:
            return super().rewrite(expr)
        opaque = sympy.Function("_tanh")
        expr = super().rewrite(expr.replace(sympy.tanh, opaque))
        return expr.replace(opaque, sympy.tanh)


class Writer:
    """Turns expressions into statements, and collects what the kernel has to be given.

    streamed     the axis that the kernel's loop walks over, "kv" or "q"
    guards_keys  `kv` may be beyond Skv, so loads by it need a guard
    """

    def __init__(
        self, spec: AttentionSpec, fast_tanh: bool, streamed: str = "kv", guards_keys: bool = True
    ) -> None:
        self.spec = spec
        self.streamed, self.guards_keys = streamed, guards_keys
        self.printer = _Printer(fast_tanh)
        self.aux = {x.tensor: x for x in aux_parameters(spec)}
        self.aux_pointers = [f"aux{i}" for i in self.aux]
        self.integers = [p for x in self.aux.values() for p in x.integers]
        self.integers += [f"n{i}" for i in range(spec.size_count)]
        self.preamble: list[str] = []
        self.carried: list[str] = []
        self.bound: dict[sympy.Basic, Text] = {}
        self.known: dict[sympy.Basic, sympy.Symbol] = {}

    def statements(self, hoister: hoist.Hoister) -> list[str]:
        """Those of the loop's body, now known to `print`; the others go to the preamble."""
        loop = []
        for outside, symbol, value in hoister.statements:
            text = self.load(value, outside) if isinstance(value, E.load) else self.print(value)
            self.bound[symbol] = Text(symbol.name, text.kind)
            if outside:
                self.preamble.append(f"{symbol.name} = {text.body}")
                self.carried.append(symbol.name)
            else:
                loop.append(f"{symbol.name} = {text.body}")
        return loop

    def body(self, placed) -> str:
        """The text of a condition, or of a number as float32."""
        text = self.print(placed)
        return text.body if text.kind == "bool" else self.printer.to_float(text).body

    def bound_text(self, expr) -> str:
        """An integer expression of the tile's first and last query."""
        return self.print(self.printer.rewrite(expr)).body

    def print(self, expr) -> Text:
        return Session(self.printer, Env(aux=self.spec.aux), self.bound).text(expr)

    def load(self, value: E.load, outside: bool) -> Text:
        """`tl.load` by pointer and strides; keys beyond Skv and computed indices are guarded."""
        name, guards = f"aux{value.tensor}", []
        if self.guards_keys and not outside:
            guards.append("in_kv")
        address = name
        for d, index in enumerate(value.index):
            body = self.print(index)
            body = self.printer.to_int(body).body
            if index != 0:
                address += f" + tl.cast({body}, tl.int64) * {name}_stride{d}"
            if d in self.aux[value.tensor].sizes and not in_range(index):
                guards.append(f"({body} >= 0) & ({body} < {name}_size{d})")
        kind = self.spec.aux[value.tensor]
        guard = f", mask={' & '.join(guards)}, other=0" if guards else ""
        body = f"tl.load({address}{guard})"
        if kind == "float":
            body = f"tl.cast({body}, tl.float32)"
        elif kind == "bool":
            body = f"tl.cast({body}, tl.int32)"
        return Text(body, "int" if kind == "bool" else kind)
