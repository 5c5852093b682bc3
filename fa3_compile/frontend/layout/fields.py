"""A reading's expressions as the fields of its spec: score, mask, dead rows, weight, sinks."""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.detect.detect import Reading
from fa3_compile.frontend.detect.product import sides_of
from fa3_compile.frontend.detect.row_terms import has_fill, row_of_fills
from fa3_compile.frontend.dynamo.sizes import hint
from fa3_compile.frontend.layout import after_softmax
from fa3_compile.frontend.lift.captured import Captured, Seed, reads_infinite
from fa3_compile.frontend.lift.elements.finite import opposite_infinities
from fa3_compile.frontend.shadow.normalize import added_up
from fa3_compile.spec import unnormalised
from fa3_compile.spec.expr import KV, Expr, Q, load, loads_in, where
from fa3_compile.spec.fills import LOWEST, may_be_minus_inf
from fa3_compile.spec.index import Ranges, is_nonnegative
from fa3_compile.spec.normal_form import tidy
from fa3_compile.spec.separate import Separated, in_float32, separate, unmasked, without_dead_rows

Fields = tuple[Separated, Expr, Boolean, tuple[Expr, ...]]


def read_fields(
    reading: Reading, in_coordinates: Callable, ranges: Ranges, interior: list[fx.Node]
) -> Fields:
    """(score, mask and dead rows; the weight; the rows that stay; the sinks) of a reading of a
    softmax, in b, h, q, kv.

    `Decline` where the spec cannot say it. interior: what lies between the two products.
    """
    softmax, at = reading.term.softmax, reading.skeleton.output
    score = in_coordinates(reading.score)
    sinks = tuple(tidy(in_coordinates(x)) for x in reading.scores.sinks)
    if reading.term.zeroed and opposite_infinities(score, reading.loads):
        raise Decline(
            "rows-of-nan",
            at,
            "Replace NaN of the scores, before the softmax.",
            message="the program replaces NaN of the weights, and a score may be NaN itself: what "
            "is added and what is taken off may both be infinite",
        )
    how = {
        "half_fill": _scores_dtype(reading) == torch.float16,
        "dead_rows_zero": softmax.dead_rows_zero or reading.term.zeroed,
        "largest_s": reading.largest_s,
    }
    separated = separate(score, **how)
    if separated.dead == "score" and _may_be_infinite(separated, reading.loads):
        # Where every visible key is at -inf, eager weighs the filled ones.
        separated = separate(score, **how, finite_fills=False)
    if not reading.scores.shifted and separated.dead == "score":
        separated = Separated(separated.score, separated.mask, "nan", None)
    witnesses = [sympy.S.Zero, reading.key_length - 1]
    if is_nonnegative(reading.key_length - ranges[Q]):
        witnesses += [Q, Q + reading.key_length - ranges[Q]]
    if how["dead_rows_zero"] and _loses_filled_rows(separated, witnesses):
        if how["half_fill"]:
            raise Decline(
                "rows-of-fill",
                at,
                "Mask by one fill, -inf, or leave float16.",
                message="a row of several fills may be -inf everywhere, and is zeros then",
            )
        separated = separate(score, **how, finite_fills=False)
    separated = without_dead_rows(separated, witnesses)
    if reading.scores.fills_show and (separated.fill is not None or has_fill(separated.score)):
        raise row_of_fills(at)
    separated = in_float32(separated)
    if softmax.less_logsumexp and _has_large_fill(separated, reading.loads):
        raise Decline(
            "rows-of-fill",
            at,
            "Use softmax, which normalises such a row, or fill with -inf.",
            message="a row may be masked everywhere, and exp(x - logsumexp(x)) of one finite fill "
            "is 1 for every key",
        )
    if separated.dead == "score" and _read_outside(reading, interior):
        # Kernels have no LSE for a row that is all fill, unless the fill is part of the score.
        separated = unmasked(score)
    separated, weight, rows = after_softmax.merged(
        separated,
        weight=in_coordinates(reading.term.weight),
        kept=in_coordinates(reading.term.kept),
        may_be_infinite=lambda x: (
            x.has(sympy.oo, sympy.zoo, sympy.nan)
            or _divides_by_reads(x)
            or may_be_minus_inf(x)
            or reads_infinite(_loads_as_values(x), reading.loads)
        ),
        at=at,
    )
    return separated, weight, rows, sinks


