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
    """`total(*index)`: the sum by which a softmax that is written by hand divides, or by which
    the program divides weights without one."""

    is_real = True
    is_positive = True
