"""What stands in lifted expressions for values that only an attention's skeleton explains."""

from __future__ import annotations

import sympy

from fa3_compile.spec.expr import KV, where

# The contracted axis of Q K^T.
D = sympy.Symbol("d", integer=True, nonnegative=True)


class OfTheRun(sympy.Function):
    """What only the running program knows."""

    is_real = True
    # Not even at a constant place, such as the only row.
    is_number = False  # pyright: ignore[reportAssignmentType]


class prob(OfTheRun):
    """`prob(n, *index)`: an element of softmax number n of the skeleton."""


class zeroed_prob(prob):
    """The same where NaN, in rows without keys, was replaced by 0."""


class row_stat(OfTheRun):
    """`row_stat(n, *index)`: an element of row statistic number n: a maximum, a logsumexp."""


# The sum of a row of weights that no softmax normalises: the operator's second output.
ROW_SUM = sympy.Symbol("row_sum", real=True)


class held(OfTheRun):
    """`held(x)`: x, which is constant to the gradient."""

    nargs = 1


class total(OfTheRun):
    """`total(*index)`: the sum of exponentials by which a softmax written by hand divides."""

    is_positive = True


class row_total(OfTheRun):
    """`row_total(*index)`: a sum of weights without a softmax, of either sign, by which the program
    divides them."""


# A key that a sum over all of them is of.
ANY_KEY = sympy.Symbol("any_key", integer=True, nonnegative=True)


class over_keys(OfTheRun):
    """`over_keys(x)`: the sum of x over every key, which is ANY_KEY in it."""

    nargs = 1


class weighed_total(OfTheRun):
    """`weighed_total(x, zeroed, n, *index)`: the sum over every key, which is ANY_KEY in it, of
    x * prob(n, *index), or, if `zeroed` is 1, of x * zeroed_prob(n, *index)."""

    @classmethod
    def of(cls, x, kept, p):
        """Of factors x where `kept` holds, as they depend on the key KV."""
        zeroed = sympy.Integer(isinstance(p, zeroed_prob))
        return cls(*(y.xreplace({KV: ANY_KEY}) for y in (where(kept, x, 0), zeroed, *p.args)))


class some(sympy.Function):
    """`some(held, of)`: 1 if `of` is 1 for any key of a row, else 0; `held` is its value in memory,
    and `of` is of a row and a key."""

    nargs = 2
    is_real = True


def without_some(expr):
    """The expression with every `some` as it is read from memory."""
    return expr.xreplace({x: x.args[0] for x in expr.atoms(some)})
