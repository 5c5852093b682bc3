"""The vocabulary of score and mask expressions.

An expression answers "what is element (b, h, q, kv)?". It is a sympy expression over

- the coordinates `b`, `h`, `q`, `kv` (integers from 0) and the raw dot product `s` = sum_d Q K;
- sizes: `Sq`, `Skv` (lengths) and `n0`, `n1`, ... (any other dynamic integer);
- `load(i, *index)`: the element of captured tensor i; booleans load as 0 or 1;
- `where(condition, a, b)`, `floordiv`, `mod` (Python's rounding), `trunc`, and sympy's own
  arithmetic, comparisons, logic and elementary functions;
- `bitwise_and`, `bitwise_or`, `bitwise_xor`, `left_shift`, `right_shift` of integers in two's
  complement;
- `uniform(seed, b, h, q, kv)`: a random number that these five integers determine.

Values are real numbers in float32, indices are integers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

import sympy
from sympy import Expr
from sympy.logic.boolalg import Boolean, BooleanAtom

__all__ = [
    "B",
    "COORDINATES",
    "H",
    "KV",
    "Q",
    "S",
    "SKV",
    "SQ",
    "Expr",
    "Boolean",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "depends_on",
    "erf",
    "floordiv",
    "is_integer_valued",
    "left_shift",
    "load",
    "loads_in",
    "mod",
    "right_shift",
    "round_half_even",
    "sigmoid",
    "size_symbol",
    "sizes_in",
    "trunc",
    "uniform",
    "where",
]

S = sympy.Symbol("s", real=True)
B, H, Q, KV = sympy.symbols("b h q kv", integer=True, nonnegative=True)
SQ, SKV = sympy.symbols("Sq Skv", integer=True, positive=True)
COORDINATES = (B, H, Q, KV)
# No coordinate or length reaches this: kernels add two of them in 32 bits.
LONGEST = 2**30


def size_symbol(index: int) -> sympy.Symbol:
    """The symbol of the op's `sizes[index]`, a dynamic integer that is neither length."""
    return sympy.Symbol(f"n{index}", integer=True, positive=True)


class load(sympy.Function):
    """`load(i, *index)`: captured tensor number i at a multi-index; bool tensors give 0 or 1."""

    is_real = True
    is_commutative = True
    # A read is no number, even at a constant place.
    is_number = False  # pyright: ignore[reportAssignmentType]

    @classmethod
    def eval(cls, *args):
        if not args or not args[0].is_Integer or args[0] < 0:
            raise ValueError(f"load needs a tensor number first, got {args}")

    @property
    def tensor(self) -> int:
        return int(self.args[0])

    @property
    def index(self) -> tuple[Expr, ...]:
        return self.args[1:]


class where(sympy.Function):
    """`where(condition, a, b)`: a where the condition holds, else b, element by element."""

    nargs = 3
    is_real = True
    is_commutative = True

    @classmethod
    def eval(cls, condition, a, b):
        if condition == sympy.true:
            return a
        if condition == sympy.false:
            return b
        if a == b:
            return a
        return None


class floordiv(sympy.Function):
    """Integer division rounded towards minus infinity, as Python's `//`."""

    nargs = 2
    is_integer = True
    is_commutative = True

    @classmethod
    def eval(cls, a, b):
        if b == 1:
            return a
        if a == 0:
            return sympy.S.Zero
        if a.is_Integer and b.is_Integer and b != 0:
            return a // b
        return None

    def _eval_is_nonnegative(self):
        a, b = self.args
        return True if a.is_nonnegative and b.is_nonnegative else None


class mod(sympy.Function):
    """Remainder with the sign of the divisor, as Python's `%`."""

    nargs = 2
    is_integer = True
    is_commutative = True

    @classmethod
    def eval(cls, a, b):
        if b == 1 or a == 0:
            return sympy.S.Zero
        if a.is_Integer and b.is_Integer and b != 0:
            return a % b
        return None

    def _eval_is_nonnegative(self):
        return True if self.args[1].is_nonnegative else None


class _Bitwise(sympy.Function):
    """An operation on the bits of two integers, in either order."""

    nargs = 2
    is_integer = True
    is_commutative = True
    of: Callable[[int, int], int]

    def __new__(cls, a, b, **options):
        return super().__new__(cls, *sorted((a, b), key=sympy.default_sort_key), **options)

    @classmethod
    def eval(cls, a, b):
        if a.is_Integer and b.is_Integer:
            return sympy.Integer(cls.of(int(a), int(b)))
        if a == 0:  # numbers come first
            return a if cls.of(0, -1) == 0 else b
        return None

    def _eval_is_nonnegative(self):
        return True if all(x.is_nonnegative for x in self.args) else None


class bitwise_and(_Bitwise):
    """The bits that both integers have, as Python's `&`."""

    of = operator.and_

    def _eval_is_nonnegative(self):
        return True if any(x.is_nonnegative for x in self.args) else None


