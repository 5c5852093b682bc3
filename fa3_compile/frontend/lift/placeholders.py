"""What stands in lifted expressions for values that only an attention's skeleton explains."""

from __future__ import annotations

import sympy

from fa3_compile.spec.expr import KV, where

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


class held(sympy.Function):
    """`held(x)`: x, which is constant to the gradient."""

    nargs = 1
    is_real = True


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


class weighed_total(sympy.Function):
    """`weighed_total(x, n, *index)`: the sum over every key, which is ANY_KEY in it, of
    x * prob(n, *index): what a row adds up to after its softmax, where that is not 1."""

    is_real = True

    @classmethod
    def of(cls, x, kept, p):
        """Of factors x where `kept` holds, as they depend on the key KV."""
        return cls(*(y.xreplace({KV: ANY_KEY}) for y in (where(kept, x, 0), *p.args)))


class some(sympy.Function):
    """`some(held, of)`: 1 if `of` is 1 for any key of a row, else 0; `held` is its value in memory,
    and `of` is of a row and a key."""

    nargs = 2
    is_real = True


def without_some(expr):
    """The expression with every `some` as it is read from memory."""
    return expr.xreplace({x: x.args[0] for x in expr.atoms(some)})
