"""What stands in lifted expressions for values that only an attention's skeleton explains."""

from __future__ import annotations

import sympy

# The contracted axis of Q K^T.
D = sympy.Symbol("d", integer=True, nonnegative=True)


class prob(sympy.Function):
    """`prob(n, *index)`: an element of softmax number n of the skeleton."""

    is_real = True


class row_stat(sympy.Function):
    """`row_stat(n, *index)`: an element of row statistic number n: a maximum, a logsumexp."""

    is_real = True


# The sum of a row of weights that no softmax normalises: the operator's second output.
ROW_SUM = sympy.Symbol("row_sum", real=True)


class total(sympy.Function):
    """`total(*index)`: the sum of exponentials by which a softmax written by hand divides."""

    is_real = True
    is_positive = True


class row_total(sympy.Function):
    """`row_total(*index)`: a sum of weights without a softmax, of either sign, by which the program
    divides them."""

    is_real = True


# A key that a sum over all of them is of.
ANY_KEY = sympy.Symbol("any_key", integer=True, nonnegative=True)


class over_keys(sympy.Function):
    """`over_keys(x)`: the sum of x over every key, which is ANY_KEY in it."""

    nargs = 1
    is_real = True


class some(sympy.Function):
    """`some(held, of)`: 1 if `of` is 1 for any key of a row, else 0; `held` is its value in memory,
    and `of` is of a row and a key."""

    nargs = 2
    is_real = True


def without_some(expr):
    """The expression with every `some` as it is read from memory."""
    return expr.xreplace({x: x.args[0] for x in expr.atoms(some)})
