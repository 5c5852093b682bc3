"""Where each part of an expression is computed in a tiled kernel, by what it depends on.

A part that needs neither q nor kv is a scalar of the program, one that needs q alone a column
[BLOCK_Q, 1] computed before the loop over KV blocks, one that needs kv alone a row [1, BLOCK_KV]
of the loop's body; only what truly needs both is computed per element.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean, BooleanAtom

from fa3_compile.lower.printers.formulas import expm1, log1p, precise_tanh
from fa3_compile.lower.printers.whole_sums import whole, with_whole_sums
from fa3_compile.spec import expr as E
from fa3_compile.spec.mask_biases import bias_of

LOG2E = sympy.Float(math.log2(math.e))

# What an expression depends on, as a bit set; s is an element of both axes.
HEAD, ROW, COLUMN, ELEMENT = 0, 1, 2, 3

# A smaller factor of all scores is not taken out of them: near 0 it is 0 in float32, and 0 times
# the -inf of a masked score is NaN.
LEAST_SCALE = 2.0**-100

# Coordinates relative to the tile, in which affine terms keep their precision.
LANE = sympy.Symbol("lane", integer=True, nonnegative=True)  # kv - kv_start
ROW_IN_TILE = sympy.Symbol("row", integer=True, nonnegative=True)  # q - q_start
Q_START = sympy.Symbol("q_start", integer=True, nonnegative=True)
KV_START = sympy.Symbol("kv_start", integer=True, nonnegative=True)

_ROW_SYMBOLS = {E.Q, ROW_IN_TILE}
_COLUMN_SYMBOLS = {E.KV, LANE}


def level(expr: E.Expr | Boolean) -> int:
    """HEAD, ROW, COLUMN or ELEMENT."""
    symbols = expr.free_symbols
    if E.S in symbols:
        return ELEMENT
    return (ROW if symbols & _ROW_SYMBOLS else 0) | (COLUMN if symbols & _COLUMN_SYMBOLS else 0)


@dataclass(frozen=True)
class Logits:
    """The score, arranged for an online softmax.

    The exponent of an element is `unit * score = scale * x + shift`, where `unit` is log2(e),
    or 1 where a score may be so large that the product would overflow; `shift` has no part that
    depends on kv beyond the block, so it goes through the row maximum at no cost per element.
    """

    x: E.Expr
    shift: E.Expr
    scale: float
    log2: bool


def arrange(score: E.Expr) -> Logits:
    """The score as `Logits`.

    A term c*(kv - q) becomes c*lane in x, where `lane` is the key's position in its block and
    so the same in every iteration, and c*(kv_start - q_start) - c*row in the shift.
    """
    if may_be_huge(score):
        return plain(score)
    score = with_whole_sums(score)
    terms = [y * LOG2E for x in sympy.Add.make_args(score) for y in distributed(x)]
    per_key = {c: t for t in terms if (c := coefficient_of(t, E.KV)) is not None}
    per_query = {c: t for t in terms if (c := coefficient_of(t, E.Q)) is not None}
    x, shift = [], []
    for term in terms:
        if (c := coefficient_of(term, E.KV)) is not None and per_key[c] is term:
            distance = KV_START - Q_START if -c in per_query else KV_START
            x.append(c * LANE)
            shift.append(sympy.Mul(c, distance, evaluate=False))
            if -c in per_query:
                shift.append(-c * ROW_IN_TILE)
        elif (c := coefficient_of(term, E.Q)) is not None and -c in per_key:
            continue
        elif level(term) in (HEAD, ROW):
            shift.append(term)
        else:
            x.append(term)
    scale = 1.0
    if len(x) == 1:
        c, rest = x[0].as_coeff_Mul()
        if c >= LEAST_SCALE:
            scale, x = float(c), [rest]
    return Logits(sympy.Add(*x), sympy.Add(*shift), scale, log2=True)


def plain(score: E.Expr) -> Logits:
    """The score as it is, in natural-log units."""
    return Logits(with_whole_sums(score), sympy.S.Zero, 1.0, log2=False)


def distributed(term: E.Expr) -> list[E.Expr]:
    """c*(kv - q + ...) with c the same for a whole head, as its terms; else the term itself."""
    if isinstance(term, sympy.Mul):
        sums = [x for x in term.args if isinstance(x, sympy.Add) and E.KV in x.free_symbols]
        rest = [x for x in term.args if x not in sums]
        if len(sums) == 1 and level(sympy.Mul(*rest)) == HEAD:
            return [sympy.Mul(*rest, x) for x in sums[0].args]
    return [term]


def coefficient_of(term: E.Expr, symbol: sympy.Symbol) -> E.Expr | None:
    """c where the term is c*symbol with c the same for a whole head."""
    c, rest = term.as_independent(symbol, as_Add=False)
    return c if rest == symbol and level(c) == HEAD else None


# Scores of this size leave the logarithm of a row's sum no more than two digits in float32.
LARGE = 3e4


@functools.lru_cache(maxsize=1024)
def may_be_huge(score: E.Expr) -> bool:
    """Whether a score can be so large that its LSE does not hold the logarithm of a sum, up to
    float32's limits: masks given as large negative biases or as fills, of whole heads too."""
    terms = [x.as_coeff_Mul()[1] for x in sympy.Add.make_args(score)]
    if any(level(x) != HEAD or x in terms for x in E.loads_in(score)):
        return True
    if any(abs(x) > LARGE for x in score.atoms(sympy.Number)) or score.has(sympy.oo, -sympy.oo):
        return True
    return any(_may_be_fill(y) for x in score.atoms(E.where) for y in x.args[1:])


