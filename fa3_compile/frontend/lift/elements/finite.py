"""Whether constants make a score infinite, and what it is with them replaced; whether what cancels
in a sum, product or quotient may be infinite or NaN."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import sympy
from torch import fx

from fa3_compile.frontend.lift.captured import Captured, Seed, reads_infinite
from fa3_compile.frontend.lift.lift import Lifter, Opaque
from fa3_compile.spec.expr import KV, Expr, S, depends_on, load, loads_in, where
from fa3_compile.spec.fills import LOWEST
from fa3_compile.spec.value_bounds import value_bounds

NOT_FINITE = (sympy.oo, -sympy.oo, sympy.nan, sympy.zoo)
# Selects with an infinite branch that are looked at together: each doubles the cases.
MOST_SELECTS = 6


def may_be_infinite(x: Expr, selects: int = MOST_SELECTS) -> bool:
    """Whether a constant in it makes it infinite, or may: relu(where(c, s, -inf)) it does not."""
    if not x.has(*NOT_FINITE):
        return False
    cases = _by_select(x) if selects else None
    return cases is None or any(may_be_infinite(case, selects - 1) for case in cases[1:])


def kept_apart(a: Expr, b: Expr, alpha: Expr, ctx: Lifter) -> Expr:
    """b, with terms that may be infinite and cancel in a + alpha * b as reads of their own: b - b
    is NaN then. A score counts as finite, and what a function bounds is."""
    if not (loads_in(a) and loads_in(b)):
        return b
    known = [*_terms(a)]
    again: dict[Expr, Expr] = {}
    for c, x in _terms(b, alpha):
        cancels = any(x == y and (c * other).is_negative for other, y in known)
        if cancels and value_bounds(x) is None:
            doubtful = [y for y in loads_in(x) if reads_infinite([y], ctx.loads)]
            again |= {y: _read_again(y, ctx) for y in doubtful}
    return b.xreplace(again)


def opposite_infinities(x: Expr, loads: Sequence[Captured | Seed]) -> bool:
    """Whether what may be infinite is added in it, and what may be infinite is taken off; or inf
    itself is, which a softmax takes off again."""
    x = x.replace(sympy.Min, _without_ceilings)
    if x.has(sympy.oo, sympy.zoo, sympy.nan):
        return True
    signs = {
        bool(c.is_negative)
        for c, term in _terms(x)
        if isinstance(term, load) and reads_infinite([term], loads)
    }
    return len(signs) == 2


def _without_ceilings(*of: Expr) -> Expr:
    """The minimum of these without masks, `where(seen, inf, fill)`, which it never takes inf of."""
    return sympy.Min(*({x for x in of if not _is_constant(x)} or of))


def _is_constant(x: Expr) -> bool:
    """Whether it is a number, or a select of some."""
    if isinstance(x, where):
        return all(map(_is_constant, x.args[1:]))
    return bool(x.is_number and x.is_extended_real)


def _terms(x: Expr, times: Expr = sympy.S.One) -> Iterator[tuple[Expr, Expr]]:
    """(coefficient, term) of a sum and of those that selects in it choose from."""
    for y in sympy.Add.make_args(x):
        c, term = y.as_coeff_Mul()
        if isinstance(term, where):
            for branch in term.args[1:]:
                yield from _terms(branch, c * times)
        else:
            yield c * times, term


def _read_again(x: load, ctx: Lifter) -> load:
    """The same number, which cancels with nothing."""
    ctx.loads.append(ctx.loads[x.tensor])
    return load(len(ctx.loads) - 1, *x.args[1:])


def check_product(node: fx.Node, found: Expr, a: Expr, b: Expr, ctx: Lifter) -> None:
    """`Opaque` where something that may be infinite was multiplied by 0, which is NaN."""
    if reads_infinite(_lost(found, a, b), ctx.loads):
        raise Opaque(node, "what may be infinite is multiplied by 0")
    _check_divisors(node, found, _below(a) | _below(b))


def check_quotient(node: fx.Node, found: Expr, a: Expr, b: Expr) -> None:
    """`Opaque` where what was divided by is no longer there, and may be 0: x / x is NaN then."""
    divisors = {base for base, power in _powers(b) if not power.could_extract_minus_sign()}
    _check_divisors(node, found, divisors)
    if _lost(found, a, b):
        raise Opaque(node, "what may be zero cancels in it")


def check_slope(node: fx.Node, x: Expr, ctx: Lifter) -> None:
    """`Opaque` where x is 0 because a mask multiplies something, and the function of it is
    infinitely steep there: infinity times 0 is NaN in the gradient, which a select leaves out."""
    for select in x.atoms(where) & ctx.multiplied:
        if x.xreplace({select: sympy.S.Zero}) in (0, *NOT_FINITE):
            raise Opaque(node, "the slope of what a mask multiplies is infinite")


def _check_divisors(node: fx.Node, found: Expr, divisors: set[Expr]) -> None:
    """`Opaque` where one of these is divided by no more: x / x, or s / abs(s), is NaN at 0."""
    if not all(x.is_zero is False or _is_below(x, found) for x in divisors):
        raise Opaque(node, "what may be zero cancels in it")


def _is_below(divisor: Expr, x: Expr) -> bool:
    """Whether x is divided by it, but where a mask multiplies a quotient whose divisor is the
    same for all keys of a row: a temperature of 0 is wrong for the keys that are left, too."""
    if not isinstance(x, where):
        return divisor in _below(x)
    branches = [y for y in x.args[1:] if y != 0 or depends_on(divisor, [S, KV])]
    return all(_is_below(divisor, y) for y in branches)


def _below(x: Expr) -> set[Expr]:
    """What a product divides by."""
    return {base for base, power in _powers(x) if power.could_extract_minus_sign()}


def _powers(x: Expr) -> list[tuple[Expr, Expr]]:
    """(base, exponent) of the factors of a product that may be 0: those that are computed of
    scores or read."""
    factors = [y for y in sympy.Mul.make_args(x) if not isinstance(y, (sympy.exp, where))]
    powers = [(y.base, y.exp) if y.is_Pow else (y, sympy.S.One) for y in factors]
    return [(base, power) for base, power in powers if S in base.free_symbols or base.has(load)]


def _lost(found: Expr, a: Expr, b: Expr) -> list[load]:
    return [x for x in loads_in(a, b) if x not in loads_in(found)]


def made_finite(
    x: Expr, instead: dict[Expr, Expr], node: fx.Node, ctx: Lifter, selects: int = MOST_SELECTS
) -> Expr:
    """x with oo, -oo and nan replaced by what `instead` has for them, where constants or tensors
    that are given make it so; s itself counts as finite. What no score is in is better read."""
    if x in instead:
        return instead[x]
    if not x.has(*NOT_FINITE) and not reads_infinite(loads_in(x), ctx.loads):
        return x
    if not x.has(*NOT_FINITE) and node in ctx.inside and _is_sum_of_loads(x, ctx):
        return _clipped(x, instead)
    cases = _by_select(x) if selects else None
    if cases is None:
        raise Opaque(node, "whether a score is infinite is known only when it runs")
    condition, *branches = cases
    return where(condition, *(made_finite(y, instead, node, ctx, selects - 1) for y in branches))


def _by_select(x: Expr) -> tuple[Expr, Expr, Expr] | None:
    """(condition, x where it holds, x elsewhere) for a select with an infinite branch; None where
    there is none, or where x is NaN for it, of which sympy takes no maximum."""
    found = [y for y in x.atoms(where) if any(branch.has(*NOT_FINITE) for branch in y.args[1:])]
    if not found:
        return None
    select = min(found, key=str)
    condition, *branches = select.args
    try:
        yes, no = (x.xreplace({select: branch}) for branch in branches)
    except (TypeError, ValueError):
        return None
    return condition, yes, no


def _is_sum_of_loads(x: Expr, ctx: Lifter) -> bool:
    """Whether what may be infinite in it is added, so that the sum is infinite as well."""
    doubtful = [y for y in sympy.Add.make_args(x) if reads_infinite(loads_in(y), ctx.loads)]
    return all(isinstance(y.as_coeff_Mul()[1], load) for y in doubtful)


def _clipped(x: Expr, instead: dict[Expr, Expr]) -> Expr:
    """Infinite is what lies beyond float32's largest numbers, and NaN what lies nowhere."""
    low, high, nan = (instead[y] for y in (-sympy.oo, sympy.oo, sympy.nan))
    finite = sympy.And(x >= LOWEST, x <= -LOWEST)
    return where(x < LOWEST, low, where(x > -LOWEST, high, where(finite, x, nan)))
