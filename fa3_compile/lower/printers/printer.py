"""Score and mask expressions as source text.

One rule per sympy node type, here; printer_torch, printer_triton and printer_cuda override the
few that differ. Every printed piece carries its kind, because the languages do not agree on
mixed arithmetic:

- "int": exact integer arithmetic (index expressions),
- "float": float32 (the compute dtype in torch),
- "bool": a condition.

Integers become floats only where they meet a float or are divided; `floordiv` and `mod` round
as in Python everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy

from fa3_compile.lower.printers.shared_parts import shared_parts
from fa3_compile.lower.printers.text import (
    ADD,
    ATOM,
    LOW,
    MUL,
    Text,
    negated,
    sign_strength,
    sum_of,
)
from fa3_compile.spec import expr as E
from fa3_compile.spec.mask_biases import bias_of

OPERATORS = {"and": " & ", "or": " | "}  # of torch and Triton
LARGEST_PRODUCT = 16  # integer powers up to here are written as products
LARGEST_SUMMED = 1e30  # numbers up to here may be added before they are scaled


class UnprintableError(TypeError):
    """An expression has a node that the target language has no text for."""


@dataclass(frozen=True)
class Env:
    """What the symbols and loads of an expression are called in the target program.

    names  symbol name ("q", "Skv", "n0", ...) -> text of its value; a missing name stands for
           itself
    load   (the load node, its printed integer index) -> text of the element
    aux    kind of each captured tensor, as in AttentionSpec.aux; a missing one is "float"
    """

    names: Mapping[str, str] = field(default_factory=dict)
    load: Callable[[E.load, list[str]], str] | None = None
    aux: Sequence[str] = ()


class Printer:
    """Base printer; `print` for one expression, `print_block` for several with shared parts."""

    ASSIGN = "{name} = {value}"
    TRUE, FALSE = "True", "False"
    FUNCTIONS: Mapping[str, str] = {}  # vocabulary name -> function of one float

    def print(self, expr: E.Expr | E.Boolean, env: Env = Env()) -> str:
        """One expression; UnprintableError names a node the language lacks."""
        return Session(self, env, {}).text(self.rewrite(expr)).body

    def print_block(
        self, exprs: Iterable[E.Expr | E.Boolean], env: Env = Env(), prefix: str = "t"
    ) -> tuple[list[str], list[str]]:
        """(lines, results): assignments of the subexpressions that occur more than once,
        to variables `<prefix>0`, ..., and the text of each expression in terms of them."""
        exprs = [self.rewrite(x) for x in exprs]
        bound: dict[sympy.Basic, Text] = {}
        session = Session(self, env, bound)
        lines = []
        for shared in shared_parts(exprs):
            value = session.text(shared)
            name = f"{prefix}{len(lines)}"
            lines.append(self.ASSIGN.format(name=name, value=value.body))
            bound[shared] = Text(name, value.kind)
        return lines, [session.text(x).body for x in exprs]

    # What a language decides.

    def rewrite(self, expr):
        """The expression in nodes that the language has text for."""
        return expr

    def number(self, value: float) -> str:
        raise NotImplementedError

    def to_float(self, x: Text) -> Text:
        if x.kind == "float":
            return x
        if x.literal:
            return Text(self.number(float(x.body)), "float", x.strength, True)
        return self.cast_float(x)

    def to_int(self, x: Text) -> Text:
        return x if x.kind == "int" else self.cast_int(x)

    def cast_float(self, x: Text) -> Text:
        raise NotImplementedError

    def cast_int(self, x: Text) -> Text:
        raise NotImplementedError

    def cast_long(self, x: Text) -> Text:
        """An integer of 64 bits."""
        raise NotImplementedError

    def truth(self, x: Text, expected: bool) -> Text:
        """Whether a loaded bool is as expected."""
        return Text(f"{x.at(ATOM)} {'!=' if expected else '=='} 0", "bool", LOW)

    def where(self, condition: Text, a: Text, b: Text) -> Text:
        raise NotImplementedError

    def extremum(self, name: str, a: Text, b: Text) -> Text:
        raise NotImplementedError

    def logic(self, operator: str, args: list[Text]) -> Text:
        raise NotImplementedError

    def floordiv(self, a: Text, b: Text, plain: bool) -> Text:
        """`plain`: both are known to have no minus sign, so that any rounding will do."""
        raise NotImplementedError

    def mod(self, a: Text, b: Text, plain: bool) -> Text:
        raise NotImplementedError

    def power(self, base: Text, exponent: Text, expr: sympy.Pow) -> Text:
        raise NotImplementedError

    def unary(self, name: str, x: Text) -> Text:
        """A function of one float, by its name in the vocabulary."""
        if name not in self.FUNCTIONS:
            raise UnprintableError(f"{type(self).__name__} has no text for {name}")
        return Text(f"{self.FUNCTIONS[name]}({self.to_float(x).body})", "float")

    def absolute(self, x: Text) -> Text:
        raise NotImplementedError

    def relation(self, expr, text: Callable[[E.Expr], Text]) -> Text | None:
        """A comparison's own text, where the language has one; `text` prints its parts."""

    def uniform(self, args: list[Text]) -> Text:
        """The program's own function of integers (seed, b, h, q, kv)."""
        return Text(f"uniform({', '.join(x.body for x in args)})", "float")


