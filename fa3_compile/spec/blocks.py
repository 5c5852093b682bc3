"""Which keys a block of queries may see at all, and which every query of it sees.

`kv_bounds` and `kv_full_bounds` are closed forms that a kernel evaluates once a query block,
`q_bounds` and `q_full_bounds` their transposes for a KV block. What cannot be told (a captured
tensor, a function without a rule) counts as "may hold, may not": sound by construction.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import sympy
from sympy.logic.boolalg import Boolean

from fa3_compile.spec import expr as E
from fa3_compile.spec.expr import KV, SKV, SQ, Expr, Q, depends_on, floordiv, load, mod, where

ZERO = sympy.S.Zero
Range = tuple[Expr, Expr]  # the least and the largest value, both inclusive


@dataclass(frozen=True)
class _Bounds:
    """Keys outside [lo, hi) fail for every query; keys in [full_lo, full_hi) pass for every."""

    lo: Expr = ZERO
    hi: Expr = SKV
    full_lo: Expr = ZERO
    full_hi: Expr = ZERO

    @property
    def outer(self) -> tuple[Expr, Expr]:
        return self.lo, self.hi

    @property
    def full(self) -> tuple[Expr, Expr]:
        return self.full_lo, self.full_hi


UNKNOWN = _Bounds()
ALL = _Bounds(ZERO, SKV, ZERO, SKV)
NONE = _Bounds(ZERO, ZERO, ZERO, ZERO)


def kv_bounds(mask: Boolean, q_lo: Expr, q_hi: Expr) -> tuple[Expr, Expr]:
    """(lo, hi): no key outside [lo, hi) passes the mask for any query in [q_lo, q_hi].

    Integer expressions of q_lo, q_hi (integer symbols, q_lo <= q_hi), b, h, Sq, Skv and the
    sizes, without loads; 0 <= lo and hi <= Skv, and lo >= hi says that no key passes.
    """
    lo, hi = _bounds(_normal(mask), q_lo, q_hi).outer
    return sympy.Max(ZERO, lo), sympy.Min(SKV, hi)


def kv_full_bounds(mask: Boolean, q_lo: Expr, q_hi: Expr) -> tuple[Expr, Expr]:
    """(lo, hi): every key in [lo, hi) passes the mask for every query in [q_lo, q_hi].

    As `kv_bounds`; lo >= hi says that no such range is known.
    """
    lo, hi = _bounds(_normal(mask), q_lo, q_hi).full
    return sympy.Max(ZERO, lo), sympy.Min(SKV, hi)


@functools.lru_cache(maxsize=1024)
def row_interval(mask: Boolean) -> tuple[Expr, Expr] | None:
    """(begin, end) where the mask holds for exactly the keys in between, for every row."""
    bounds = kv_bounds(mask, Q, Q)
    return bounds if bounds == kv_full_bounds(mask, Q, Q) else None


@functools.lru_cache(maxsize=1024)
def may_have_holes(mask: Boolean) -> bool:
    """Whether lengths alone decide a mask, and blocks that it leaves empty may lie between others:
    a tiled or dilated window. Lists of its blocks are the same in every call."""
    return not mask.has(load, E.uniform) and row_interval(mask) is None


def q_bounds(mask: Boolean, kv_lo: Expr, kv_hi: Expr) -> tuple[Expr, Expr]:
    """(lo, hi): no query outside [lo, hi) may see any key in [kv_lo, kv_hi]; as `kv_bounds`, with
    hi <= Sq."""
    lo, hi = kv_bounds(_transposed(mask), kv_lo, kv_hi)
    return _transposed(lo), _transposed(hi)


def q_full_bounds(mask: Boolean, kv_lo: Expr, kv_hi: Expr) -> tuple[Expr, Expr]:
    """(lo, hi): every query in [lo, hi) sees every key in [kv_lo, kv_hi]; as `kv_full_bounds`."""
    lo, hi = kv_full_bounds(_transposed(mask), kv_lo, kv_hi)
    return _transposed(lo), _transposed(hi)


def _transposed(expr):
    """Queries as keys and keys as queries."""
    return expr.xreplace({Q: KV, KV: Q, SQ: SKV, SKV: SQ})


def _normal(mask: Boolean) -> Boolean:
    """Negations pushed down to the comparisons, which absorb them."""
    return sympy.to_nnf(mask, simplify=False) if mask.has(sympy.Not) else mask


def _bounds(mask: Boolean, q_lo: Expr, q_hi: Expr) -> _Bounds:
    if mask == sympy.true:
        return ALL
    if mask == sympy.false:
        return NONE
    if isinstance(mask, sympy.And):
        return _and([_bounds(x, q_lo, q_hi) for x in mask.args])
    if isinstance(mask, sympy.Or):
        return _or([_bounds(x, q_lo, q_hi) for x in mask.args])
    if isinstance(mask, sympy.core.relational.Relational):
        return _relation(mask, q_lo, q_hi)
    return UNKNOWN


def _and(parts: list[_Bounds]) -> _Bounds:
    if any(x.full == (ZERO, ZERO) for x in parts):
        full = (ZERO, ZERO)
    else:
        full = (
            sympy.Max(*(x.full_lo for x in parts)),
            sympy.Min(*(x.full_hi for x in parts)),
        )
    return _Bounds(sympy.Max(*(x.lo for x in parts)), sympy.Min(*(x.hi for x in parts)), *full)


def _or(parts: list[_Bounds]) -> _Bounds:
    parts = [x for x in parts if x != NONE] or [NONE]
    lo, hi = sympy.Min(*(x.lo for x in parts)), sympy.Max(*(x.hi for x in parts))
    ranges = [x.full for x in parts if x.full != (ZERO, ZERO)] or [(ZERO, ZERO)]
    full = ranges[0]
    for other in ranges[1:]:
        full = _longer(full, other)
    return _Bounds(lo, hi, *full)


def _longer(x: tuple[Expr, Expr], y: tuple[Expr, Expr]) -> tuple[Expr, Expr]:
    if x[0] == y[0]:
        return x[0], sympy.Max(x[1], y[1])
    if x[1] == y[1]:
        return sympy.Min(x[0], y[0]), x[1]
    first = x[1] - x[0] >= y[1] - y[0]
    return where(first, x[0], y[0]), where(first, x[1], y[1])


def _relation(relation, q_lo: Expr, q_hi: Expr) -> _Bounds:
    """A comparison as `difference <= 0`, solved for kv."""
    difference = relation.lhs - relation.rhs
    if isinstance(relation, sympy.Eq):
        return _and([_at_most_zero(x, False, q_lo, q_hi) for x in (difference, -difference)])
    if isinstance(relation, sympy.Ne):
        return UNKNOWN
    if isinstance(relation, (sympy.Gt, sympy.Ge)):
        difference = -difference
    strict = isinstance(relation, (sympy.Lt, sympy.Gt))
    return _at_most_zero(difference, strict, q_lo, q_hi)


def _at_most_zero(difference: Expr, strict: bool, q_lo: Expr, q_hi: Expr) -> _Bounds:
    """The keys for which the difference is <= 0, or < 0 where `strict`."""
    constant, rest = difference.as_coeff_Add()
    if difference.has(load) or not constant.is_finite or not E.is_integer_valued(rest):
        return UNKNOWN
    limit = sympy.ceiling(-constant) - 1 if strict else sympy.floor(-constant)
    if not depends_on(rest, [KV]):
        return _condition_on_queries(rest, limit, q_lo, q_hi)
    return _solve_at_most(rest, (limit, limit), q_lo, q_hi)


def _condition_on_queries(value: Expr, limit: Expr, q_lo: Expr, q_hi: Expr) -> _Bounds:
    found = _range(value, q_lo, q_hi)
    if found is None:
        return UNKNOWN
    least, largest = found
    holds = least <= limit
    # An empty range begins at the end, where it does not widen a union with another.
    return _Bounds(
        where(holds, ZERO, SKV),
        where(holds, SKV, ZERO),
        full_hi=where(largest <= limit, SKV, ZERO),
    )


def _solve_at_most(value: Expr, limit: Range, q_lo: Expr, q_hi: Expr) -> _Bounds:
    """The keys with value <= T, for a T that is within `limit` for every query of the block."""
    low, high = limit
    if value == KV:
        return _Bounds(ZERO, high + 1, ZERO, low + 1)
    if value.is_Add:
        rest = sympy.Add(*(x for x in value.args if not depends_on(x, [KV])))
        found = _range(rest, q_lo, q_hi)
        kv_part = value - rest
        if found is None or kv_part.is_Add:
            return UNKNOWN
        return _solve_at_most(kv_part, (low - found[1], high - found[0]), q_lo, q_hi)
    if isinstance(value, sympy.Abs):
        inside = value.args[0]
        return _and([_solve_at_most(x, limit, q_lo, q_hi) for x in (inside, -inside)])
    factor, rest = _scale(value)
    if factor.is_positive and factor != 1:
        limit = floordiv(low, factor), floordiv(high, factor)
        return _solve_at_most(rest, limit, q_lo, q_hi)
    if factor.is_negative:
        return _solve_at_least(
            rest, (_ceildiv(-high, -factor), _ceildiv(-low, -factor)), q_lo, q_hi
        )
    if isinstance(value, floordiv) and _is_divisor(value.args[1]):
        divisor = value.args[1]
        limit = divisor * low + divisor - 1, divisor * high + divisor - 1
        return _solve_at_most(value.args[0], limit, q_lo, q_hi)
    return UNKNOWN


def _solve_at_least(value: Expr, limit: Range, q_lo: Expr, q_hi: Expr) -> _Bounds:
    """The keys with value >= T; as `_solve_at_most`."""
    low, high = limit
    if value == KV:
        return _Bounds(low, SKV, high, SKV)
    if isinstance(value, floordiv) and _is_divisor(value.args[1]):
        divisor = value.args[1]
        return _solve_at_least(value.args[0], (divisor * low, divisor * high), q_lo, q_hi)
    if isinstance(value, sympy.Abs):
        inside = value.args[0]
        return _or([_solve_at_least(x, limit, q_lo, q_hi) for x in (inside, -inside)])
    if value.is_Add or _scale(value)[0] != 1:
        return _solve_at_most(-value, (-high, -low), q_lo, q_hi)
    return UNKNOWN


def _scale(value: Expr) -> tuple[Expr, Expr]:
    """(a factor of known sign without coordinates, the rest)."""
    factors = sympy.Mul.make_args(value)
    constant = [x for x in factors if not depends_on(x, E.COORDINATES) and x.is_nonzero]
    factor = sympy.Mul(*constant)
    return factor, sympy.Mul(*(x for x in factors if x not in constant))


def _is_divisor(x: Expr) -> bool:
    return bool(x.is_positive) and not depends_on(x, E.COORDINATES)


def _ceildiv(a: Expr, b: Expr) -> Expr:
    return -floordiv(-a, b)


def _range(value: Expr, q_lo: Expr, q_hi: Expr) -> Range | None:
    """The least and largest value over the queries of a block; None where there is no rule."""
    if not depends_on(value, [Q]):
        return value, value
    if value == Q:
        return q_lo, q_hi
    if value.is_Add or isinstance(value, (sympy.Max, sympy.Min)):
        parts = [_range(x, q_lo, q_hi) for x in value.args]
        known = [x for x in parts if x is not None]
        if len(known) < len(parts):
            return None
        return value.func(*(x[0] for x in known)), value.func(*(x[1] for x in known))
    if value.is_Mul:
        factor, rest = _scale(value)
        if factor == 1 or (found := _range(rest, q_lo, q_hi)) is None:
            return None
        low, high = (factor * x for x in found)
        return (high, low) if factor.is_negative else (low, high)
    if isinstance(value, (floordiv, mod)) and _is_divisor(value.args[1]):
        divisor = value.args[1]
        if isinstance(value, mod):
            return ZERO, divisor - 1
        found = _range(value.args[0], q_lo, q_hi)
        return found and (floordiv(found[0], divisor), floordiv(found[1], divisor))
    return None