def _may_be_fill(branch) -> bool:
    """Whether a number that is read is one of its terms."""
    terms = branch.args if isinstance(branch, sympy.Add) else (branch,)
    return any(level(x) == HEAD and x.has(E.load) for x in terms)


def may_be_minus_inf(score: E.Expr) -> bool:
    """Whether finite inputs can give a score of -inf where the mask holds."""
    return may_be_huge(score) or score.has(sympy.log, sympy.Pow, sympy.exp)


def dead_rows(mask: Boolean) -> str:
    """Which rows can have no key where the mask holds.

    "never"; "long" (only where Sq > Skv: every query sees the key on its own diagonal); or
    "maybe".
    """
    if mask.subs(E.KV, 0) == sympy.true:
        return "never"
    for diagonal in (E.Q, E.Q + E.SKV - E.SQ):
        if mask.subs(E.KV, diagonal) == sympy.true:
            return "long"
    return "maybe"


class Hoister:
    """Splits expressions into statements by level, naming each part that pays for a name.

    statements  (whether it is outside the loop, symbol, expression in terms of
                earlier symbols), in order
    known       what has a name outside the loop; several hoisters may share it
    streamed    "kv" for a loop over KV blocks, "q" for one over query blocks
    """

    def __init__(
        self, prefix: str, known: dict[sympy.Basic, sympy.Symbol], streamed: str = "kv"
    ) -> None:
        self.prefix = prefix
        self._outside = (HEAD, ROW) if streamed == "kv" else (HEAD, COLUMN)
        self._start = KV_START if streamed == "kv" else Q_START
        self.statements: list[tuple[bool, sympy.Symbol, E.Expr | Boolean]] = []
        self._known = known
        self._in_loop: dict[sympy.Basic, sympy.Symbol] = {}

    def place(self, expr) -> Any:
        """The expression with its parts replaced by the symbols of statements."""
        if not expr.args or expr.is_number:
            return expr
        if isinstance(expr, E.load):
            index = [expr.args[0], *map(self.place, expr.index)]
            return self._named(expr, E.load(*index))
        if isinstance(expr, sympy.core.relational.Relational) and level(expr) == ELEMENT:
            return self._compared(expr)
        bias = bias_of(expr)  # pyright: ignore[reportArgumentType]
        if bias is not None:
            return self._biased(expr, *bias)
        if isinstance(expr, (sympy.Add, sympy.Mul, sympy.And, sympy.Or, sympy.Max, sympy.Min)):
            return self._grouped(expr)
        if isinstance(expr, whole):
            return self._argument(expr.args[0])
        if isinstance(expr, (log1p, expm1, precise_tanh)) and level(expr) == ELEMENT:
            return expr.func(self._argument(expr.args[0]))
        placed = expr.func(*map(self.place, expr.args))
        if level(expr) != ELEMENT and not _trivial(expr):
            return self._named(expr, placed)
        return placed

    def _argument(self, x: Any) -> Any:
        """What is computed once: the argument of a series, say, whose text has it nine times."""
        placed = self.place(x)
        return placed if placed.is_Symbol else self._named(x, placed)

    def _biased(self, expr, fill: E.Expr, mask: E.Expr) -> E.Expr:
        """fill * (mask - 1) with a name for the difference: as terms of a sum, or of parts of it,
        fill * mask may overflow."""
        below = self.place(mask - 1)
        below = below if below.is_Symbol else self._named(mask - 1, below)
        return self._named(expr, fill * below) if level(expr) != ELEMENT else fill * below

    def _compared(self, expr):
        """kv - q <= n as kv <= q + n: one comparison per element and no arithmetic."""
        terms = sympy.Add.make_args(expr.lhs - expr.rhs)
        per_key = [x for x in terms if level(x) == COLUMN]
        rest = [-x for x in terms if level(x) in (HEAD, ROW)]
        if len(per_key) + len(rest) < len(terms) or not expr.lhs.is_integer:
            return expr.func(*map(self.place, expr.args))
        left, right, relation = sympy.Add(*per_key), sympy.Add(*rest), expr.func
        if left.could_extract_minus_sign():
            left, right, relation = -left, -right, expr.reversed.func
        bound = self.place(right)
        bound = self._named(right, bound) if bound.args else bound
        return relation(self.place(left), bound, evaluate=False)

    def _grouped(self, expr):
        """An n-ary node, with the operands of each level together."""
        groups: dict[int, list] = {}
        for x in expr.args:
            groups.setdefault(level(x), []).append(x)
        numbers = [x for x in groups.get(HEAD, []) if x.is_number]
        if len(groups) > 1 and len(numbers) == len(groups[HEAD] if HEAD in groups else [0]):
            # A lone number goes with the cheapest other operands.
            del groups[HEAD]
            groups[min(groups)] += numbers
        parts = []
        for key in sorted(groups):
            part = expr.func(*map(self.place, groups[key]))
            whole = expr.func(*groups[key])
            nary = len(groups[key]) > 1 and not _trivial(whole)
            parts.append(self._named(whole, part) if key != ELEMENT and nary else part)
        return expr.func(*parts)

    def _named(self, expr, placed) -> sympy.Symbol:
        outside = level(expr) in self._outside and self._start not in expr.free_symbols
        names = self._known if outside else self._in_loop
        if expr in names:
            return names[expr]
        name = f"{self.prefix}{len(self.statements)}"
        if isinstance(expr, (Boolean, BooleanAtom)):
            symbol = sympy.Symbol(name)
        elif expr.is_integer:
            symbol = sympy.Symbol(name, integer=True, nonnegative=expr.is_nonnegative)
        else:
            symbol = sympy.Symbol(name, real=True)
        names[expr] = symbol
        self.statements.append((outside, symbol, placed))
        return symbol


def _trivial(expr) -> bool:
    """Whether a name would cost the reader more than it saves the machine."""
    return (
        not expr.has(E.load, E.floordiv, E.mod, E.where, sympy.Pow)
        and not expr.has(
            sympy.exp,
            sympy.log,
            sympy.tanh,
            sympy.sin,
            sympy.cos,
            E.erf,
            E.sigmoid,
            sympy.And,
            sympy.Or,
        )
        and expr.count_ops() <= 2
    )
