"""Which key blocks a mask leaves a query block, as C++ over intervals.

`classification` prints a mask for kernels/include/fa3/block_map_build.cuh: every captured value
that depends on the query alone or on the key alone, and every sum of such with the position, is an
interval over a block, and the mask evaluated on intervals may hold, must hold, or neither. Sound:
what has no rule may hold and need not.
"""

# sympy gives the parts of an expression as Basic.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import sympy

from fa3_compile.lower.printers import hoist
from fa3_compile.spec import expr as E

# Float comparisons are float32 in the kernel and double here.
SLACK = 1e-6
Pair = tuple[str, str]


@dataclass
class Classification:
    """The body of `classify`, and what it reads along each axis.

    queries, keys  the loads, and sums with loads, whose intervals arrive as queries[i] and keys[i]
    """

    lines: list[str] = field(default_factory=list)
    queries: list[E.Expr] = field(default_factory=list)
    keys: list[E.Expr] = field(default_factory=list)


def reads_dense(mask: E.Boolean) -> bool:
    """Whether a (q, kv) tensor is part of the mask, so that only its elements can tell."""
    return any({E.Q, E.KV} <= set(x.index) for x in mask.atoms(E.load))


def needs_map(mask: E.Boolean) -> bool:
    """Whether lists of blocks say more than one range of keys does."""
    return bool(mask.atoms(E.load)) or mask.has(sympy.Or)


def map_value(found: Classification, mask: E.Boolean, ctype: Callable[[E.load], str]) -> str:
    """The C++ type that holds every value of the map: int, int64_t or double."""
    types = {ctype(x) for x in mask.atoms(E.load)}
    if "float" in types:
        return "double"
    sums = any(x.is_Add for x in (*found.queries, *found.keys))
    return "int64_t" if "int64_t" in types or sums else "int"


def value_text(value: E.Expr, load: Callable[[E.load], str]) -> str:
    """A value of the map at one row or column, as C++."""
    if isinstance(value, E.load):
        return load(value)
    terms = []
    for term in sorted(value.args, key=str):
        factor, x = term.as_coeff_Mul()
        terms.append(f"int64_t({factor}) * {load(x) if isinstance(x, E.load) else x}")
    return " + ".join(terms)


def classification(
    mask: E.Boolean, load: Callable[[E.load], str], ctype: Callable[[E.load], str]
) -> Classification:
    """`load` prints a head's load as an expression, `ctype` is the C++ type of a loaded value."""
    writer = _Writer(load, ctype)
    may, must = writer.truth(mask)
    writer.out.lines.append(f"return !({may}) ? kEmpty : {must} ? kFull : kPartial;")
    return writer.out


