"""What of its row a program takes off its scores before the softmax, which does not see it: a
maximum, a logsumexp. A row that has nothing but fills shows it all the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import sympy
import torch
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.lift.captured import reads_infinite
from fa3_compile.frontend.lift.lift import Lifter
from fa3_compile.frontend.lift.placeholders import row_stat
from fa3_compile.spec.expr import KV, Expr, S, depends_on, load, where
from fa3_compile.spec.fills import BELOW_FLOAT32, OUT_OF_REACH, floored
from fa3_compile.spec.normal_form import tidy_mask
from fa3_compile.spec.value_bounds import value_bounds

# Beside larger numbers, what is added loses digits that show.
MODERATE = 16.0
# How much less than 1 the rounding of a factor is.
ROUNDING = 1e-6
# So far below any maximum of scores that its exponential is 0.
FAR_BELOW = -65000.0
# So low that no score beside it has an exponential.
LOW = -1e8


class Statistic(NamedTuple):
    """A row statistic.

    of   the element that it is of, less what was taken off that; None where that is not known
    own  whether it is of one row
    more whether it is of more than the row's keys: of sinks beside them
    """

    of: Expr | None
    own: bool
    more: bool = False


def without(score: Expr) -> tuple[Expr, Expr]:
    """(score - shift, shift): terms made of row statistics, which a softmax does not see."""
    score = _whole(score)
    if not score.has(row_stat):
        return score, sympy.S.Zero
    # Expanding would multiply out what the program keeps in factors.
    for total_score in (score, sympy.expand(score)):
        terms = sympy.Add.make_args(total_score)
        shift = [x for x in terms if x.has(row_stat) and not depends_on(x, [S, KV])]
        rest = sympy.Add(*(x for x in terms if x not in shift))
        if not rest.has(row_stat):
            return rest, sympy.Add(*shift)
    return score, sympy.S.Zero


def _whole(score: Expr) -> Expr:
    """where(c, a - m, -inf) -> where(c, a, -inf) - m, for a row statistic m; terms of a sum too.
    What has the weight 0 adds nothing to the gradient of m, which is 0: another fill may."""
    if isinstance(score, sympy.Add):
        return sympy.Add(*map(_whole, score.args))
    if not isinstance(score, where) or not score.has(row_stat):
        return score
    condition, a, b = score.args
    for kept, fill in ((a, b), (b, a)):
        if fill == -sympy.oo:
            rest, shift = without(kept)
            branches = (rest, fill) if kept is a else (fill, rest)
            return where(condition, *branches) + shift
    return score


class RowTerms:
    """What is taken off a score that is `rest` and `shift`, in the softmax at `at`."""

    def __init__(
        self,
        score: Expr,
        statistic: Callable[[row_stat], Statistic],
        lifter: Lifter,
        at: fx.Node,
    ):
        self.rest, self.shift = without(score)
        self.lifter, self.at = lifter, at
        # (factor, what a statistic of this row is of)
        self.own: list[tuple[Expr, Expr | None]] = []
        # The same of those that are of the keys alone.
        self.of_keys: list[tuple[Expr, Expr | None]] = []
        for x in sympy.Add.make_args(self.shift):
            for stat in x.atoms(row_stat):
                of, own, more = statistic(stat)
                if of is not None and not more and _strays(of, self.rest, lifter):
                    raise Decline(
                        "rows-of-fill",
                        at,
                        "Take off the maximum of the scores that the softmax is of.",
                        message="what is taken off a row is of other keys or of another row, and "
                        "these may all be masked where the row has a key",
                    )
                if own:
                    self.own.append((-x / stat, of))
                    self.of_keys += [] if more else self.own[-1:]

    @property
    def may_be_infinite(self) -> bool:
        """Whether -inf is taken off what stands beside a row without keys."""
        return any(of is not None and of.has(-sympy.oo) for _, of in self.of_keys)

    @property
    def shows(self) -> bool:
        """Whether a row of fills alone is another one without its statistics: fills that are scaled
        are infinite, and what is added to them loses its digits, where the program has 0 for them.
        `Decline` where the fills may be in a tensor that is read."""
        return any(_shows(self.rest, times, of, self.lifter, self.at) for times, of in self.own)

    def keep_fills(self, sinks: bool) -> bool | None:
        """Whether exp gives weights to a row of fills alone, because its own maximum is taken off
        it, that of its `sinks` too where they are in its sum. None where that is known only when
        it runs."""
        for times, of in self.own if sinks else self.of_keys:
            if times.is_positive and of is not None and _same(self.rest, times * of):
                return True
        if not has_fill(self.rest):
            return self.shift != 0
        return None if any(of is None or has_fill(of) for _, of in self.own) else False


def row_of_fills(at: fx.Node) -> Decline:
    """The decline of what shows."""
    return Decline(
        "rows-of-fill",
        at,
        "Fill with -inf, or take the maximum off as the last thing before the exponential.",
        message="a row may be masked everywhere, and something of the row is taken off its scores "
        "before they are scaled, masked or added to: only the program's own order of operations "
        "has the digits of such a row",
    )


def without_underflow(score: Expr, dtype: torch.dtype, shift: Expr) -> Expr:
    """A fill whose exponential is 0 in the dtype is -inf where no maximum of its row is taken off
    it; another may be, of scores without the fill."""
    info = torch.finfo(dtype)
    lost = math.log(info.smallest_normal) + math.log(info.eps / 2)
    return _filled_below(score, lost if shift == 0 else FAR_BELOW, FAR_BELOW if shift != 0 else LOW)


def _filled_below(score: Expr, lost: float, lost_in_sum: float) -> Expr:
    if isinstance(score, where):
        condition, *branches = score.args
        return where(condition, *(_filled_below(x, lost, lost_in_sum) for x in branches))
    if isinstance(score, sympy.Add):
        return sympy.Add(*(_filled_below(x, lost_in_sum, lost_in_sum) for x in score.args))
    times, scaled = score.as_coeff_Mul()
    if times.is_positive and times != 1:
        low, lower = lost / float(times), lost_in_sum / float(times)
        return times * _filled_below(scaled, low, lower)
    return -sympy.oo if score.is_number and score < lost else score


def _shows(rest: Expr, times: Expr, of: Expr | None, lifter: Lifter, at: fx.Node) -> bool:
    """Whether a row of fills alone may differ by what is taken off it: `times` a statistic."""
    same = of is not None and _same(_seen(rest), _seen(times * of))
    if of is None or not same:
        if _adds_given(rest if of is None else of, lifter):
            raise row_of_fills(at)
        return has_fill(rest) and (of is None or has_fill(of) or of.has(-sympy.oo))
    if times != 1 and _scales_given(of, times, lifter):
        raise row_of_fills(at)
    return times != 1 and any(
        x * times < BELOW_FLOAT32 if times.is_number else x <= OUT_OF_REACH for x in _fills(of)
    )


def _strays(of: Expr, rest: Expr, lifter: Lifter) -> bool:
    """Whether a row of `of` may have nothing but fills where that of `rest` has a key."""
    hidden = [*_hidden(rest, lifter)]
    return any(not any(known <= x for known in hidden) for x in _hidden(of, lifter))


def _hidden(x: Expr, lifter: Lifter) -> Iterator[frozenset[Expr]]:
    """Where it has fills: conditions that hold together, or a tensor that may be a mask."""
    if x.is_number:
        if _is_low(x):
            yield frozenset()
        return
    if isinstance(x, where):
        condition, a, b = x.args
        for holds, branch, other in ((condition, a, b), (sympy.Not(condition), b, a)):
            conditions = frozenset(sympy.And.make_args(tidy_mask(holds)))
            if other.is_number and _is_low(other):
                conditions = frozenset()
            yield from (conditions | also for also in _hidden(branch, lifter))
        return
    times, scaled = x.as_coeff_Mul()
    if isinstance(scaled, load):
        if abs(times) > MODERATE or reads_infinite([scaled], lifter.loads):
            yield frozenset([scaled])
        return
    bounds = value_bounds(x)
    if bounds is None or bounds[0] < -MODERATE:
        sums = isinstance(x, (sympy.Add, sympy.Max, sympy.Min, floored))
        for part in x.args:
            if sums or not part.is_number:
                yield from _hidden(part, lifter)


def _is_low(number: Expr) -> bool:
    return not number.is_finite or bool(number < -MODERATE)


def _same(a: Expr, b: Expr) -> bool:
    """Whether two scores are equal, but for the last digit of their factors."""
    terms = sympy.Add.make_args(sympy.expand(a - b))
    return all(abs(x.as_coeff_Mul()[0]) < ROUNDING for x in terms)


def _seen(score: Expr) -> Expr:
    """The score at keys that no -inf hides."""
    while isinstance(score, where) and -sympy.oo in score.args:
        score = score.args[1] if score.args[2] == -sympy.oo else score.args[2]
    return score


def _scales_given(of: Expr, times: Expr, lifter: Lifter) -> bool:
    """Whether numbers of a tensor that may be a mask are beyond float32 once they are scaled."""
    if not times.is_number:
        return _adds_given(of, lifter)
    scaled = [x.as_coeff_Mul()[0] for x in sympy.Add.make_args(of) if _adds_given(x, lifter)]
    return any(abs(x) <= 1 < abs(x * times) - ROUNDING for x in scaled)


def _adds_given(x: Expr, lifter: Lifter) -> bool:
    """Whether a tensor is added that may be a mask: one that is given, and learns nothing."""
    reads = [y.as_coeff_Mul()[1] for y in sympy.Add.make_args(_seen(x))]
    return reads_infinite([y for y in reads if isinstance(y, load)], lifter.loads)


def has_fill(x: Expr) -> bool:
    """Whether an element may be a finite number that is low."""
    return any(y < -MODERATE for y in _fills(x))


def _fills(x: Expr) -> list[Expr]:
    """The finite numbers that an element may be, or that are added to it."""
    if x.is_number:
        return [x] if x.is_finite else []
    if isinstance(x, (sympy.Add, sympy.Max, sympy.Min)):
        return [z for y in x.args for z in _fills(y)]
    if isinstance(x, (where, floored)):
        return [z for y in x.args[1:] for z in _fills(y)]
    times, scaled = x.as_coeff_Mul()
    if isinstance(scaled, load):
        return [times]
    if times != 1:
        return [times * y for y in _fills(scaled)]
    return [z for y in sympy.Mul.make_args(x) if isinstance(y, where) for z in _fills(y)]
