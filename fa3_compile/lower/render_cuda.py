"""An `AttentionSpec` as the source text of a Hopper CUDA kernel.

The kernel is kernels/sm90/attention_fwd.cuh; what is printed here is the variant that it is
instantiated with (kernels/include/fa3/variant.cuh). Only printed expressions, integers and fixed
words reach the source; no string of the user's does.
"""

# sympy gives the parts of an expression as Basic.
# pyright: reportArgumentType=false

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import jinja2
import sympy

from fa3_compile import resources
from fa3_compile.lower import block_map, hoist
from fa3_compile.lower.config_sm90 import Sm90Config
from fa3_compile.lower.printer import Env, Session, Text
from fa3_compile.lower.printer_cuda import CudaPrinter
from fa3_compile.lower.render import aux_parameters
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.blocks import kv_bounds, kv_full_bounds

Q_BEGIN, Q_LAST = sympy.symbols("q_begin q_last", integer=True, nonnegative=True)
# Below this, float32 has no room for any ordinary score beside the fill.
ABSORBING = -1e33
LEVELS = ("head", "row", "col")


@dataclass(frozen=True)
class CudaKey:
    """Everything that the source text depends on, beside our own sources.

    dtype          "Bf16" or "Fp16"
    dim_qk, dim_v  head dims of Q and K, and of V: multiples of 8
    elements       C++ element type of each captured tensor
    unit           for each captured tensor the axes whose stride is 1
    tile           the captured (q, kv) tensor of a 16-bit dtype that comes by TMA beside K
    """

    spec: AttentionSpec
    dtype: str
    dim_qk: int
    dim_v: int
    config: Sm90Config
    elements: tuple[str, ...] = ()
    unit: tuple[tuple[int, ...], ...] = ()
    tile: int | None = None

    def source(self) -> str:
        """The kernel's text. UnprintableError where C++ has none for an expression."""
        return render(self)

    @property
    def digest(self) -> str:
        """Names the kernel on disk; other sources of ours give another name."""
        rest = (self.dtype, self.dim_qk, self.dim_v, self.config, self.elements, self.unit)
        fields = (str(self.spec), rest, self.tile, resources.source_hash())
        return hashlib.sha256(repr(fields).encode()).hexdigest()[:24]


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
    terms = [y for x in sympy.Add.make_args(score) for y in hoist._distributed(x)]
    with_s = [x for x in terms if E.S in x.free_symbols]
    per_key = [x for x in terms if hoist._coefficient(x, E.KV) is not None]
    per_row = [x for x in terms if hoist.level(x) in (hoist.HEAD, hoist.ROW)]
    rest = [x for x in terms if x not in with_s and x not in per_key and x not in per_row]
    if len(with_s) == 1 and not rest:
        coefficient, s = with_s[0].as_independent(E.S, as_Add=False)
        if s == E.S and coefficient.is_positive and hoist.level(coefficient) == hoist.HEAD:
            slope = sympy.Add(*(x / E.KV for x in per_key))
            shift = sympy.expand(sympy.Add(*per_row) + slope * E.Q)
            return Terms(E.S, coefficient, slope, shift)
    # Only what stays beside (kv - q) keeps that difference small.
    shift = [] if per_key else per_row
    x = sympy.Add(*(x for x in terms if x not in shift))
    coefficient, inner = x.as_coeff_Mul()
    if coefficient.is_positive:
        return Terms(inner, coefficient, shift=sympy.Add(*shift))
    return Terms(x, sympy.S.One, shift=sympy.Add(*shift))


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


@functools.lru_cache(maxsize=1024)
def row_interval(mask: E.Boolean) -> tuple[E.Expr, E.Expr] | None:
    """(begin, end) where the mask holds for exactly the keys in between, for every row."""
    bounds = kv_bounds(mask, E.Q, E.Q)
    return bounds if bounds == kv_full_bounds(mask, E.Q, E.Q) else None


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


@functools.lru_cache(maxsize=1024)
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


def render(key: CudaKey) -> str:
    """The kernel's source. UnprintableError where C++ has no text for an expression."""
    writer = _Writer(key)
    text = template("attention_fwd").render(
        c=key.config,
        dtype=key.dtype,
        dim_qk=key.dim_qk,
        dim_v=key.dim_v,
        aux_fields="\n".join(writer.aux_members()),
        variant="\n".join(writer.variant()),
        block_map=map_kind(key.spec),
        dead_rows=fills_dead_rows(key.spec) != "never",
    )
    lines = (line.rstrip() for line in text.splitlines())
    return f"// {key.spec}\n" + "\n".join(lines) + "\n"