class _Writer:
    def __init__(self, load, ctype) -> None:
        self.out = Classification()
        self.load, self.ctype = load, ctype
        self.count = 0

    def named(self, kind: str, low: str, high: str) -> Pair:
        """A pair of variables, so that texts stay short."""
        names = f"low{self.count}", f"high{self.count}"
        self.count += 1
        for name, value in zip(names, (low, high)):
            self.out.lines.append(f"const {kind} {name} = {value};")
        return names

    def truth(self, mask) -> Pair:
        """(may hold somewhere, holds everywhere)."""
        if mask == sympy.true or mask == sympy.false:
            word = "true" if mask == sympy.true else "false"
            return word, word
        if isinstance(mask, sympy.Not):
            may, must = self.truth(mask.args[0])
            return f"!{must}", f"!{may}"
        if isinstance(mask, (sympy.And, sympy.Or)):
            parts = [self.truth(x) for x in sorted(mask.args, key=str)]
            sign = " && " if isinstance(mask, sympy.And) else " || "
            return self.named("bool", *(sign.join(x[i] for x in parts) for i in (0, 1)))
        if isinstance(mask, sympy.core.relational.Relational):
            return self.named("bool", *self.relation(mask))
        return "true", "false"

    def relation(self, relation) -> Pair:
        """The two sides are compared, not subtracted: the difference of two 64-bit values may
        not be one."""
        left, right = relation.lhs, relation.rhs
        if isinstance(relation, (sympy.Gt, sympy.Ge)):
            left, right = right, left
        kind = "double" if self.is_float(left) or self.is_float(right) else "int64_t"
        sides = []
        for side in (left, right):
            found = self.range(side)
            if found is None:
                return "true", "false"
            low, high = self.named(kind, *found)
            if kind == "double" and not (side.is_number or isinstance(side, E.load)):
                low, high = self.named(
                    kind, f"{low} - {SLACK} * fabs({low})", f"{high} + {SLACK} * fabs({high})"
                )
            sides.append((low, high))
        (low, high), (other_low, other_high) = sides
        if isinstance(relation, (sympy.Lt, sympy.Gt)):
            return f"{low} < {other_high}", f"{high} < {other_low}"
        if isinstance(relation, (sympy.Le, sympy.Ge)):
            return f"{low} <= {other_high}", f"{high} <= {other_low}"
        may = f"({low} <= {other_high} && {other_low} <= {high})"
        must = f"({low} == {other_high} && {high} == {other_low})"
        return (f"!{must}", f"!{may}") if isinstance(relation, sympy.Ne) else (may, must)

    def is_float(self, value) -> bool:
        return any(self.ctype(x) == "float" for x in value.atoms(E.load)) or any(
            not x.is_integer for x in value.atoms(sympy.Number)
        )

    def range(self, value) -> Pair | None:
        """The least and largest value over the block; None where there is no rule."""
        if value.is_Integer:
            return str(int(value)), str(int(value))
        if value.is_number:
            x = float(value)
            return (repr(x), repr(x)) if math.isfinite(x) else None
        if isinstance(value, sympy.Symbol):
            return self.symbol(value)
        if isinstance(value, E.load):
            return self.loaded(value)
        if value.is_Add and self.terms(value) == [value]:
            return self.loaded(value)
        if value.is_Add:
            parts = [self.range(x) for x in self.terms(value)]
            known = [x for x in parts if x is not None]
            if len(known) < len(parts):
                return None
            low, high = (" + ".join(x[i] for x in known) for i in (0, 1))
            return f"({low})", f"({high})"
        if value.is_Mul:
            factor, rest = value.as_coeff_Mul()
            found = self.range(rest) if factor != 1 else None
            if found is None:
                return None
            text = str(int(factor)) if factor.is_Integer else repr(float(factor))
            low, high = (f"({text} * {x})" for x in found)
            return (high, low) if factor.is_negative else (low, high)
        if isinstance(value, (sympy.Max, sympy.Min)):
            return self.extremum(value)
        if isinstance(value, E.floordiv) and value.args[1].is_Integer and value.args[1] > 0:
            found = self.range(value.args[0])
            if found is None or self.is_float(value):
                return None
            low, high = (f"floor_div({x}, {int(value.args[1])})" for x in found)
            return low, high
        return None

    def terms(self, total: sympy.Add) -> list[E.Expr]:
        """A sum's terms, those that follow one axis as one: q - load(0, q) varies less over a
        block than q and load(0, q) do apart."""
        apart: list[E.Expr] = []
        followers: dict[int, list[E.Expr]] = {hoist.ROW: [], hoist.COLUMN: []}
        for term in total.args:
            factor, x = term.as_coeff_Mul()
            plain = isinstance(x, (E.load, sympy.Symbol)) and factor.is_Integer
            followers.get(hoist.level(term) if plain else hoist.ELEMENT, apart).append(term)
        for terms in followers.values():
            loaded = len(terms) > 1 and any(x.has(E.load) for x in terms)
            whole = not any(self.is_float(x) for x in terms)
            apart += [sympy.Add(*terms)] if loaded and whole else terms
        return apart

    def symbol(self, value) -> Pair:
        names = {"b": "at.batch", "h": "at.head", "Sq": "at.queries", "Skv": "at.keys"}
        if value in (E.Q, E.KV):
            return f"int64_t({value}.low)", f"int64_t({value}.high)"
        name = names.get(value.name, f"at.aux.{value.name}")
        return f"int64_t({name})", f"int64_t({name})"

    def loaded(self, value: E.Expr) -> Pair | None:
        """A load's interval, or that of a sum of one axis."""
        level = hoist.level(value)
        if level == hoist.ELEMENT:
            return None
        if level == hoist.HEAD:
            return self.named("auto", *[self.load(value)] * 2)
        found, name = (
            (self.out.queries, "queries") if level == hoist.ROW else (self.out.keys, "keys")
        )
        if value not in found:
            found.append(value)
        place = f"{name}[{found.index(value)}]"
        return f"{place}.low", f"{place}.high"

    def extremum(self, value) -> Pair | None:
        parts = [self.range(x) for x in sorted(value.args, key=str)]
        if self.is_float(value) or None in parts:
            return None
        function = "largest" if isinstance(value, sympy.Max) else "least"
        low, high = parts[0] or ("", "")
        for other in parts[1:]:
            assert other is not None
            low, high = (
                f"{function}<int64_t, int64_t>({x}, {y})" for x, y in zip((low, high), other)
            )
        return low, high
