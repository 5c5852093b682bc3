"""One element's expression, taken apart into score, mask and what masked elements are.

Eager code masks by arithmetic: `where(m, s, -inf)`, `s + where(m, 0, finfo.min)`,
`s * m + (1 - m) * -1e9`. Here a mask is whatever puts an element out of reach (spec/fills.py). A
fill that a large score could meet (-10000, -1e9) stays a bias, unless the score is bounded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
from sympy.logic.boolalg import Boolean

from fa3_compile.spec import fills
from fa3_compile.spec.expr import KV, Expr, load, where
from fa3_compile.spec.mask_biases import exact_at_one
from fa3_compile.spec.normal_form import tidy, tidy_mask
from fa3_compile.spec.selects import assuming, merge_conditions


@dataclass(frozen=True)
class Separated:
    """A score expression in the fields of `AttentionSpec`."""

    score: Expr
    mask: Boolean
    dead: str
    fill: Expr | None
    # Whether every row is known to have a key.
    certain: bool = False

    @property
    def may_lose_rows(self) -> bool:
        """Whether all scores of a row that has a key may be -inf: by a bias that is read, or by a
        fill that depends on the score."""
        return self.score.has(load, sympy.oo, -sympy.oo)


def separate(
    expr: Expr,
    *,
    half_fill: bool = False,
    dead_rows_zero: bool = False,
    finite_fills: bool = True,
    largest_s: float | None = None,
) -> Separated:
    """Score, mask and fill of an element's expression.

    half_fill       the scores are float16, so that its lowest number -65504 is out of reach
    dead_rows_zero  rows with no key are replaced by zeros afterwards (nan_to_num, SDPA)
    finite_fills    whether another fill than -inf may be a mask
    largest_s       what the size of the product s cannot exceed, where that is known
    """
    expr = merge_conditions(expr)
    reach = -float("inf")
    if finite_fills:
        reach = -65000.0 if half_fill else fills.OUT_OF_REACH
        bounded = fills.bounded_reach(expr, largest_s)
        reach = max(reach, bounded) if bounded is not None else reach
    dead = fills.killed(expr, reach)
    if dead == sympy.false:
        return unmasked(expr, dead_rows_zero=dead_rows_zero)
    seen_may_be_low = fills.filled_by_score(expr, reach) or fills.undone_perhaps(expr, reach)
    if reach > -float("inf") and seen_may_be_low:
        # A row whose visible keys are all filled weighs the others like them, unless those are
        # at -inf.
        return separate(
            expr, half_fill=half_fill, dead_rows_zero=dead_rows_zero, finite_fills=False
        )
    mask = tidy_mask(sympy.Not(dead))
    conjuncts = sympy.And.make_args(mask)
    score = tidy(exact_at_one(assuming(tidy(fills.live(expr, reach)), frozenset(conjuncts))))
    values = fills.killed_values(expr, reach)
    if values is not None and all(v == -sympy.oo for v in values):
        return Separated(score, mask, "zero" if dead_rows_zero else "nan", None)
    fill = tidy(exact_at_one(fills.masked(expr, reach)))
    return Separated(score, mask, "score", fills.widest(fill) if half_fill else fill)


def unmasked(expr: Expr, *, dead_rows_zero: bool = False) -> Separated:
    """The element's expression as a score alone, fills included."""
    score = tidy(exact_at_one(merge_conditions(expr)))
    return Separated(score, sympy.true, "zero" if dead_rows_zero else "nan", None)


def without_dead_rows(separated: Separated, witnesses: list[Expr]) -> Separated:
    """The same, its fill dropped if a key is in reach of every query.

    witnesses  keys as expressions of q, such as 0 and q, that exist for every query
    """
    if separated.dead == "zero" and separated.may_lose_rows:
        return separated
    for key in witnesses:
        if tidy_mask(separated.mask.subs(KV, key)) == sympy.true:
            certain = not separated.may_lose_rows
            return Separated(separated.score, separated.mask, "nan", None, certain)
    return separated


def in_float32(separated: Separated) -> Separated:
    """Values beyond float32's, such as twice finfo.min, are infinite there."""
    score, fill = (x if x is None else _in_float32(x) for x in (separated.score, separated.fill))
    assert score is not None
    return replace(separated, score=score, fill=fill)


def _in_float32(expr: Expr) -> Expr:
    """Of whole values only: a number in a sum may be taken back by the rest of it."""
    if expr.is_Float and abs(expr) > -fills.LOWEST:
        return sympy.oo if expr > 0 else -sympy.oo
    return expr.replace(
        lambda x: isinstance(x, where),
        lambda x: where(x.args[0], *(_in_float32(y) if y.is_Float else y for y in x.args[1:])),
    )