class bitwise_or(_Bitwise):
    """The bits that either integer has, as Python's `|`."""

    of = operator.or_


class bitwise_xor(_Bitwise):
    """The bits that one of the integers has, as Python's `^`."""

    of = operator.xor


class _Shift(sympy.Function):
    """An integer's bits at other places; the distance is 0 to 62."""

    nargs = 2
    is_integer = True
    is_commutative = True

    def _eval_is_nonnegative(self):
        return True if self.args[0].is_nonnegative else None


class left_shift(_Shift):
    """a * 2**n, as Python's `<<`."""

    @classmethod
    def eval(cls, a, n):
        return a * 2**n if n.is_Integer else None


class right_shift(_Shift):
    """a / 2**n rounded towards minus infinity, as Python's `>>`."""

    @classmethod
    def eval(cls, a, n):
        return floordiv(a, 2**n) if n.is_Integer else None


class trunc(sympy.Function):
    """A float cast to an integer: rounded towards zero."""

    nargs = 1
    is_integer = True
    is_commutative = True

    @classmethod
    def eval(cls, x):
        if x.is_integer or x.is_infinite or x is sympy.nan:
            return x
        return sympy.Integer(int(x)) if x.is_number and x.is_finite else None


class round_half_even(sympy.Function):
    """Rounded to the nearest integer, ties to even, as `torch.round`."""

    nargs = 1
    is_integer = True
    is_commutative = True

    @classmethod
    def eval(cls, x):
        return x if x.is_integer or x.is_infinite or x is sympy.nan else None


class erf(sympy.Function):
    """The error function; its own class because sympy's rewrites itself under negation."""

    nargs = 1
    is_real = True
    is_commutative = True

    def fdiff(self, argindex=1):
        return 2 / sympy.sqrt(sympy.pi) * sympy.exp(-(self.args[0] ** 2))


class sigmoid(sympy.Function):
    """1 / (1 + exp(-x)), a node of its own: written out, one form overflows in its derivative and
    another loses the digits of small values."""

    nargs = 1
    is_real = True
    is_nonnegative = True
    is_commutative = True

    @classmethod
    def eval(cls, x):
        if x.is_number and x.is_extended_real and abs(x) > 110:  # beyond float32's least number
            return sympy.S.One if x.is_extended_positive else sympy.S.Zero
        return None

    def fdiff(self, argindex=1):
        return self * (1 - self)


class uniform(sympy.Function):
    """`uniform(seed, b, h, q, kv)`: a float32 in [0, 1), a multiple of 2**-24.

    The upper 24 bits of word kv % 4 of Philox4x32-10 (Salmon et al., "Parallel random numbers: as
    easy as 1, 2, 3", SC 2011) under the key (seed mod 2**32, seed // 2**32) at the counter
    (kv // 4, q, h, b): the same number in the forward, in the backward and in every kernel family.
    `seed` is an integer of 64 bits; the others are at least 0 and below 2**31.
    """

    nargs = 5
    is_real = True
    is_nonnegative = True
    is_commutative = True


def _where_diff(self, symbol):
    condition, a, b = self.args
    return where(condition, a.diff(symbol), b.diff(symbol))


where._eval_derivative = _where_diff  # pyright: ignore[reportAttributeAccessIssue]


def loads_in(*exprs: Expr | Boolean) -> list[load]:
    """Every distinct load, by tensor number and then text, so that the order is reproducible."""
    found: set[load] = set()
    for expr in exprs:
        found |= expr.atoms(load)
    return sorted(found, key=lambda x: (x.tensor, str(x)))


def sizes_in(*exprs: Expr | Boolean) -> list[sympy.Symbol]:
    """Every `n<i>` symbol used, in order of i."""
    found = {x for e in exprs for x in e.free_symbols if x.name[0] == "n" and x.name[1:].isdigit()}
    return sorted(found, key=lambda x: int(x.name[1:]))


def depends_on(expr: Expr | Boolean, symbols: Iterable[sympy.Symbol]) -> bool:
    """Whether any of the symbols occurs, load indices included."""
    return not expr.free_symbols.isdisjoint(symbols)


def is_integer_valued(expr: Expr | Boolean, integer_loads: frozenset[int] = frozenset()) -> bool:
    """Whether the expression is computed in integers; `integer_loads` are the int tensors."""
    if isinstance(expr, (Boolean, BooleanAtom)) and not isinstance(expr, sympy.Symbol):
        return False
    if isinstance(expr, load):
        return expr.tensor in integer_loads
    if isinstance(expr, where):
        return all(is_integer_valued(x, integer_loads) for x in expr.args[1:])
    if isinstance(expr, (sympy.Add, sympy.Mul, sympy.Max, sympy.Min, sympy.Abs)):
        return all(is_integer_valued(x, integer_loads) for x in expr.args)
    return bool(expr.is_integer) and not isinstance(expr, sympy.Float)