def _of_bits(sign: str) -> Callable[[Session, sympy.Basic], Text]:
    """The same sign, with the same meaning for negative integers, in every language."""

    def printed(session: Session, expr: sympy.Basic) -> Text:
        a, b = (session.to.to_int(x) for x in session.texts(expr.args))
        return Text(f"{a.at(ATOM)} {sign} {b.at(ATOM)}", "int", LOW)

    return printed


class Session:
    """Prints nodes for one (printer, env); `bound` are subexpressions that have a variable."""

    def __init__(self, printer: Printer, env: Env, bound: dict[sympy.Basic, Text]) -> None:
        self.to, self.env, self.bound = printer, env, bound

    def text(self, expr) -> Text:
        if expr in self.bound:
            return self.bound[expr]
        if expr.is_number and not isinstance(expr, sympy.logic.boolalg.BooleanAtom):
            return self.constant(expr)
        for cls in type(expr).__mro__:
            if rule := getattr(self, "_" + cls.__name__, None):
                return rule(expr)
        raise UnprintableError(f"no text for {type(expr).__name__}: {expr}")

    def texts(self, exprs) -> list[Text]:
        return [self.text(x) for x in exprs]

    def constant(self, expr) -> Text:
        if expr.is_Integer:
            body = str(int(expr))
            return Text(body, "int", sign_strength(body), True)
        body = self.to.number(float(expr))
        return Text(body, "float", sign_strength(body), True)

    def _BooleanTrue(self, expr) -> Text:
        return Text(self.to.TRUE, "bool")

    def _BooleanFalse(self, expr) -> Text:
        return Text(self.to.FALSE, "bool")

    def _Symbol(self, expr) -> Text:
        return Text(self.env.names.get(expr.name, expr.name), "float" if expr == E.S else "int")

    def _load(self, expr) -> Text:
        if self.env.load is None:
            raise UnprintableError(f"{expr}: the environment has no `load`")
        index = [self.to.to_int(x).body for x in self.texts(expr.index)]
        body = self.env.load(expr, index)
        aux = tuple(self.env.aux)
        kind = aux[expr.tensor] if expr.tensor < len(aux) else "float"
        return self.to.cast_float(Text(body, kind)) if kind == "float" else Text(body, kind)

    def numbers(self, exprs) -> list[Text]:
        """Numeric operands of one kind: all exact integers, or all floats."""
        args = [self.to.to_int(x) if x.kind == "bool" else x for x in self.texts(exprs)]
        if all(x.kind == "int" for x in args):
            return args
        return [self.to.to_float(x) for x in args]

    def _Add(self, expr) -> Text:
        """Integers are summed exactly before they meet a float: `0.3*(kv - q)`, which sympy
        stores as `0.3*kv - 0.3*q`, is one product again. So is a scale of several functions of s,
        which cancel as in the program then: of 0.3*x - 0.3*y a compiler makes
        fma(0.3, x, -0.3*y), which is the rounding of 0.3*y where x is y."""
        exact: dict[sympy.Expr, list[tuple[bool, Text]]] = {}
        scaled: dict[sympy.Expr, list[tuple[bool, Text]]] = {x: [] for x in _common_scales(expr)}
        terms: list[tuple[bool, Text]] = []
        for term in expr.args:
            coefficient, rest = term.as_coeff_Mul()
            negative = bool(coefficient.is_extended_negative)
            scale = abs(coefficient)
            [x] = self.numbers([rest if not scale.is_Integer else scale * rest])
            if x.kind == "int":
                exact.setdefault(sympy.S.One if scale.is_Integer else scale, []).append(
                    (negative, x)
                )
            elif scale in scaled and _may_be_summed(rest):
                scaled[scale].append((negative, self.to.to_float(self.text(rest))))
            else:
                terms.append((negative, self.text(scale * rest)))
        terms += [self.times(scale, found, "float") for scale, found in scaled.items() if found]
        sums = {scale: sum_of(found, "int") for scale, found in exact.items()}
        if not terms and list(sums) == [1]:
            return sums[sympy.S.One]
        terms += [self.times(scale, found, "int") for scale, found in exact.items()]
        return sum_of(terms, "float")

    def times(self, scale, terms: list[tuple[bool, Text]], kind: str) -> tuple[bool, Text]:
        """A positive scale times a sum, as (whether it has a minus sign, the float without it)."""
        negative = all(x[0] for x in terms)
        x = self.to.to_float(sum_of([(not negative and n, x) for n, x in terms], kind))
        if scale != 1:
            x = Text(f"{self.to.number(float(scale))}*{x.at(ATOM)}", "float", MUL)
        return negative, x

    def _Mul(self, expr) -> Text:
        coefficient, product = expr.as_coeff_Mul()
        above, below = [], []
        for factor in sympy.Mul.make_args(product):
            base, exponent = factor.as_base_exp() if factor.is_Pow else (factor, sympy.S.One)
            if exponent.is_number and exponent.is_negative:
                below.append(sympy.Pow(base, -exponent))
            else:
                above.append(factor)
        minus = coefficient == -1
        if not minus and coefficient != 1:
            above.insert(0, coefficient)
        args = self.numbers(above)
        if below:
            args = [self.to.to_float(x) for x in args]
            body = "*".join(x.at(MUL) for x in args) or self.to.number(1.0)
            for x in self.numbers(below):
                body += f" / {self.to.to_float(x).at(ATOM)}"
        else:
            body = "*".join([args[0].at(MUL), *(x.at(ATOM) for x in args[1:])])
        kind = "int" if args and all(x.kind == "int" for x in args) else "float"
        strength = ADD if minus or body[0] == "-" else MUL
        return Text(negated(Text(body, kind, MUL)) if minus else body, kind, strength)

    def _Pow(self, expr) -> Text:
        base, exponent = expr.base, expr.exp
        if exponent.is_Integer and 2 <= exponent <= LARGEST_PRODUCT:
            [x] = self.numbers([base])
            return Text("*".join([x.at(ATOM)] * int(exponent)), x.kind, MUL)
        if exponent.is_number and exponent.is_negative:
            below = self.to.to_float(self.text(sympy.Pow(base, -exponent)))
            return Text(f"{self.to.number(1.0)} / {below.at(ATOM)}", "float", MUL)
        if exponent == sympy.Rational(1, 2) or exponent == 0.5:
            return self.to.unary("sqrt", self.text(base))
        if base.is_number and base.is_positive:
            scaled = exponent if base == 2 else exponent * sympy.log(base, 2).evalf(20)
            return self.to.unary("exp2", self.text(scaled))
        x, y = (self.to.to_float(x) for x in self.texts([base, exponent]))
        return self.to.power(x, y, expr)

    def _where(self, expr) -> Text:
        if (bias := bias_of(expr)) is not None:
            # c * (x - 1) is 0 at 1 and has a slope there; c times several masks may overflow.
            below = self.to.to_float(self.text(bias[1] - 1))
            return Text(f"{self.text(bias[0]).at(MUL)} * {below.at(ATOM)}", "float", MUL)
        a, b = self.numbers(expr.args[1:])
        return self.to.where(self.text(expr.args[0]), a, b)

    def _floordiv(self, expr) -> Text:
        return self.division(self.to.floordiv, *expr.args)

    def _mod(self, expr) -> Text:
        return self.division(self.to.mod, *expr.args)

    def division(self, rule, a, b) -> Text:
        plain = bool(a.is_nonnegative and b.is_positive)
        x, y = (self.to.to_int(x) for x in self.texts([a, b]))
        return rule(x, y, plain)

    _bitwise_and, _bitwise_or, _bitwise_xor = map(_of_bits, "&|^")
    _left_shift, _right_shift = map(_of_bits, ("<<", ">>"))

    def _trunc(self, expr) -> Text:
        x = self.text(expr.args[0])
        # A float that is read, perhaps into a name, may be beyond 32 bits.
        wide = expr.has(E.load) or any(not y.is_integer and y != E.S for y in expr.free_symbols)
        return self.to.cast_long(x) if wide and x.kind == "float" else self.to.to_int(x)

    def _Max(self, expr) -> Text:
        return self.fold("max", expr.args)

    def _Min(self, expr) -> Text:
        return self.fold("min", expr.args)

    def fold(self, name: str, exprs) -> Text:
        """Literals last: some languages have a shorter text for them."""
        args = sorted(self.numbers(exprs), key=lambda x: (x.literal, x.body))
        out = args[0]
        for x in args[1:]:
            out = self.to.extremum(name, out, x)
        return out

    def _Abs(self, expr) -> Text:
        [x] = self.numbers(expr.args)
        return self.to.absolute(x)

    def _sign(self, expr) -> Text:
        x = expr.args[0]
        return self.text(E.where(x > 0, 1, E.where(x < 0, -1, 0)))

    def _uniform(self, expr) -> Text:
        return self.to.uniform([self.to.to_int(x) for x in self.texts(expr.args)])

    def _And(self, expr) -> Text:
        return self.to.logic("and", self.conditions(expr.args))

    def _Or(self, expr) -> Text:
        return self.to.logic("or", self.conditions(expr.args))

    def _Not(self, expr) -> Text:
        return self.to.logic("not", self.conditions(expr.args))

    def conditions(self, exprs) -> list[Text]:
        return sorted(self.texts(exprs), key=lambda x: x.body)

    def _Relational(self, expr) -> Text:
        if (whole := self.to.relation(expr, self.text)) is not None:
            return whole
        sign = expr.rel_op
        bools = [x for x in self.texts(expr.args) if x.kind == "bool"]
        if bools and sign in ("==", "!=") and sympy.S.Zero in expr.args:
            return self.to.truth(bools[0], sign == "!=")
        a, b = self.numbers(expr.args)
        return Text(f"{a.at(ADD)} {sign} {b.at(ADD)}", "bool", LOW)

    def _Function(self, expr) -> Text:
        name = _FUNCTION_NAMES.get(type(expr).__name__, type(expr).__name__)
        return self.to.unary(name, self.text(expr.args[0]))


def _common_scales(total) -> list[sympy.Expr]:
    """What several functions of s are multiplied by in a sum."""
    terms = [x.as_coeff_Mul() for x in total.args]
    counted = Counter(abs(scale) for scale, x in terms if _may_be_summed(x))
    return [x for x, count in counted.items() if count > 1 and x != 1 and x.is_finite]


def _may_be_summed(x: sympy.Expr) -> bool:
    """Whether it is a function of s, and nowhere so large that a sum of several overflows."""
    largest = max((abs(n) for n in x.atoms(sympy.Number)), default=sympy.S.Zero)
    return E.S in x.free_symbols and bool(largest < LARGEST_SUMMED)


_FUNCTION_NAMES = {"ceiling": "ceil", "round_half_even": "round"}
