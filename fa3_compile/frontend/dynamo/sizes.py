"""PyTorch's symbolic sizes and scalars in the vocabulary of specs."""

from __future__ import annotations

import operator
import weakref
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy import functions as torch_sympy
from torch.utils._sympy.functions import FloorDiv

from fa3_compile.frontend.dynamo.divisors import divided
from fa3_compile.spec.expr import Expr, floordiv, mod
from fa3_compile.spec.index import quotient

# Torch's own sympy functions, by class name since some are made on demand.
MEANING = {
    "ToFloat": lambda x: x,
    "FloorDiv": lambda a, b: _divided(a, b),
    "CleanDiv": lambda a, b: _divided(a, b),
    "CeilDiv": lambda a, b: -floordiv(-a, b),
    "Mod": mod,
    "PythonMod": mod,
    "ModularIndexing": lambda x, by, n: mod(floordiv(x, by), n),
    "IntTrueDiv": lambda a, b: a / b,
    "FloatTrueDiv": lambda a, b: a / b,
    "FloatPow": sympy.Pow,
    "PowByNatural": sympy.Pow,
    "Max": sympy.Max,
    "Min": sympy.Min,
    "OpaqueUnaryFn_sqrt": sympy.sqrt,
    "OpaqueUnaryFn_exp": sympy.exp,
    "OpaqueUnaryFn_log": sympy.log,
    "OpaqueUnaryFn_log2": lambda a: sympy.log(a, 2),
    "Identity": lambda x: x,
}


def _divided(a: Expr, b: Expr) -> Expr:
    exact = quotient(a, b)
    return floordiv(a, b) if exact is None else exact


SCALAR_OPERATORS = {
    operator.add: lambda a, b: a + b,
    operator.sub: lambda a, b: a - b,
    operator.mul: lambda a, b: a * b,
    operator.truediv: lambda a, b: a / b,
    operator.pow: lambda a, b: a**b,
    operator.neg: lambda a: -a,
    torch.sym_float: lambda a: a,
    torch.sym_sqrt: sympy.sqrt,
    torch._sym_log2: lambda a: sympy.log(a, 2),
    torch.sym_max: sympy.Max,
    torch.sym_min: sympy.Min,
}


# What each symbol of a compilation is read as, and each integer that specs have no words for, such
# as int(0.5 * length). Said once, since the ranges that the answer depends on become narrower as
# the graph is rewritten.
READ_AS: weakref.WeakKeyDictionary[ShapeEnv, dict[Expr, Expr]] = weakref.WeakKeyDictionary()
# Likewise, as guards are added, each size with divisions.
EXACT: weakref.WeakKeyDictionary[ShapeEnv, dict[Expr, Expr]] = weakref.WeakKeyDictionary()


class UnknownScalar(Exception):
    """A symbolic number that specs have no word for."""


def sym(value: Any) -> Expr:
    """An int, float, SymInt or SymFloat, or a scalar node of the shadow, as an expression.

    `UnknownScalar` for floats that are made of more than sizes.
    """
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        shape_env = value.node.shape_env
        return _translated(_divided_exactly(value.node.expr, shape_env), shape_env)
    if isinstance(value, bool):
        return sympy.S.One if value else sympy.S.Zero
    if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 24:
        # One spelling for 1 and 1.0, which sympy tells apart.
        return sympy.Integer(int(value))
    return sympy.sympify(value)


def hint(value: Any) -> int:
    """An int or SymInt as it was while tracing. No guard is added, as `int(value)` would."""
    if isinstance(value, torch.SymInt):
        known = value.node.hint
        return 0 if known is None else int(known)
    return int(value)


def _translated(expr: Expr, shape_env: ShapeEnv) -> Expr:
    if expr.is_Symbol:
        if not expr.is_integer:
            raise UnknownScalar(f"the float {expr}, known only when it runs")
        return _symbol(expr, shape_env)
    if expr.is_Float:
        return sym(float(expr))
    if not expr.args:
        return expr
    try:
        return _function(expr, [_translated(x, shape_env) for x in expr.args])
    except UnknownScalar:
        if not (isinstance(expr, sympy.Function) and expr.is_integer):
            raise
        return _symbol(expr, shape_env)


def _function(expr: Expr, args: list[Expr]) -> Expr:
    name = type(expr).__name__
    if name in MEANING:
        return MEANING[name](*args)
    if isinstance(expr, sympy.Function) and type(expr).__module__ == torch_sympy.__name__:
        raise UnknownScalar(f"{name} of a dynamic size")
    return expr.func(*args)


def _divided_exactly(expr: Expr, shape_env: ShapeEnv) -> Expr:
    """2 * (n // 2) as n where a guard says that they are equal, as after a broadcast of both."""
    known = EXACT.setdefault(shape_env, {})
    divisions = expr.atoms(FloorDiv)
    if not divisions or expr in divisions:
        return expr
    if expr not in known:
        known[expr] = expr
        for division in divisions:
            whole, by = division.args
            if shape_env._maybe_evaluate_static(sympy.Eq(whole, by * division)):
                exact = sympy.expand(known[expr].xreplace({division: whole / by}))
                if sympy.denom(sympy.together(exact)) == 1:
                    known[expr] = exact
    return known[expr]


def _symbol(expr: Expr, shape_env: ShapeEnv) -> Expr:
    """The symbol, or one for an integer, as a positive one where its range says so.

    An int of the program has a symbol of unknown sign, and a size that is found to be equal to it
    has that symbol from then on: only the range still tells that it is one. A length of windows
    of 7 is 7 times a symbol, their number.
    """
    known = READ_AS.setdefault(shape_env, {})
    if expr not in known:
        positive = expr.is_positive is None and shape_env.bound_sympy(expr).lower >= 1
        sign = positive or expr.is_positive or None
        name, by = f"int{len(known)}", 1
        if isinstance(expr, sympy.Symbol):
            equal, by = divided(expr, shape_env)
            name = expr.name if by == 1 else f"{equal.name}by{by}"
        unchanged = isinstance(expr, sympy.Symbol) and not positive and by == 1
        known[expr] = expr if unchanged else by * sympy.Symbol(name, integer=True, positive=sign)
    return known[expr]


def scalar(node: fx.Node, read) -> Expr:
    """A scalar node of the shadow: sizes as symbols, and `x.item()` as a read of x.

    read   `read(tensor node) -> its one element`
    """
    if node.target is torch.ops.aten._local_scalar_dense.default:
        return read(node.args[0])
    try:
        return sym(node)
    except UnknownScalar:
        combine = SCALAR_OPERATORS.get(node.target)
        if combine is None:
            raise
        return combine(*(scalar(a, read) if isinstance(a, fx.Node) else sym(a) for a in node.args))