class _Printer(CudaPrinter):
    """C++ with tanh.approx, and with min and max of mixed integers."""

    FUNCTIONS = {**CudaPrinter.FUNCTIONS, "tanh": "tanh_approx"}

    def rewrite(self, expr):
        return expr

    def extremum(self, name: str, a: Text, b: Text) -> Text:
        if a.kind == "float":
            return super().extremum(name, a, b)
        function = "largest" if name == "max" else "least"
        return Text(f"{function}({a.body}, {b.body})", a.kind)

    def absolute(self, x: Text) -> Text:
        return super().absolute(x) if x.kind == "float" else Text(f"magnitude({x.body})", x.kind)


TILE = sympy.Symbol("tile", real=True)
NUMBER = sympy.Symbol("number", real=True)


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


class _Placer(hoist.Hoister):
    """A hoister that knows heads, rows and columns apart, and the tensor that comes by TMA.

    `named` lists (symbol, its origin, the origin in terms of earlier symbols), in order.
    """

    def __init__(
        self, prefix: str, known: dict, tile: int | None, number: E.uniform | None = None
    ) -> None:
        super().__init__(prefix, known)
        self.tile, self.number = tile, number
        self.named: list[tuple[sympy.Symbol, sympy.Basic, sympy.Basic]] = []

    def place(self, expr):
        if self.tile is not None and isinstance(expr, E.load) and expr.tensor == self.tile:
            return TILE
        if self.number is not None and expr == self.number:
            return NUMBER
        return super().place(expr)

    def _named(self, expr, placed):
        names = self._in_loop if hoist.level(expr) == hoist.ELEMENT else self._known
        if expr not in names:
            # No assumptions: a symbol that is known to be positive would rewrite what it is in.
            condition = isinstance(expr, sympy.logic.boolalg.Boolean)
            assumed = {} if condition else {"real": True}
            if not condition and expr.is_integer:
                assumed = {"integer": True, "nonnegative": expr.is_nonnegative}
            names[expr] = sympy.Symbol(f"{self.prefix}{len(self.named)}", **assumed)
            self.named.append((names[expr], expr, placed))
        return names[expr]


@dataclass
class _Member:
    """A hoisted value: its type, its name and the expression that gives it."""

    ctype: str
    name: str
    value: str


NAMES = {"b": "at.batch", "h": "at.head", "Sq": "at.queries", "Skv": "at.keys"}
NAMES |= {"q_last": "(q_end - 1)"}
WIDE_ELEMENTS = ("int64_t", "uint64_t", "double")