def read_unnormalised(
    reading: Reading, in_coordinates: Callable, ranges: Ranges, interior: list[fx.Node]
) -> Fields:
    """As `read_fields`, of weights without a softmax: each is its score, and 0 where masked."""
    at = reading.skeleton.output
    half = reading.term.softmax.scores.meta["val"].dtype == torch.float16
    huge = unnormalised.HUGE_IN_HALF if half else unnormalised.HUGE
    try:
        score, mask = unnormalised.separate(in_coordinates(reading.score), huge)
    except unnormalised.InfiniteWeight as infinite:
        raise Decline(
            "infinite-weight",
            at,
            "Fill with 0 after the function, or with what the function makes 0.",
            message=f"{infinite} where a mask is",
        ) from infinite
    summed = reading.term.softmax.summed
    if (
        summed is not None
        and added_up(summed).sizes
        and not unnormalised.is_nonnegative_weight(score)
    ):
        raise Decline(
            "row-sums",
            at,
            "Divide each row of weights by its own sum over the keys.",
            message="weights that may be negative are divided by the sum of their sizes",
        )
    if unnormalised.is_linear(score, mask):
        softmax, left = reading.term.softmax, sides_of(reading.scores.dots[0].node)[0]
        keys = softmax.scores.meta["val"].shape[softmax.dim]
        cheaper = hint(keys) > hint(left.meta["val"].shape[-1])
        raise Decline(
            "linear" if cheaper else "product-chain",
            at,
            "Compute q @ (k.mT @ v), which needs no scores, or mask them.",
            message="nothing but factors of a query or of a key stands between the two products",
        )
    return Separated(score, mask, "zero", None), sympy.S.One, sympy.true, ()


def check_finite(fields: Fields, at: fx.Node) -> None:
    """`Decline` where a constant makes a score NaN, or infinite times what is read: no kernel has
    to compute that."""
    separated, weight, rows, sinks = fields
    for x in (separated.score, separated.mask, separated.fill, weight, rows, *sinks):
        if x is not None and (x.has(sympy.nan, sympy.zoo) or _has_infinite_factor(x)):
            raise Decline(
                "not-a-number",
                at,
                "Leave NaN and products with infinities out of the scores.",
                message="a constant makes scores NaN",
            )


def _has_infinite_factor(expr: Expr | Boolean) -> bool:
    """In float32, where twice its lowest number is infinite."""
    return any(abs(x.as_coeff_Mul()[0]) > -LOWEST for x in expr.atoms(sympy.Mul))


def _loses_filled_rows(separated: Separated, witnesses: list[Expr]) -> bool:
    """Whether a row without a key may be -inf everywhere and not of fills that can be weighed.

    witnesses  keys that exist for every query
    """
    fill = separated.fill
    if fill is None:
        return False
    return all(
        may_be_minus_inf(fill if key is None else tidy(fill.subs(KV, key)))
        for key in (None, *witnesses)
    )


def _may_be_infinite(separated: Separated, loads: list[Captured | Seed]) -> bool:
    """Whether the score of a visible key reads something, key by key, that may be -inf."""
    conditions = sympy.And.make_args(separated.mask)
    above = {x.lhs for x in conditions if isinstance(x, (sympy.Gt, sympy.Ge))}
    keyed = [x for x in loads_in(separated.score) if KV in x.free_symbols and x not in above]
    return reads_infinite(keyed, loads)


def _divides_by_reads(expr: Expr) -> bool:
    """Whether it divides by something that is read, which may be 0."""
    powers = [x for x in expr.atoms(sympy.Pow) if x.base.has(load) and not x.base.is_positive]
    return any(x.exp.could_extract_minus_sign() for x in powers)


def _loads_as_values(expr: Expr) -> list[load]:
    """The loads of an expression that are (part of) its value: those of conditions are not."""
    if isinstance(expr, load):
        return [expr]
    return [x for y in expr.args if not isinstance(y, Boolean) for x in _loads_as_values(y)]


def _has_large_fill(separated: Separated, loads: list[Captured | Seed]) -> bool:
    """Whether a row may be so low that the logarithm of a sum is lost in it: by a number, or by
    what is given and may be a mask or its fill."""
    read = [separated.score] if separated.fill is None else [separated.score, separated.fill]
    numbers = {y for x in read for y in x.atoms(sympy.Number)}
    given = [y for x in read for y in _given(x)]
    return any(x.is_finite and abs(x) > 1e5 for x in numbers) or reads_infinite(given, loads)


def _given(x: Expr) -> list[load]:
    """The loads that are added to a score, or stand in its place."""
    x = x.as_coeff_Mul()[1]
    if isinstance(x, load):
        return [x]
    if isinstance(x, (sympy.Add, sympy.Max, sympy.Min)):
        return [z for y in x.args for z in _given(y)]
    return [z for y in x.args[1:] for z in _given(y)] if isinstance(x, where) else []


def _read_outside(reading: Reading, interior: list[fx.Node]) -> bool:
    """Whether the program uses the LSE for more than the softmax itself."""
    return any(user not in interior for x in reading.statistics for user in x.node.users)


def _scores_dtype(reading: Reading) -> torch.dtype:
    """The dtype in which scores are masked, before the softmax casts them."""
    node = reading.term.softmax.scores
    while node.target is torch.ops.aten._to_copy.default:
        node = node.args[0]
    return node.meta["val"].dtype
