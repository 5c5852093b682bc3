"""Where weights are filled with 0 after the softmax: what that adds to the scores' own mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import sympy
from sympy.logic.boolalg import Boolean
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.lift.lift import truth
from fa3_compile.frontend.lift.placeholders import ANY_KEY, over_keys, some, without_some
from fa3_compile.spec.expr import KV, Expr, Q, depends_on, where
from fa3_compile.spec.normal_form import tidy, tidy_mask
from fa3_compile.spec.selects import assuming
from fa3_compile.spec.separate import Separated


def merged(
    separated: Separated,
    *,
    weight: Expr,
    kept: Boolean,
    may_be_infinite: Callable[[Expr], bool],
    at: fx.Node,
) -> tuple[Separated, Expr, Boolean]:
    """(the fields of the spec, its weight, which rows of the output stay: the others are 0) for
    weights that are 0 where `kept` does not hold.

    The weight of a masked key is 0 already, but for rows without a key: NaN or a mean of all in
    the softmax, zeros after the fill if no key is left. `Decline` at `at` where a row of NaN may be
    filled in part, which a factor cannot say.

    may_be_infinite: whether something that an expression reads, or has in it, may be -inf. Then all
    visible scores of a row may be.
    """
    kept = tidy_mask(kept)
    may_lose_rows = may_be_infinite(separated.score)
    separated, kept = _rows_filled(separated, kept, may_lose_rows)
    if separated.dead == "score" and kept != sympy.true and may_be_infinite(separated.fill):
        if not _conjuncts(separated.mask) <= _conjuncts(kept):
            raise _filled_in_part(at)
        separated = dataclasses.replace(separated, dead="zero", fill=None)
    if separated.dead == "score":
        multiplied, weight = _conditions(weight)
        kept = tidy_mask(sympy.And(kept, multiplied))
        if _conjuncts(kept) == _conjuncts(separated.mask):
            separated = dataclasses.replace(separated, dead="zero", fill=None)
            return separated, tidy(weight), sympy.true
        return separated, tidy(weight * where(kept, 1, 0)), sympy.true
    whole = kept == sympy.true or separated.certain or separated.dead == "zero"
    if whole or _finite_where_filled(separated, kept, may_be_infinite):
        weight = _where_masked(weight * where(kept, 1, 0), separated.mask)
        return separated, weight, sympy.true
    rows = sympy.And(*(x for x in _conjuncts(kept) if not depends_on(x, [KV])))
    keys = sympy.And(*(_conjuncts(kept) - _conjuncts(rows)))
    others = sympy.And(*(_conjuncts(keys) - _conjuncts(separated.mask)))
    weight = _where_masked(weight * where(others, 1, 0), separated.mask)
    if not may_lose_rows and _conjuncts(separated.mask) <= _conjuncts(keys):
        # A row without a key keeps none.
        return dataclasses.replace(separated, dead="zero"), weight, rows
    if keys != sympy.true and others == sympy.true and not depends_on(keys, [Q]):
        return separated, weight, tidy_mask(sympy.And(rows, _any(keys)))
    if keys != sympy.true:
        raise _filled_in_part(at)
    return separated, weight, rows


def _filled_in_part(at: fx.Node) -> Decline:
    return Decline(
        "mask-after-softmax",
        at,
        "Mask the scores alone, before the softmax, or both by the same mask.",
        message="a row without keys is NaN after the softmax, and then filled in part",
    )


def _finite_where_filled(
    separated: Separated, kept: Boolean, may_be_infinite: Callable[[Expr], bool]
) -> bool:
    """Whether keys whose weights are filled have a score, and a finite one, as -1e9 is: then no row
    of NaN has any of them."""
    for condition in _conjuncts(kept):
        filled = frozenset(_conjuncts(tidy_mask(sympy.Not(condition))))
        seen = _conjuncts(separated.mask) - {sympy.true} <= filled
        if not seen or may_be_infinite(assuming(separated.score, filled)):
            return False
    return True


def _any(keys: Boolean) -> Boolean:
    """Whether a condition holds for some key."""
    return sympy.Ne(over_keys(where(keys.subs(KV, ANY_KEY), 1, 0)), 0)


def _rows_filled(
    separated: Separated, kept: Boolean, may_lose_rows: bool
) -> tuple[Separated, Boolean]:
    """The same, with rows of zeros where `kept` asks for some key that the mask shows."""
    rest = []
    for condition in _conjuncts(kept):
        asked = condition.lhs if isinstance(condition, sympy.Ne) else None
        if isinstance(asked, some) and not may_lose_rows:
            shown = tidy_mask(truth(asked.args[1]))
            if _conjuncts(shown) == _conjuncts(separated.mask):
                separated = dataclasses.replace(separated, dead="zero", fill=None)
                continue
        rest.append(condition)
    return separated, tidy_mask(without_some(sympy.And(*rest)))


def _conjuncts(mask: Boolean) -> set[Boolean]:
    return {*sympy.And.make_args(mask)}


def _conditions(weight: Expr) -> tuple[Boolean, Expr]:
    """The weight's factors that are 0 or 1, as one condition, and the other factors."""
    conditions, others = [], []
    for factor in sympy.Mul.make_args(weight):
        if isinstance(factor, where) and factor.args[1:] == (1, 0):
            conditions.append(factor.args[0])
        elif isinstance(factor, where) and factor.args[1:] == (0, 1):
            conditions.append(sympy.Not(factor.args[0]))
        else:
            others.append(factor)
    return sympy.And(*conditions), sympy.Mul(*others)


def _where_masked(weight: Expr, mask: Boolean) -> Expr:
    """The weight where the mask holds: what is 0 or 1 by the mask alone is left out."""
    facts = frozenset(_conjuncts(mask)) - {sympy.true}
    weight = tidy(weight)
    return tidy(assuming(weight, facts)) if facts else weight