class _Writer:
    """Prints the members of Variant; collects what heads, rows and columns hold."""

    def __init__(self, key: CudaKey) -> None:
        self.key, self.spec = key, key.spec
        self.printer = _Printer()
        self.aux = {x.tensor: x for x in aux_parameters(key.spec)}
        self.members: list[list[_Member]] = [[], [], []]  # of heads, rows, columns
        self.kinds: dict[sympy.Symbol, tuple[int, str]] = {}  # level and kind of each name
        self.known: dict[sympy.Basic, sympy.Symbol] = {}
        self.names = dict(NAMES)
        self.names |= {f"n{i}": f"at.aux.n{i}" for i in range(key.spec.size_count)}
        scalars = head_scalars(key.spec)
        self.names |= {
            name.name: f"int64_t({self.load(x, x.index, hoist.HEAD).body})"
            for x, name in scalars.items()
        }
        self.loads = {name: x for x, name in scalars.items()}

    def aux_members(self) -> list[str]:
        types = {"stride": "int64_t", "size": "int", "number": "int"}
        lines = []
        for x in aux_fields(self.spec):
            pointer = f"const {self.element(x.index)}* " if x.kind == "pointer" else ""
            lines.append(f"{pointer or types[x.kind] + ' '}{x.name};")
        return lines

    def element(self, tensor: int) -> str:
        return self.key.elements[tensor] if self.key.elements else "float"

    def variant(self) -> list[str]:
        terms = arrange(self.spec.score)
        body = [*self.score(terms), *self.mask(), *self.sinks(), *self.weight(), *self.fill()]
        return [*self.structs(), *body]

    # The parts of the variant.

    def score(self, terms: Terms) -> list[str]:
        scale = self.expression(terms.scale, "scale", hoist.HEAD)
        lines = [_method("float", "scale", "const auto& head", f"({scale}) * kLog2e")]
        if terms.slope != 0:
            slope = self.expression(terms.slope / terms.scale, "slope", hoist.HEAD)
            lines += ["static constexpr bool kAffine = true;"]
            lines += [_method("float", "slope", "const auto& head", slope)]
        if terms.shift != 0:
            shift = self.expression(terms.shift, "shift", hoist.ROW)
            lines += ["static constexpr bool kShift = true;"]
            lines += [_method("float", "shift", _SITE["row"], shift)]
        if terms.x != E.S:
            lines += ["static constexpr bool kScore = true;"]
            lines += self.element_method("float", "score", "float s, " + _SITE["element"], terms.x)
        if terms.wide:
            lines += ["static constexpr bool kWideScores = true;"]
        if hoist.may_be_minus_inf(self.spec.score):
            lines += ["static constexpr bool kFiniteScores = false;"]
        if self.key.tile is not None:
            lines += ["static constexpr bool kDenseTile = true;"]
            lines += [f"using TileDtype = {self.element(self.key.tile)};"]
        return lines

    def mask(self) -> list[str]:
        dead = {"zero": "kZero", "nan": "kNan"}.get(self.spec.dead, "kFilled")
        if dead == "kFilled" and fills_dead_rows(self.spec) == "never":
            dead = "kNan"
        lines = [f"static constexpr Dead kDead = Dead::{dead};"]
        if not self.spec.has_mask:
            return lines
        parts = mask_parts(named_mask(self.spec))
        column, element = (x.xreplace(self.loads) for x in (parts.column, parts.element))
        if parts.interval is not None:
            for name, flag, bound, open_end in (
                ("row_begin", "kRowBegin", parts.interval[0], sympy.S.Zero),
                ("row_end", "kRowEnd", parts.interval[1], E.SKV),
            ):
                if bound != open_end:
                    text = self.bound(bound)
                    lines += [f"static constexpr bool {flag} = true;"]
                    lines += [_method("int", name, _SITE["row"], text)]
        if column != sympy.true:
            lines += ["static constexpr bool kColumnMask = true;"]
            site = "const At& at, const auto& head, const auto& col, int kv"
            lines += self.element_method("bool", "column_mask", site, column, tile=False)
        if element != sympy.true:
            lines += ["static constexpr bool kMask = true;"]
            lines += self.element_method("bool", "mask", _SITE["element"], element, tile=False)
        return lines + self.blocks()

    def blocks(self) -> list[str]:
        """Which key blocks a query block meets."""
        kind = map_kind(self.spec)
        if not kind:
            return self.bounds()
        intervals = self.intervals() if kind == "Interval" else []
        return ["static constexpr bool kBlockMap = true;", *intervals]

    def bounds(self) -> list[str]:
        mask = named_mask(self.spec)
        outer = kv_bounds(mask, Q_BEGIN, Q_LAST)
        full = kv_full_bounds(mask, Q_BEGIN, Q_LAST)
        texts = ", ".join(f"int({self.bound(x)})" for x in (*outer, *full))
        lines = []
        if full[0] != 0:
            lines += ["static constexpr bool kLeftBlocks = true;"]
        site = "const At& at, int q_begin, int q_end"
        return [*lines, _method("KeyBounds", "bounds", site, f"{{{texts}}}")]

    def bound(self, bound: E.Expr) -> str:
        """A number of keys; what a captured integer gives has 64 bits until it is one."""
        if bound.free_symbols & self.loads.keys():
            bound = sympy.Min(sympy.Max(bound, 0), E.SKV)
        return self.expression(bound, "bound", None)

    def intervals(self) -> list[str]:
        """What IntervalBlockMap asks of the variant."""

        def ctype(x: E.load) -> str:
            return self.ctype("int" if self.spec.aux[x.tensor] == "bool" else
                              self.spec.aux[x.tensor], x)  # fmt: skip

        def load(x: E.load) -> str:
            return self.load(x, x.index, hoist.HEAD).body

        found = block_map.classification(self.spec.mask, load, ctype)
        value = block_map.map_value(self.spec.mask, ctype)
        count = max(1, len(found.queries), len(found.keys))
        lines = [f"using MapValue = {value};", f"static constexpr int kMapValues = {count};"]
        for name, axis, loads in (
            ("map_query", "q", found.queries),
            ("map_key", "kv", found.keys),
        ):
            body = [f"if (i == {i}) return {load(x)};" for i, x in enumerate(loads)]
            site = f"const At& at, int i, int {axis}"
            lines += _function("MapValue", name, site, [*body, "return 0;"])
        site = "const At& at, const Interval<MapValue>* queries, const Interval<MapValue>* keys,"
        site += " Interval<int> q, Interval<int> kv"
        return [*lines, *_function("int", "classify", site, found.lines)]

    def sinks(self) -> list[str]:
        if not self.spec.sinks:
            return []
        texts = [self.expression(x, f"sink{i}_", hoist.ROW) for i, x in enumerate(self.spec.sinks)]
        text = functools.reduce(lambda a, b: f"log_add({a}, {b})", texts)
        return ["static constexpr bool kSink = true;", _method("float", "sink", _SITE["row"], text)]

    def weight(self) -> list[str]:
        weight = self.spec.weight
        if weight is None:
            return []
        lines = ["static constexpr bool kWeight = true;"]
        number = drawn(weight)
        if number is not None:
            seed, _ = self.place(number.args[0], "seed", whole=True)
            text = self.text(seed, hoist.ELEMENT).body
            lines += ["static constexpr bool kUniform = true;"]
            lines += [_method("int64_t", "seed", "const At& at, const auto& head", text)]
        site = _SITE["element"].replace("float tile", "auto number")
        return lines + self.element_method("float", "weight", site, weight, False, number)

    def fill(self) -> list[str]:
        fill = self.spec.fill
        if fill is None or fills_dead_rows(self.spec) == "never":
            return []
        lines = []
        site = "float s, " + _SITE["element"].rsplit(",", 1)[0]
        if uniform_fill(fill):
            lines += ["static constexpr bool kUniformFill = true;"]
            constant = fill.as_coeff_Add()[0]
            if constant <= ABSORBING:
                fill = constant
        return lines + self.element_method("float", "fill", site, fill, tile=False)

    def structs(self) -> list[str]:
        lines = []
        sites = (
            "const At& at",
            "const At& at, const Head& head, int q",
            "const At& at, const Head& head, int kv",
        )
        for name, site, members in zip(LEVELS, sites, self.members):
            if not members:
                continue
            struct = name.capitalize()
            inside = " ".join(f"{x.ctype} {x.name};" for x in members)
            lines.append(f"struct {struct} {{ {inside} }};")
            body = [f"const auto {x.name} = {x.value};" for x in members]
            body.append(f"return {{{', '.join(x.name for x in members)}}};")
            lines += _function(struct, name, site, body)
        return lines

    # Expressions.

    def expression(self, expr, prefix: str, level: int | None) -> str:
        """An expression of a head or a row as text; `level` None hoists nothing."""
        if level is None:
            return self.text(expr, hoist.ELEMENT).body
        placed, locals_ = self.place(expr, prefix, whole=level == hoist.HEAD)
        assert not locals_, expr
        return self.printer.to_float(self.text(placed, hoist.ELEMENT)).body

    def element_method(
        self, ctype: str, name: str, site: str, expr, tile=True, number: E.uniform | None = None
    ) -> list[str]:
        placed, locals_ = self.place(expr, name, tile, number=number)
        text = self.text(placed, hoist.ELEMENT)
        body = text.body if ctype == "bool" else self.printer.to_float(text).body
        lines = [f"const auto {x.name} = {x.value};" for x in locals_]
        return _function(ctype, name, site, [*lines, f"return {body};"])

    def place(self, expr, prefix: str, tile=True, whole=False, number=None) -> tuple:
        """(the expression in terms of hoisted names, what is computed for each element).

        whole   the expression itself gets a name, unless it is a constant
        number  the random number that comes as `number`
        """
        placer = _Placer(prefix, self.known, self.key.tile if tile else None, number)
        placed = placer.place(expr)
        if whole and placed.free_symbols and not placed.is_Symbol:
            placed = placer._named(expr, placed)
        locals_: list[_Member] = []
        for symbol, origin, value in placer.named:
            level = hoist.level(origin)
            if isinstance(value, E.load):
                text = self.load(value, origin.args[1:], level)
            else:
                text = self.text(value, level)
            self.kinds[symbol] = (level, text.kind)
            member = _Member(self.ctype(text.kind, origin), symbol.name, text.body)
            (locals_ if level == hoist.ELEMENT else self.members[level]).append(member)
        return placed, locals_

    def ctype(self, kind: str, expr) -> str:
        wide = any(self.element(x.tensor) == "int64_t" for x in E.loads_in(expr))
        return "int64_t" if kind == "int" and wide else kind

    def text(self, expr, level: int) -> Text:
        """As it reads in the function that computes members of a level."""
        bound = {TILE: Text("tile", "float"), NUMBER: Text("number", "float")}
        for symbol, (own, kind) in self.kinds.items():
            inside = own == level or own == hoist.ELEMENT
            body = symbol.name if inside else f"{LEVELS[own]}.{symbol.name}"
            bound[symbol] = Text(body, kind)
        env = Env(self.names, lambda x, _: self.load(x, x.index, hoist.HEAD).body, self.spec.aux)
        return Session(self.printer, env, bound).text(expr)

    def load(self, value: E.load, origin, level: int) -> Text:
        """`ldg` by pointer and strides; the part of the address that a head or a row shares is
        computed once there. Indices that may leave the tensor are guarded."""
        i = value.tensor
        name, guards, shared, own = f"aux{i}", [], {hoist.HEAD: [], hoist.ROW: []}, []
        for d, (index, was) in enumerate(zip(value.index, origin)):
            if was == 0:
                continue
            lower = hoist.level(was)
            body = self.printer.to_int(self.text(index, level)).body
            if d in self.aux[i].sizes:
                guards += [f"{body} >= 0", f"{body} < at.aux.{name}_size{d}"]
            unit = i < len(self.key.unit) and d in self.key.unit[i]
            stride = "" if unit else f" * at.aux.{name}_stride{d}"
            if d not in self.aux[i].sizes and lower in shared and lower < level:
                at_home = self.printer.to_int(self.text(index, lower)).body
                shared[lower].append(f"int64_t({at_home}){stride}")
            else:
                own.append(f"int64_t({body}){stride}")
        pointer = self.base(i, shared, level)
        address = " + ".join([pointer, *own])
        kind = self.spec.aux[i]
        body = f"ldg({address})"
        if guards:
            body = f"({' && '.join(guards)} ? {body} : {self.zero(i)})"
        if kind == "float":
            return Text(f"float({body})", "float")
        return Text(body if self.element(i) == "int64_t" else f"int({body})", "int")

    def zero(self, tensor: int) -> str:
        element = self.element(tensor)
        return "0.0f" if element in ("Bf16", "Fp16") else f"{element}(0)"

    def base(self, tensor: int, shared: dict[int, list[str]], level: int) -> str:
        """The pointer to what a head or a row shares, a member where that saves work."""
        pointer = f"at.aux.aux{tensor}"
        ctype = f"const {self.element(tensor)}*"
        for own in (hoist.HEAD, hoist.ROW):
            if not shared[own] or own >= level:
                continue
            value = " + ".join([pointer, *shared[own]])
            same = [x for x in self.members[own] if x.value == value]
            if not same:
                member = _Member(ctype, f"at{tensor}_{len(self.members[own])}", value)
                self.members[own].append(member)
                same = [member]
            pointer = f"{LEVELS[own]}.{same[0].name}"
        return pointer


_SITE = {
    "row": "const At& at, const auto& head, const auto& row, int q",
    "element": "const At& at, const auto& head, const auto& row, const auto& col, int q, int kv,"
    " float tile",
}


def _method(ctype: str, name: str, site: str, value: str) -> str:
    return f"FA3_DEVICE static {ctype} {name}({site}) {{ return {value}; }}"


def _function(ctype: str, name: str, site: str, body: list[str]) -> list[str]:
    return [f"FA3_DEVICE static {ctype} {name}({site}) {{", *(f"  {x}" for x in body), "}"]


@functools.cache
def template(name: str) -> jinja2.Template:
    """One of templates/cuda."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(resources.templates()),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
    )
    return environment.get_template(f"cuda/{name}.cu.jinja")
