"""Element rules: casts, copies, constants."""

from __future__ import annotations

import math

import sympy
import torch
from torch import fx

from fa3_compile.frontend.detect.operands import is_movement
from fa3_compile.frontend.lift.elements.rounding import to_integer
from fa3_compile.frontend.lift.lift import (
    Element,
    Index,
    Lifter,
    Opaque,
    element_of,
    number,
    sym,
    truth,
)
from fa3_compile.spec import expr as E
from fa3_compile.spec.expr import Expr, where
from fa3_compile.spec.index import bounds

aten = torch.ops.aten


# The largest n such that every integer up to n is exact in the type.
EXACT_INTEGERS = {torch.bfloat16: 256, torch.float16: 2048, torch.float32: 1 << 24}


@element_of(aten._to_copy.default, torch.ops.prims.convert_element_type.default)
def _(node, index, ctx: Lifter) -> Element:
    return cast(node, node.args[0], index, ctx)


def cast(node: fx.Node, given, index: Index, ctx: Lifter) -> Element:
    """The element of `given`, which broadcasts to `node`, in the type that `node` has."""
    x = ctx.operand(given, index)
    target = node.meta["val"].dtype
    # vmap casts the Python numbers that it meets.
    number_type = torch.float64 if isinstance(given, float) else target
    source = given.meta["val"].dtype if isinstance(given, fx.Node) else number_type
    if target == torch.bool:
        return truth(x)
    x = number(x)
    if target.is_complex or source.is_complex:
        raise Opaque(node, "complex numbers")
    if not target.is_floating_point:
        if (source, target) == (torch.int32, torch.int64) and _widens_for_sums(node, x, ctx):
            raise Opaque(node, "ids that the program reads as 64 bits to calculate with them")
        return _integer(node, x, target, ctx) if source.is_floating_point else x
    if node in ctx.inside and _rounds_further(target, ctx.result):
        raise Opaque(node, f"a rounding to {target} within what is computed in {ctx.result}")
    if not source.is_floating_point and target in EXACT_INTEGERS:
        limits = bounds(x, ctx.ranges)
        widest = max((abs(v) for v in limits), default=0) if _numeric(limits) else None
        depends = bool(x.free_symbols) and not isinstance(x, (where, E.load))
        if depends and (widest is None or widest > EXACT_INTEGERS[target]):
            if target != torch.float32 or widest is not None:
                raise Opaque(node, f"positions rounded to {target}")
    return rounded(x, target)


def _integer(node: fx.Node, x: Expr, target: torch.dtype, ctx: Lifter) -> Expr:
    """A float cast to an integer type, where that has the number: what it otherwise becomes is
    another one on each device."""
    made = to_integer(node, x, ctx)
    infinite = made.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan)
    if infinite or made.is_Integer and abs(made) > torch.iinfo(target).max:
        raise Opaque(node, f"a number that may be no {str(target).removeprefix('torch.')}")
    return made


SUMS_AND_PRODUCTS = frozenset("add sub rsub mul neg abs pow __lshift__ bitwise_left_shift".split())


def _widens_for_sums(node: fx.Node, x: Expr, ctx: Lifter) -> bool:
    """Whether the program itself widens what it reads, and then has sums of it that 32 bits may not
    hold. Comparisons, and what PyTorch widens by itself, are of ids below 2**30."""
    if node not in ctx.shadow.dynamo_of or not x.has(E.load):
        return False
    stack, seen = [node], set()
    while stack:
        for user in stack.pop().users:
            if getattr(user.target, "__name__", "").split(".")[0] in SUMS_AND_PRODUCTS:
                return True
            if is_movement(user) and user not in seen:
                seen.add(user)
                stack.append(user)
    return False


def _rounds_further(dtype: torch.dtype, result: torch.dtype | None) -> bool:
    return result in (torch.float32, torch.float64) and dtype in (torch.float16, torch.bfloat16)


def _numeric(limits) -> bool:
    return limits is not None and all(v.is_Integer for v in limits)


def rounded(x: Expr, dtype: torch.dtype) -> Expr:
    """Constants as the type holds them: finfo(float32).min is -inf in bfloat16."""
    if x.is_number and not x.is_infinite and x.is_real:
        value = torch.tensor(float(x), dtype=torch.float64).to(dtype).item()
        if math.isinf(value):
            return sympy.oo if value > 0 else -sympy.oo
        half = dtype in (torch.float16, torch.bfloat16)
        exact = x.is_Integer or not half and abs(float(x)) < 1e4
        return x if exact else sym(value)
    if isinstance(x, where):
        return where(x.args[0], rounded(x.args[1], dtype), rounded(x.args[2], dtype))
    return x


@element_of(
    aten.clone.default,
    torch.ops.prims.copy_strided.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
    aten.contiguous.default,
    aten.native_dropout.default,
)
def _(node, index, ctx: Lifter) -> Element:
    if node.args[0].op == "get_attr":
        return constant(node.args[0], index)
    return ctx.operand(node.args[0], index)


def constant(node: fx.Node, index: Index) -> Element:
    """A tensor that tracing baked into the shadow: one number, or it has to be read."""
    owner = node.graph.owning_module
    value = getattr(owner, str(node.target), None)
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        real = getattr(value, "constant", None)
        real = value if real is None else real
        try:
            item = real.item()
        except Exception as error:
            raise Opaque(node, "a constant without a value") from error
        if isinstance(item, bool):
            return sympy.true if item else sympy.false
        return sym(item)
    raise Opaque(node, "a constant tensor")
