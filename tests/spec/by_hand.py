"""A second opinion on expressions: their text is Python, so numpy can evaluate it.

Also the hypothesis strategies that make random expressions and masks.
"""

import numpy as np
import sympy
from hypothesis import strategies as st

from fa3_compile.spec import expr as E
from fa3_compile.spec.text import text

_erf = np.vectorize(lambda x: float(sympy.erf(x)), otypes=[np.float64])

FUNCTIONS = {
    "where": np.where,
    "floordiv": np.floor_divide,
    "mod": np.mod,
    "bitwise_and": np.bitwise_and,
    "bitwise_or": np.bitwise_or,
    "bitwise_xor": np.bitwise_xor,
    "left_shift": np.left_shift,
    "right_shift": np.right_shift,
    "trunc": np.trunc,
    "round": np.round,
    "floor": np.floor,
    "ceil": np.ceil,
    "abs": np.abs,
    "sign": np.sign,
    "min": lambda *x: np.minimum.reduce(np.broadcast_arrays(*x)),
    "max": lambda *x: np.maximum.reduce(np.broadcast_arrays(*x)),
    "exp": np.exp,
    "log": np.log,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "tanh": np.tanh,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "atan": np.arctan,
    "erf": _erf,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "pow": lambda a, b: np.power(np.asarray(a, np.float64), b),
    "inf": np.inf,
}


def evaluate(expr, loads=(), **values):
    """The expression at numpy values of its symbols, in float64; loads index numpy arrays."""
    scope = dict(FUNCTIONS)
    scope |= {k: np.asarray(v) for k, v in values.items()}
    scope["load"] = lambda i, *index: loads[i][tuple(np.asarray(x, int) for x in index)]
    source = text(expr).replace("True", "np_true").replace("False", "np_false")
    scope |= {"np_true": np.True_, "np_false": np.False_, "__builtins__": {}}
    with np.errstate(all="ignore"):
        return np.asarray(eval(source, scope))


N0 = E.size_symbol(0)
BITWISE = [E.bitwise_and, E.bitwise_or, E.bitwise_xor]
small = st.integers(-6, 9).map(sympy.Integer)


def integers(leaves):
    """Integer expressions over the given leaves."""
    return st.recursive(
        leaves | small,
        lambda x: st.one_of(
            st.tuples(x, x).map(lambda t: t[0] + t[1]),
            st.tuples(x, x).map(lambda t: t[0] - t[1]),
            st.tuples(x, st.integers(-3, 3)).map(lambda t: t[0] * t[1]),
            st.tuples(x, st.integers(1, 5)).map(lambda t: E.floordiv(t[0], t[1])),
            st.tuples(x, st.integers(1, 5)).map(lambda t: E.mod(t[0], sympy.Integer(t[1]))),
            x.map(lambda t: E.floordiv(t, N0)),
            x.map(sympy.Abs),
            st.tuples(st.sampled_from(BITWISE), x, x).map(lambda t: t[0](t[1], t[2])),
            x.map(lambda t: E.right_shift(t, E.mod(E.KV, sympy.Integer(4)))),
            st.tuples(x, x).map(lambda t: sympy.Max(*t)),
            st.tuples(x, x).map(lambda t: sympy.Min(*t)),
        ),
        max_leaves=5,
    )


indices = integers(st.sampled_from([E.B, E.H, E.Q, E.KV, E.SQ, E.SKV, N0]))
positions = integers(st.sampled_from([E.Q, E.KV, E.KV, E.Q, E.SKV, N0]))

_RELATIONS = [sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.Eq, sympy.Ne]


def conditions(numbers):
    """Boolean expressions of comparisons between the given numbers."""
    atoms = st.tuples(st.sampled_from(_RELATIONS), numbers, numbers).map(lambda t: t[0](t[1], t[2]))
    return st.recursive(
        atoms,
        lambda x: st.one_of(
            st.tuples(x, x).map(lambda t: sympy.And(*t)),
            st.tuples(x, x).map(lambda t: sympy.Or(*t)),
            x.map(sympy.Not),
        ),
        max_leaves=4,
    )


masks = conditions(positions)

_FLOATS = [-2.5, -1.0, -0.125, 0.3, 0.5, 1.0, 3.0, 20.0]


def _floats(x):
    return st.one_of(
        st.tuples(x, x).map(lambda t: t[0] + t[1]),
        st.tuples(x, x).map(lambda t: t[0] - t[1]),
        st.tuples(x, x).map(lambda t: t[0] * t[1]),
        st.tuples(x, st.sampled_from([0.1, 0.5, 2.0, -3.0])).map(lambda t: t[0] * t[1]),
        st.tuples(x, st.integers(2, 3)).map(lambda t: t[0] ** t[1]),
        st.tuples(x, x).map(lambda t: t[0] / (1 + sympy.Abs(t[1]))),
        st.tuples(conditions(indices), x, x).map(lambda t: E.where(*t)),
        x.map(sympy.tanh),
        x.map(sympy.atan),
        x.map(E.erf),
        x.map(E.sigmoid),
        x.map(sympy.sin),
        x.map(lambda t: sympy.exp(-sympy.Abs(t))),
        x.map(lambda t: (1 + t**2) ** sympy.Float(0.5)),
        x.map(lambda t: sympy.log(1 + sympy.Abs(t))),
        st.tuples(x, x).map(lambda t: sympy.Max(*t)),
    )


scores = st.recursive(
    st.just(E.S) | indices | st.sampled_from(_FLOATS).map(sympy.Float), _floats, max_leaves=5
)
