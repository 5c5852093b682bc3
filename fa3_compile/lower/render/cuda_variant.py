"""The members of the C++ struct Variant, printed for one attention.

kernels/include/fa3/variant.cuh says what each is for. Only printed expressions, integers and fixed
words are written; no string of the user's is.
"""

# sympy gives the parts of an expression as Basic.
# pyright: reportArgumentType=false

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import sympy

from fa3_compile.lower.printers import hoist
from fa3_compile.lower.printers.cuda_placer import NUMBER, TILE, KernelPrinter, Member, Placer
from fa3_compile.lower.printers.printer import Env, Session
from fa3_compile.lower.printers.text import Text
from fa3_compile.lower.render import block_map
from fa3_compile.lower.render.cuda_distance import distance_term, scaling
from fa3_compile.lower.render.cuda_terms import (
    ABSORBING,
    Terms,
    arrange,
    aux_fields,
    capped,
    drawn,
    fills_dead_rows,
    head_scalars,
    mask_parts,
    named_mask,
    uniform_fill,
)
from fa3_compile.lower.render.render import aux_parameters
from fa3_compile.spec import expr as E
from fa3_compile.spec.blocks import kv_bounds, kv_full_bounds

if TYPE_CHECKING:
    from fa3_compile.lower.render.render_cuda import CudaKey

Q_BEGIN, Q_LAST = sympy.symbols("q_begin q_last", integer=True, nonnegative=True)
LEVELS = ("head", "row", "col")


NAMES = {"b": "at.batch", "h": "at.head", "Sq": "at.queries", "Skv": "at.keys"}
NAMES |= {"q_last": "(q_end - 1)"}


