"""Names of weights without a softmax: their function, their factors, and what is inside."""

from __future__ import annotations

import sympy

from fa3_compile.spec.derivative import derivative
from fa3_compile.spec.expr import KV, Expr, Q, S, sigmoid
from fa3_compile.spec.forms.scores import score_names
from fa3_compile.spec.forms.weights import weight_names


def unnormalised_names(weight: Expr) -> list[str]:
    """The names of a weight's parts: "unnormalised sigmoid", "decay", "dropout(0.1)", ..."""
    factors = sympy.Mul.make_args(weight)
    function = sympy.Mul(*(x for x in factors if S in x.free_symbols))
    name, inner = _function(function)
    names = [f"unnormalised {name}", *(score_names(inner) if inner is not None else [])]
    others = [x for x in factors if S not in x.free_symbols and x.free_symbols]
    for x in others:
        dropped = [n for n in weight_names(x) if n.startswith("dropout")]
        names += dropped or ["decay" if {Q, KV} <= x.free_symbols else "factor"]
    return list(dict.fromkeys(names))


def _function(x: Expr) -> tuple[str, Expr | None]:
    """(the function's name, the score that it is of)."""
    if isinstance(x, sigmoid):
        return "sigmoid", x.args[0]
    if isinstance(x, sympy.exp):
        return "exp", x.args[0]
    if isinstance(x, sympy.Max) and len(x.args) == 2 and 0 in x.args:
        return "relu", next(y for y in x.args if y != 0)
    if isinstance(x, sympy.Pow) and x.exp.is_Integer:
        name, inner = _function(x.base)
        return f"{name}^{x.exp}", inner
    if S not in derivative(x, S).free_symbols:
        return "linear", x
    gates = [y for y in sympy.Mul.make_args(x) if isinstance(y, sigmoid)]
    if gates and (x / gates[0]).as_coeff_Mul()[1] == gates[0].args[0].as_coeff_Mul()[1]:
        return "silu", gates[0].args[0]
    return "function", None
