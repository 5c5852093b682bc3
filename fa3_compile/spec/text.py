"""Expressions as canonical text, and back by a strict parser (Python's grammar, never `eval`).

The same expression prints the same text in every process; `parse(text(e)) == e`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable

import sympy
from sympy.logic.boolalg import Boolean

from fa3_compile.spec import expr as E
from fa3_compile.spec.expr import Expr

FUNCTIONS: dict[str, Callable[..., Expr]] = {
    "load": E.load,
    "where": E.where,
    "floordiv": E.floordiv,
    "mod": E.mod,
    "bitwise_and": E.bitwise_and,
    "bitwise_or": E.bitwise_or,
    "bitwise_xor": E.bitwise_xor,
    "left_shift": E.left_shift,
    "right_shift": E.right_shift,
    "trunc": E.trunc,
    "round": E.round_half_even,
    "uniform": E.uniform,
    "floor": sympy.floor,
    "ceil": sympy.ceiling,
    "abs": sympy.Abs,
    "sign": sympy.sign,
    "min": sympy.Min,
    "max": sympy.Max,
    "exp": sympy.exp,
    "log": sympy.log,
    "sin": sympy.sin,
    "cos": sympy.cos,
    "tan": sympy.tan,
    "tanh": sympy.tanh,
    "sinh": sympy.sinh,
    "cosh": sympy.cosh,
    "atan": sympy.atan,
    "erf": E.erf,
    "sigmoid": E.sigmoid,
    "pow": sympy.Pow,
}
NAME_OF = {cls: name for name, cls in FUNCTIONS.items()}
SYMBOLS = {x.name: x for x in (E.S, E.B, E.H, E.Q, E.KV, E.SQ, E.SKV)}
COMPARISONS = {ast.Lt: sympy.Lt, ast.LtE: sympy.Le, ast.Gt: sympy.Gt, ast.GtE: sympy.Ge}
COMPARISONS |= {ast.Eq: sympy.Eq, ast.NotEq: sympy.Ne}
RELATION_TEXT = {sympy.Lt: "<", sympy.Le: "<=", sympy.Gt: ">", sympy.Ge: ">="}
RELATION_TEXT |= {sympy.Eq: "==", sympy.Ne: "!="}


def number_text(value: sympy.Expr) -> str:
    """A number as Python writes it; infinities as `inf` and `-inf`."""
    if value is sympy.oo:
        return "inf"
    if value is -sympy.oo:
        return "-inf"
    if isinstance(value, sympy.Integer):
        return str(int(value))
    return repr(float(value))


def text(expr: Expr | Boolean) -> str:
    """The canonical text of an expression."""
    return _text(expr, 0)


# Binding strength, weakest first: or, and, not, comparison, +, *, unary -, atoms.
_OR, _AND, _NOT, _RELATION, _ADD, _MUL, _UNARY, _ATOM = range(1, 9)


def _text(expr, outer: int) -> str:
    body, inner = _body(expr)
    return f"({body})" if inner < outer else body


def _body(expr) -> tuple[str, int]:
    if expr == sympy.true:
        return "True", _ATOM
    if expr == sympy.false:
        return "False", _ATOM
    if expr.is_Symbol:
        return expr.name, _ATOM
    if expr.is_number and (expr.is_Number or expr in (sympy.oo, -sympy.oo)):
        body = number_text(expr)
        return body, (_UNARY if body.startswith("-") else _ATOM)
    if isinstance(expr, sympy.Or):
        return " | ".join(sorted(_text(x, _RELATION + 1) for x in expr.args)), _OR
    if isinstance(expr, sympy.And):
        return " & ".join(sorted(_text(x, _RELATION + 1) for x in expr.args)), _AND
    if isinstance(expr, sympy.Not):
        return "~" + _text(expr.args[0], _ATOM), _NOT
    if type(expr) in RELATION_TEXT:
        left, right = expr.lhs, expr.rhs
        sign = RELATION_TEXT[type(expr)]
        return f"{_text(left, _ADD)} {sign} {_text(right, _ADD)}", _RELATION
    if isinstance(expr, sympy.Add):
        return _sum_text(expr), _ADD
    if isinstance(expr, sympy.Mul):
        return _product_text(expr), _MUL
    if isinstance(expr, sympy.Pow):
        return f"pow({text(expr.base)}, {text(expr.exp)})", _ATOM
    if isinstance(expr, sympy.exp):
        return f"exp({text(expr.args[0])})", _ATOM
    if type(expr) in NAME_OF:
        args = [text(x) for x in expr.args]
        if isinstance(expr, (sympy.Min, sympy.Max)):
            args = sorted(args)
        return f"{NAME_OF[type(expr)]}({', '.join(args)})", _ATOM
    if expr.is_number:
        return number_text(sympy.Float(expr)), _ATOM
    raise TypeError(f"no text for {type(expr).__name__}: {expr}")


def _sum_text(expr) -> str:
    terms = sorted(expr.args, key=lambda x: (x.is_number, _term_key(x)))
    out = _text(terms[0], _ADD)
    for term in terms[1:]:
        coefficient, rest = term.as_coeff_Mul()
        if coefficient.is_number and coefficient.is_negative:
            out += f" - {_text(-coefficient * rest, _MUL)}"
        else:
            out += f" + {_text(term, _MUL)}"
    return out


def _term_key(term) -> str:
    coefficient, rest = term.as_coeff_Mul()
    return f"{coefficient.is_negative} {text(rest)}"


def _product_text(expr) -> str:
    coefficient, rest = expr.as_coeff_Mul()
    factors = sorted(_text(x, _UNARY) for x in sympy.Mul.make_args(rest))
    if coefficient == 1:
        return "*".join(factors)
    if coefficient == -1:
        return "-" + "*".join(factors)
    return "*".join([number_text(coefficient), *factors])


def parse(source: str) -> Expr | Boolean:
    """The expression that `text` printed. ValueError for anything outside the vocabulary."""
    try:
        tree = ast.parse(source, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not an expression: {source!r}") from error
    return parse_node(tree)


def parse_node(node: ast.AST) -> Expr | Boolean:
    """As `parse`, from a node of Python's syntax tree."""
    match node:
        case ast.Constant(value=bool() as value):
            return sympy.true if value else sympy.false
        case ast.Constant(value=int() as value):
            return sympy.Integer(value)
        case ast.Constant(value=float() as value):
            return sympy.Float(value)
        case ast.Name(id="inf"):
            return sympy.oo
        case ast.Name(id=name) if name in SYMBOLS:
            return SYMBOLS[name]
        case ast.Name(id=name) if name[0] == "n" and name[1:].isdigit() and name[1:].isascii():
            return E.size_symbol(int(name[1:]))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -parse_node(operand)
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return sympy.Not(parse_node(operand))
        case ast.BinOp(left=left, op=op, right=right):
            return _binary(op, parse_node(left), parse_node(right))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARISONS:
            return COMPARISONS[type(op)](parse_node(left), parse_node(right))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*map(parse_node, args))
    raise ValueError(f"not in the vocabulary of expressions: {ast.unparse(node)!r}")


def _binary(op: ast.operator, left, right):
    match op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.BitAnd():
            return sympy.And(left, right)
        case ast.BitOr():
            return sympy.Or(left, right)
    raise ValueError(f"not an operator of expressions: {type(op).__name__}")