class VariantWriter:
    """Prints the members of Variant; collects what heads, rows and columns hold."""

    def __init__(self, key: CudaKey, factor: float = 0.0) -> None:
        """factor  of Q, where scores begin with the dense input or a table"""
        self.key, self.spec, self.factor = key, key.spec, factor
        self.printer = KernelPrinter()
        self.aux = {x.tensor: x for x in aux_parameters(key.spec)}
        self.members: list[list[Member]] = [[], [], []]  # of heads, rows, columns
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
        begin = (
            self.distance_table() if self.key.by_distance else self.score(arrange(self.spec.score))
        )
        body = [*begin, *self.mask(), *self.sinks(), *self.weight(), *self.fill()]
        return [*self.structs(), *body]

    # The parts of the variant.

    def score(self, terms: Terms) -> list[str]:
        scale = self.expression(terms.scale, "scale", hoist.HEAD)
        scale = scale if terms.scale.is_number else f"above_zero({scale})"
        lines = [method("float", "scale", "const auto& head", f"({scale}) * kLog2e")]
        if terms.slope != 0:
            slope = self.expression(terms.slope / terms.scale, "slope", hoist.HEAD)
            lines += ["static constexpr bool kAffine = true;"]
            lines += [method("float", "slope", "const auto& head", slope)]
        if terms.shift != 0:
            shift = self.expression(terms.shift, "shift", hoist.ROW)
            lines += ["static constexpr bool kShift = true;"]
            lines += [method("float", "shift", SITE["row"], shift)]
        if terms.x != E.S:
            lines += ["static constexpr bool kScore = true;"]
            lines += self.element_method("float", "score", "float s, " + SITE["element"], terms.x)
            if inner := capped(terms):
                lines += [f"static constexpr float kInner = {self.printer.number(inner)};"]
        if terms.wide:
            lines += ["static constexpr bool kWideScores = true;"]
        if hoist.may_be_minus_inf(self.spec.score):
            lines += ["static constexpr bool kFiniteScores = false;"]
        if self.key.tile is not None:
            lines += ["static constexpr bool kDenseTile = true;"]
            lines += [f"using TileDtype = {self.element(self.key.tile)};"]
        if self.factor:
            lines += [f"static constexpr float kFactor = {self.printer.number(self.factor)};"]
        return lines

    def distance_table(self) -> list[str]:
        """A score that begins with a table by kv - q."""
        term = distance_term(self.spec.score)
        assert term is not None
        unit, _ = scaling(self.spec.score, self.key.dtype)
        value = self.printer.to_float(self.text(term, hoist.ELEMENT)).body
        own = {"kTableOfBatch": E.B, "kTableOfHead": E.H}
        flags = {name: str(axis in term.free_symbols).lower() for name, axis in own.items()}
        return [
            *self.score(Terms(E.S, sympy.Float(unit), wide=True)),
            "static constexpr bool kByDistance = true;",
            f"static constexpr float kUnit = {self.printer.number(unit)};",
            *(f"static constexpr bool {name} = {value};" for name, value in flags.items()),
            method("float", "by_distance", "const At& at, int distance", value),
        ]

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
                    lines += [method("int", name, SITE["row"], text)]
        if column != sympy.true:
            lines += ["static constexpr bool kColumnMask = true;"]
            site = "const At& at, const auto& head, const auto& col, int kv"
            lines += self.element_method("bool", "column_mask", site, column, tile=False)
        if element != sympy.true:
            lines += ["static constexpr bool kMask = true;"]
            lines += self.element_method("bool", "mask", SITE["element"], element, tile=False)
        return lines + self.blocks()

    def blocks(self) -> list[str]:
        """Which key blocks a query block meets."""
        kind = self.key.map_kind
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
        return [*lines, method("KeyBounds", "bounds", site, f"{{{texts}}}")]

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
        value = block_map.map_value(found, self.spec.mask, ctype)
        count = max(1, len(found.queries), len(found.keys))
        lines = [f"using MapValue = {value};", f"static constexpr int kMapValues = {count};"]
        for name, axis, values in (
            ("map_query", "q", found.queries),
            ("map_key", "kv", found.keys),
        ):
            texts = [block_map.value_text(x, load) for x in values]
            body = [f"if (i == {i}) return {text};" for i, text in enumerate(texts)]
            site = f"const At& at, int i, int {axis}"
            lines += function("MapValue", name, site, [*body, "return 0;"])
        site = "const At& at, const Interval<MapValue>* queries, const Interval<MapValue>* keys,"
        site += " Interval<int> q, Interval<int> kv"
        return [*lines, *function("int", "classify", site, found.lines)]

    def sinks(self) -> list[str]:
        if not self.spec.sinks:
            return []
        texts = [self.expression(x, f"sink{i}_", hoist.ROW) for i, x in enumerate(self.spec.sinks)]
        text = functools.reduce(lambda a, b: f"log_add({a}, {b})", texts)
        return ["static constexpr bool kSink = true;", method("float", "sink", SITE["row"], text)]

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
            lines += [method("int64_t", "seed", "const At& at, const auto& head", text)]
        site = SITE["element"].replace("float tile", "auto number")
        return lines + self.element_method("float", "weight", site, weight, False, number)

    def fill(self) -> list[str]:
        fill = self.spec.fill
        if fill is None or fills_dead_rows(self.spec) == "never":
            return []
        lines = []
        site = "float s, " + SITE["element"].rsplit(",", 1)[0]
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
            lines += function(struct, name, site, body)
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
        return function(ctype, name, site, [*lines, f"return {body};"])

    def place(self, expr, prefix: str, tile=True, whole=False, number=None) -> tuple:
        """(the expression in terms of hoisted names, what is computed for each element).

        whole   the expression itself gets a name, unless it is a constant
        number  the random number that comes as `number`
        """
        placer = Placer(prefix, self.known, self.key.tile if tile else None, number)
        placed = placer.place(expr)
        if whole and placed.free_symbols and not placed.is_Symbol:
            placed = placer._named(expr, placed)
        locals_: list[Member] = []
        for symbol, origin, value in placer.named:
            level = hoist.level(origin)
            if isinstance(value, E.load):
                text = self.load(value, origin.args[1:], level)
            else:
                text = self.text(value, level)
            self.kinds[symbol] = (level, text.kind)
            member = Member(self.ctype(text.kind, origin), symbol.name, text.body)
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
        return "0.0f" if element in ("Bf16", "Fp16") else f"({element})0"

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
                member = Member(ctype, f"at{tensor}_{len(self.members[own])}", value)
                self.members[own].append(member)
                same = [member]
            pointer = f"{LEVELS[own]}.{same[0].name}"
        return pointer


SITE = {
    "row": "const At& at, const auto& head, const auto& row, int q",
    "element": "const At& at, const auto& head, const auto& row, const auto& col, int q, int kv,"
    " float tile",
}


def method(ctype: str, name: str, site: str, value: str) -> str:
    return f"FA3_DEVICE static {ctype} {name}({site}) {{ return {value}; }}"


def function(ctype: str, name: str, site: str, body: list[str]) -> list[str]:
    return [f"FA3_DEVICE static {ctype} {name}({site}) {{", *(f"  {x}" for x in body), "}"]
