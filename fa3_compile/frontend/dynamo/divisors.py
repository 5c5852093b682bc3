"""Which integers divide the sizes of a compilation, as its guards say: those of windows, blocks
and heads, into which `view` and `reshape` have split a dynamic length."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator

import sympy
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv, Mod

from fa3_compile.spec.expr import Expr

# size -> (a size that is equal to it, what divides both). Found once for a compilation: Dynamo has
# added these guards before a graph is looked at.
Divided = dict[Expr, tuple[sympy.Symbol, int]]
FOUND: weakref.WeakKeyDictionary[ShapeEnv, Divided] = weakref.WeakKeyDictionary()


def divided(size: sympy.Symbol, shape_env: ShapeEnv) -> tuple[sympy.Symbol, int]:
    """(a size that is equal to it, the largest integer that is known to divide both, or 1)."""
    if shape_env not in FOUND:
        FOUND[shape_env] = _found(shape_env)
    return FOUND[shape_env].get(size, (size, 1))


def _found(shape_env: ShapeEnv) -> Divided:
    guards = [g for x in shape_env.guards if isinstance(g := shape_env.replace(x.expr), sympy.Eq)]
    divisors: dict[Expr, int] = {}
    for guard in guards:
        for size, by in _divisors(guard, shape_env):
            divisors[size] = math.lcm(divisors.get(size, 1), by)
    same = {size: size for size in divisors}
    for a, b in _equals(guards, divisors):
        same = {x: same[a] if to == same[b] else to for x, to in same.items()}
    together: dict[Expr, int] = {}
    for size, to in same.items():
        together[to] = math.lcm(together.get(to, 1), divisors[size])
    return {size: (to, together[to]) for size, to in same.items()}  # pyright: ignore


def _divisors(guard: sympy.Eq, shape_env: ShapeEnv) -> Iterator[tuple[Expr, int]]:
    """(size, what divides it) where the guard says so."""
    for a, b in (guard.args, guard.args[::-1]):
        if isinstance(a, Mod) and b == 0 and a.args[1].is_Integer:
            times, size = a.args[0].as_coeff_Mul()
            if size.is_Symbol and times.is_Integer:
                yield size, int(a.args[1]) // math.gcd(int(times), int(a.args[1]))
        # h * w = 4 * (h // 2) * (w // 2): none of the factors lost anything.
        exact = {x: x.args[0] / x.args[1] for x in b.atoms(FloorDiv) if _is_of_a_size(x)}
        if exact and not a.has(FloorDiv) and _is_product(b, shape_env) and a == b.xreplace(exact):
            yield from ((x.args[0], int(x.args[1])) for x in exact)


def _equals(guards: list[sympy.Eq], divisors: dict[Expr, int]) -> Iterator[tuple[Expr, Expr]]:
    """Sizes that are equal since they are as many times the same integer."""
    for a, b in (guard.args for guard in guards):
        if isinstance(a, FloorDiv) and isinstance(b, FloorDiv) and a.args[1] == b.args[1]:
            (one, by), (other, _) = a.args, b.args
            if one in divisors and other in divisors and by.is_Integer:
                if divisors[one] % int(by) == divisors[other] % int(by) == 0:
                    yield one, other


def _is_of_a_size(division: Expr) -> bool:
    size, by = division.args
    return bool(size.is_Symbol and by.is_Integer and by > 0)


def _is_product(expr: Expr, shape_env: ShapeEnv) -> bool:
    """Whether it is a product of positive sizes, such that are divided, and a number."""
    factors = [x.args[0] if isinstance(x, FloorDiv) else x for x in sympy.Mul.make_args(expr)]
    return all(
        x > 0 if x.is_Integer else x.is_Symbol and shape_env.bound_sympy(x).lower >= 1
        for x in factors
    )
