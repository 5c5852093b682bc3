"""Where an element that a kernel computes would not be the program's: numbers of narrow integers
wrap around, those of 64 bits do not where 32 would, half precision has no large numbers, and
float64 and uint64 have digits that float32 and int64 have not."""

from __future__ import annotations

import functools
import math

import sympy
import torch
from torch import fx

from fa3_compile.frontend.detect.operands import is_movement
from fa3_compile.frontend.lift.captured import Captured, Seed
from fa3_compile.frontend.lift.lift import Element, Lifter, Opaque
from fa3_compile.spec.expr import Expr, load, loads_in, where
from fa3_compile.spec.index import bounds

# Types that positions and their differences may be beyond.
NARROW = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64)
INTEGERS = frozenset((*NARROW, torch.int32, torch.int64))
# What kernels read as int64 (lower/dispatch.py widens the others).
READ_AS_INT64 = (torch.int64, torch.uint32, torch.uint64)
# Ids, positions and lengths are below this: sums and differences of two of them fit into int32.
LARGEST_ID = 1 << 30


def check_same_numbers(node: fx.Node, element: Element, ctx: Lifter) -> None:
    """`Opaque` where the node's element may be another number than the program computes."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor) or is_movement(node):
        return
    if _wraps_operand(node):
        raise Opaque(node, "a number that wraps around in the type of the integers beside it")
    if value.dtype in (*NARROW, torch.int32) and isinstance(element, Expr):
        if not _fits(element, value.dtype, ctx):
            raise Opaque(node, f"integers that may wrap around in {value.dtype}")
    if value.dtype == torch.int64 and isinstance(element, Expr) and not _reads_int64(element, ctx):
        if _is_large_product(element, ctx) or not _fits(element, torch.int32, ctx):
            raise Opaque(node, "integers beyond 32 bits")
    if node not in ctx.inside and element.atoms(load) and _overflows(element, value.dtype):
        raise Opaque(node, f"numbers that {value.dtype} does not hold")
    if node not in ctx.inside and element.atoms(load) and any(map(_is_widest, node.args)):
        raise Opaque(node, "arithmetic in float64 or uint64")


def _wraps_operand(node: fx.Node) -> bool:
    """Whether one of the operands is cast to the integers of the others, and does not fit: bytes
    are all less than -1, which is 255 as a byte."""
    values = [x.meta["val"] for x in node.args if isinstance(x, fx.Node)]
    tensors = [x for x in values if isinstance(x, torch.Tensor)]
    dtypes = {x.dtype for x in tensors if x.dim()} or {x.dtype for x in tensors}
    if not dtypes or not dtypes <= INTEGERS:
        return False
    dtype = functools.reduce(torch.promote_types, dtypes)
    if any(x.dtype in INTEGERS and not _holds(dtype, torch.iinfo(x.dtype)) for x in tensors):
        return dtype in NARROW
    return not all(map(functools.partial(_holds_number, dtype), _numbers(node)))


def _numbers(node: fx.Node) -> list:
    """The arguments of an operator that are numbers in the place of tensors: no dimensions."""
    schema = getattr(node.target, "_schema", None)
    named = zip(schema.arguments, node.args) if schema is not None else ()
    typed = [(str(argument.type), x) for argument, x in named if x is not None]
    return [x for kind, x in typed if "number" in kind or "Tensor" in kind]


def _holds_number(dtype: torch.dtype, x) -> bool:
    if isinstance(x, fx.Node):
        return isinstance(x.meta["val"], torch.Tensor) or dtype not in NARROW
    info = torch.iinfo(dtype)
    return not isinstance(x, int) or info.min <= x <= info.max


def _holds(dtype: torch.dtype, other: torch.iinfo) -> bool:
    info = torch.iinfo(dtype)
    return info.min <= other.min and other.max <= info.max


def _reads_int64(element: Expr, ctx: Lifter) -> bool:
    """Whether kernels compute it in 64 bits, as what is read is."""
    return any(ctx.loads[x.tensor].dtype in READ_AS_INT64 for x in loads_in(element))


def _is_large_product(element: Expr, ctx: Lifter) -> bool:
    """Whether a product in it may be beyond int32."""
    products = element.atoms(sympy.Mul, sympy.Pow)
    return any(size is not None and size >= 1 << 31 for size in (_size(x, ctx) for x in products))


def _size(x: Expr, ctx: Lifter) -> float | None:
    """How large a product may be; None where that is not known."""
    if x.is_number:
        return abs(float(x))
    if isinstance(x, load):
        held = _range_of(ctx.loads[x.tensor])
        return None if held is None else float(max(abs(n) for n in held))
    if isinstance(x, sympy.Pow) and x.exp.is_Integer and x.exp > 0:
        base = _size(x.base, ctx)
        return None if base is None else base ** int(x.exp)
    if isinstance(x, sympy.Mul):
        sizes = [_size(y, ctx) for y in x.args]
        known = [y for y in sizes if y is not None]
        return math.prod(known) if len(known) == len(sizes) else None
    size = ctx.ranges.get(x)
    return float(size) if size is not None and size.is_number else None


def _overflows(element: Element, dtype: torch.dtype) -> bool:
    """Whether a number in it is infinite in half precision, as (1 - mask) * -1e9 is."""
    if dtype not in (torch.float16, torch.bfloat16) or not isinstance(element, Expr):
        return False
    largest = max((abs(float(x)) for x in element.atoms(sympy.Number) if x.is_finite), default=0.0)
    return bool(torch.tensor(largest, dtype=torch.float64).to(dtype).isinf())


def _is_widest(argument) -> bool:
    value = argument.meta["val"] if isinstance(argument, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float64, torch.uint64)


def _fits(element: Expr, dtype: torch.dtype, ctx: Lifter) -> bool:
    """Whether all values that an element may have are among the type's; one that is nearly as wide
    as positions are is trusted unless they are known not to be."""
    info = torch.iinfo(dtype)
    limits = _limits(element, ctx)
    if limits is None:
        return dtype not in NARROW
    return all(info.min <= int(x) <= info.max for x in limits)


def _limits(element: Expr, ctx: Lifter) -> tuple[Expr, Expr] | None:
    """(lowest, highest), as numbers; None where either is unknown."""
    if isinstance(element, where):
        branches = [_limits(x, ctx) for x in element.args[1:]]
        known = [x for x in branches if x is not None]
        if len(known) < len(branches):
            return None
        return min(x[0] for x in known), max(x[1] for x in known)
    ranges = {**ctx.ranges}
    instead: dict[Expr, Expr] = {}
    for i, x in enumerate(sorted(loads_in(element), key=str)):
        held = _range_of(ctx.loads[x.tensor])
        if held is None:
            return None
        symbol = sympy.Symbol(f"held{i}", integer=True, nonnegative=True)
        ranges[symbol] = sympy.Integer(held[1] - held[0] + 1)
        instead[x] = symbol + held[0]
    found = bounds(sympy.expand(element.xreplace(instead)), ranges)
    return found if found is not None and all(x.is_Integer for x in found) else None


def _range_of(read: Captured | Seed) -> tuple[int, int] | None:
    if read.dtype == torch.bool:
        return 0, 1
    if read.dtype in (torch.int32, torch.int64):
        return -LARGEST_ID, LARGEST_ID - 1
    if read.dtype in NARROW:
        info = torch.iinfo(read.dtype)
        return info.min, info.max
    return None
