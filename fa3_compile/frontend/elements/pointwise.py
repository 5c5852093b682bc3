"""Element rules: arithmetic, comparisons, logic, elementary functions, casts."""

from __future__ import annotations

import math

import sympy
import torch
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.lift import (
    Element,
    Index,
    Lifter,
    Opaque,
    element_of,
    number,
    sym,
    truth,
)
from fa3_compile.frontend.placeholders import prob, row_stat
from fa3_compile.spec import expr as E
from fa3_compile.spec.expr import Expr, load, where
from fa3_compile.spec.forms import dropout_weight
from fa3_compile.spec.index import bounds, divide, remainder
from fa3_compile.spec.simplify import exact_at_one

aten = torch.ops.aten


def _is_bool(node: fx.Node) -> bool:
    return node.meta["val"].dtype == torch.bool


def _is_float(node: fx.Node) -> bool:
    return node.meta["val"].dtype.is_floating_point


def through_where(function, *args: Expr) -> Expr:
    """function(where(c, 1, 0)) -> where(c, function(1), function(0)), for constant branches.

    It keeps masks made by arithmetic, `(1 - mask) * -1e9`, readable as masks.
    """
    selects = {a for a in args if isinstance(a, where)}
    others = [a for a in args if not isinstance(a, where)]
    constant = len(selects) == 1 and all(x.is_number for x in next(iter(selects)).args[1:])
    if constant and all(x.is_number for x in others):
        select = next(iter(selects))
        condition = select.args[0]
        branches = [
            function(*(a.args[side] if isinstance(a, where) else a for a in args))
            for side in (1, 2)
        ]
        return where(condition, *branches)
    return function(*args)


@element_of(aten.add.Tensor, aten.add.Scalar)
def _(node, index, ctx: Lifter) -> Element:
    a, b = (ctx.broadcast(x, index) for x in node.args[:2])
    if _is_bool(node):
        return sympy.Or(*(truth(ctx.operand(x, index)) for x in node.args[:2]))
    alpha = ctx.broadcast(node.kwargs.get("alpha", 1), index)
    return through_where(lambda x, y: _sum(x, alpha * y), a, b)


def _sum(a: Expr, b: Expr) -> Expr:
    constants = [abs(x.as_coeff_Add()[0]) for x in (a, b)]
    if min(constants) > 0 and max(constants) >= 1000:
        # 0.2 + (1e9*mask - 1e9): one constant would absorb the other before the mask cancels it.
        a, b = exact_at_one(a), exact_at_one(b)
    return a + b


@element_of(aten.sub.Tensor, aten.sub.Scalar)
def _(node, index, ctx: Lifter) -> Element:
    a, b = (ctx.broadcast(x, index) for x in node.args[:2])
    alpha = ctx.broadcast(node.kwargs.get("alpha", 1), index)
    return through_where(lambda x, y: _sum(x, -alpha * y), a, b)


@element_of(aten.rsub.Tensor, aten.rsub.Scalar)
def _(node, index, ctx: Lifter) -> Element:
    a, b = (ctx.broadcast(x, index) for x in node.args[:2])
    return through_where(lambda x, y: _sum(y, -x), a, b)


@element_of(aten.mul.Tensor, aten.mul.Scalar)
def _(node, index, ctx: Lifter) -> Element:
    if _is_bool(node):
        return sympy.And(*(truth(ctx.operand(x, index)) for x in node.args[:2]))
    a, b = (ctx.broadcast(x, index) for x in node.args[:2])
    if any(_may_be_zero(x) and y.has(sympy.oo, -sympy.oo) for x, y in ((a, b), (b, a))):
        raise Opaque(node, "an infinite score times zero is NaN")
    return through_where(_times, a, b)


def _may_be_zero(x: Expr) -> bool:
    return x == 0 or isinstance(x, where) and any(map(_may_be_zero, x.args[1:]))


def _times(a: Expr, b: Expr) -> Expr:
    # s * where(c, 1, 0) -> where(c, s, 0): the mask that multiplies, as GPT-1 has it.
    for x, y in ((a, b), (b, a)):
        chooses = isinstance(x, where) and set(x.args[1:]) <= {0, 1}
        # NaN of a softmax times 0 is NaN.
        if chooses and not y.is_number and not y.has(prob):
            return where(x.args[0], *(y if branch == 1 else branch for branch in x.args[1:]))
    return a * b


@element_of(aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor)
def _(node, index, ctx: Lifter) -> Element:
    a, b = (ctx.broadcast(x, index) for x in node.args[:2])
    return through_where(_quotient, a, b)


def _quotient(a: Expr, b: Expr) -> Expr:
    if b == 0:
        raise ZeroDivisionError("a score divided by the constant 0")
    return a * sym(1 / float(b)) if b.is_number else a / b


@element_of(aten.div.Tensor_mode, aten.div.Scalar_mode, aten.floor_divide.default)
def _(node, index, ctx: Lifter) -> Element:
    a, b = (ctx.broadcast(x, index) for x in node.args[:2])
    mode = node.kwargs.get("rounding_mode", "floor" if node.target is not None else None)
    if mode is None:
        return through_where(_quotient, a, b)
    if _is_float(node):
        return sympy.floor(a / b) if mode == "floor" else E.trunc(a / b)
    if mode == "floor" and b.is_positive:
        return divide(a, b, ctx.ranges)
    limits = bounds(a, ctx.ranges)
    if b.is_positive and limits is not None and limits[0].is_nonnegative:
        return divide(a, b, ctx.ranges)
    raise Opaque(node, "an integer division whose rounding is not known")


@element_of(aten.remainder.Scalar, aten.remainder.Tensor, aten.fmod.Scalar, aten.fmod.Tensor)
def _(node, index, ctx: Lifter) -> Element:
    a, b = (ctx.broadcast(x, index) for x in node.args[:2])
    limits = bounds(a, ctx.ranges)
    positive = limits is not None and limits[0].is_nonnegative
    rounds_down = node.target in (aten.remainder.Scalar, aten.remainder.Tensor)
    if not _is_float(node) and b.is_positive and (rounds_down or positive):
        return remainder(a, b, ctx.ranges)
    raise Opaque(node, "a remainder whose rounding is not known")


@element_of(aten.neg.default)
def _(node, index, ctx: Lifter) -> Element:
    return through_where(lambda x: -x, ctx.broadcast(node.args[0], index))


@element_of(aten.reciprocal.default)
def _(node, index, ctx: Lifter) -> Element:
    return 1 / ctx.broadcast(node.args[0], index)


@element_of(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar)
def _(node, index, ctx: Lifter) -> Element:
    base, exponent = (ctx.broadcast(x, index) for x in node.args[:2])
    if not (exponent.is_number and (exponent.is_Integer or float(exponent) in (0.5, -0.5, 2.0))):
        _transcendental(node, ctx, base, exponent)
    if exponent.is_Float and float(exponent).is_integer():
        exponent = sympy.Integer(int(exponent))
    return base**exponent


def _transcendental(node: fx.Node, ctx: Lifter, *args: Expr) -> None:
    """Functions of coordinates alone are cheaper read than computed, and then exactly eager's."""
    if node in ctx.inside:
        return  # a sink beside the scores: exp(cat(sink, s)) is in memory nowhere
    computed = any(E.S in x.free_symbols or x.has(row_stat) for x in args)
    if not computed and any(x.free_symbols for x in args):
        raise Opaque(node, "a function of the position alone")


def _log1p(x: Expr) -> Expr:
    if isinstance(x, sympy.exp):
        return _softplus(x.args[0])
    return sympy.log(1 + x)


def _softplus(x: Expr) -> Expr:
    return sympy.Max(x, 0) + sympy.log(1 + sympy.exp(-sympy.Abs(x)))


def _sigmoid(x: Expr) -> Expr:
    return (1 + sympy.tanh(x / 2)) / 2


def _asinh(x: Expr) -> Expr:
    size = sympy.Abs(x)
    return sympy.sign(x) * sympy.log(size + sympy.sqrt(size**2 + 1))


# As functions that overflow neither themselves nor in their derivative.
UNARY = {
    aten.exp.default: sympy.exp,
    aten.log.default: sympy.log,
    aten.tanh.default: sympy.tanh,
    aten.sin.default: sympy.sin,
    aten.cos.default: sympy.cos,
    aten.tan.default: sympy.tan,
    aten.sinh.default: sympy.sinh,
    aten.cosh.default: sympy.cosh,
    aten.atan.default: sympy.atan,
    aten.erf.default: E.erf,
    aten.sqrt.default: sympy.sqrt,
    aten.rsqrt.default: lambda x: 1 / sympy.sqrt(x),
    aten.sigmoid.default: _sigmoid,
    aten.silu.default: lambda x: x * _sigmoid(x),
    aten.mish.default: lambda x: x * sympy.tanh(_softplus(x)),
    aten.erfc.default: lambda x: 1 - E.erf(x),
    aten.asinh.default: _asinh,
    aten.exp2.default: lambda x: sympy.exp(x * math.log(2)),
    aten.expm1.default: lambda x: sympy.exp(x) - 1,
    aten.log2.default: lambda x: sympy.log(x) / math.log(2),
    aten.log1p.default: lambda x: _log1p(x),
}


@element_of(*UNARY)
def _(node, index, ctx: Lifter) -> Element:
    def function(x: Expr) -> Expr:
        if x.is_number:
            # Torch's own answer: log(0) is -inf.
            return sym(node.target(torch.tensor(float(x), dtype=torch.float64)).item())
        _transcendental(node, ctx, x)
        return UNARY[node.target](x)

    return through_where(function, ctx.broadcast(node.args[0], index))


@element_of(aten.gelu.default)
def _(node, index, ctx: Lifter) -> Element:
    def gelu(x: Expr) -> Expr:
        _transcendental(node, ctx, x)
        if node.kwargs.get("approximate", "none") == "none":
            return x * (1 + E.erf(x * math.sqrt(0.5))) / 2
        return x * (1 + sympy.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    return through_where(gelu, ctx.broadcast(node.args[0], index))


@element_of(aten.elu.default)
def _(node, index, ctx: Lifter) -> Element:
    alpha, scale, inner = (sym(x) for x in (*node.args[1:], 1, 1, 1)[:3])

    def elu(x: Expr) -> Expr:
        _transcendental(node, ctx, x)
        return scale * where(x > 0, x, alpha * (sympy.exp(inner * sympy.Min(x, 0)) - 1))

    return through_where(elu, ctx.broadcast(node.args[0], index))


@element_of(aten.hypot.default)
def _(node, index, ctx: Lifter) -> Element:
    a, b = (ctx.broadcast(x, index) for x in node.args)
    return sympy.sqrt(a**2 + b**2)


@element_of(aten.abs.default)
def _(node, index, ctx: Lifter) -> Element:
    return through_where(sympy.Abs, ctx.broadcast(node.args[0], index))


@element_of(aten.sign.default, aten.sgn.default)
def _(node, index, ctx: Lifter) -> Element:
    return through_where(sympy.sign, ctx.broadcast(node.args[0], index))


@element_of(aten.relu.default)
def _(node, index, ctx: Lifter) -> Element:
    return sympy.Max(ctx.broadcast(node.args[0], index), 0)


@element_of(aten.leaky_relu.default)
def _(node, index, ctx: Lifter) -> Element:
    slope = sym(node.args[1] if len(node.args) > 1 else 0.01)
    x = ctx.broadcast(node.args[0], index)
    return where(x > 0, x, slope * x)


@element_of(aten.hardtanh.default)
def _(node, index, ctx: Lifter) -> Element:
    low, high = map(sym, (*node.args[1:], *(-1.0, 1.0)[len(node.args) - 1 :]))
    return sympy.Min(sympy.Max(ctx.broadcast(node.args[0], index), low), high)


@element_of(aten.floor.default)
def _(node, index, ctx: Lifter) -> Element:
    return through_where(sympy.floor, ctx.broadcast(node.args[0], index))


@element_of(aten.ceil.default)
def _(node, index, ctx: Lifter) -> Element:
    return through_where(sympy.ceiling, ctx.broadcast(node.args[0], index))


@element_of(aten.trunc.default)
def _(node, index, ctx: Lifter) -> Element:
    return E.trunc(ctx.broadcast(node.args[0], index))


@element_of(aten.round.default)
def _(node, index, ctx: Lifter) -> Element:
    return E.round_half_even(ctx.broadcast(node.args[0], index))


@element_of(aten.minimum.default)
def _(node, index, ctx: Lifter) -> Element:
    return through_where(sympy.Min, *(ctx.broadcast(x, index) for x in node.args))


@element_of(aten.maximum.default)
def _(node, index, ctx: Lifter) -> Element:
    return through_where(sympy.Max, *(ctx.broadcast(x, index) for x in node.args))


@element_of(aten.clamp.default, aten.clamp.Tensor)
def _(node, index, ctx: Lifter) -> Element:
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
    high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
    x = ctx.broadcast(node.args[0], index)
    if low is not None:
        x = through_where(sympy.Max, x, ctx.broadcast(low, index))
    if high is not None:
        x = through_where(sympy.Min, x, ctx.broadcast(high, index))
    return x


@element_of(aten.clamp_min.default, aten.clamp_min.Tensor)
def _(node, index, ctx: Lifter) -> Element:
    return through_where(sympy.Max, *(ctx.broadcast(x, index) for x in node.args[:2]))


@element_of(aten.clamp_max.default, aten.clamp_max.Tensor)
def _(node, index, ctx: Lifter) -> Element:
    return through_where(sympy.Min, *(ctx.broadcast(x, index) for x in node.args[:2]))


COMPARISONS = {
    "eq": sympy.Eq,
    "ne": sympy.Ne,
    "lt": sympy.Lt,
    "le": sympy.Le,
    "gt": sympy.Gt,
    "ge": sympy.Ge,
}


@element_of(*(getattr(getattr(aten, n), o) for n in COMPARISONS for o in ("Tensor", "Scalar")))
def _(node, index, ctx: Lifter) -> Element:
    compare = COMPARISONS[node.target.__name__.split(".")[0]]
    operands = [ctx.operand(x, index) for x in node.args[:2]]
    a, b = map(number, operands)
    if compare in (sympy.Eq, sympy.Ne) and b in (0, 1):
        # `mask == 0` of a boolean or of where(c, 1, 0) is the mask's negation.
        for x in operands[:1]:
            if x is not a or (isinstance(a, where) and set(a.args[1:]) == {0, 1}):
                logic = truth(x)
                wants_true = (compare is sympy.Eq) == (b == 1)
                return logic if wants_true else sympy.Not(logic)
    if isinstance(a, where) and b.is_number and all(x.is_number for x in a.args[1:]):
        condition, yes, no = a.args
        return _choose(condition, compare(yes, b), compare(no, b))
    if any(E.S in x.free_symbols and _has_fill(x) for x in (a, b)):
        raise Opaque(node, "a comparison of masked scores")
    return compare(a, b)


def _has_fill(x: Expr) -> bool:
    return any(n.is_infinite or abs(n) > 1e3 for n in x.atoms(sympy.Number))


def _choose(condition, a, b):
    return sympy.Or(sympy.And(condition, a), sympy.And(sympy.Not(condition), b))


@element_of(aten.isnan.default)
def _(node, index, ctx: Lifter) -> Element:
    return sympy.false if not _reads_floats(ctx.broadcast(node.args[0], index), ctx) else _no(node)


@element_of(aten.isinf.default)
def _(node, index, ctx: Lifter) -> Element:
    x = ctx.broadcast(node.args[0], index)
    return compare_infinite(x) if not _reads_floats(x, ctx) else _no(node)


def compare_infinite(x: Expr) -> Element:
    if isinstance(x, where):
        return _choose(x.args[0], compare_infinite(x.args[1]), compare_infinite(x.args[2]))
    return sympy.true if x.is_infinite else sympy.false


def _reads_floats(x: Expr, ctx: Lifter) -> bool:
    names = {f.func.__name__ for f in x.atoms(sympy.Function)}
    return E.S in x.free_symbols or bool(names & {"load", "prob", "row_stat"})


def _no(node: fx.Node):
    raise Opaque(node, "whether a loaded value is finite is known only when it runs")


def _logic(combine):
    def rule(node, index, ctx: Lifter) -> Element:
        operands = [ctx.operand(x, index) for x in node.args[:2]]
        if not _is_bool(node):
            raise Opaque(node, "bitwise arithmetic of integers")
        return combine(*map(truth, operands))

    return rule


element_of(aten.logical_and.default, aten.bitwise_and.Tensor, aten.bitwise_and.Scalar)(
    _logic(sympy.And)
)
element_of(aten.logical_or.default, aten.bitwise_or.Tensor, aten.bitwise_or.Scalar)(
    _logic(sympy.Or)
)
element_of(aten.logical_xor.default, aten.bitwise_xor.Tensor, aten.bitwise_xor.Scalar)(
    _logic(lambda a, b: sympy.Or(sympy.And(a, sympy.Not(b)), sympy.And(sympy.Not(a), b)))
)
element_of(aten.logical_not.default, aten.bitwise_not.default)(_logic(lambda a: sympy.Not(a)))


@element_of(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _(node, index, ctx: Lifter) -> Element:
    condition, a, b = node.args
    if _is_weight(replaced := _without_nan(condition, a, b, index, ctx)):
        return replaced
    condition, a, b = (ctx.operand(x, index) for x in (condition, a, b))
    condition = truth(condition)
    if _is_bool(node):
        return _choose(condition, truth(a), truth(b))
    return where(condition, number(a), number(b))


def _without_nan(condition, a, b, index, ctx: Lifter) -> Element | None:
    """where(isnan(p), 0, p) of the weights p: rows of -inf alone give zeros."""
    if not isinstance(condition, fx.Node) or condition.target is not aten.isnan.default:
        return None
    if condition.args[0] is not b or ctx.operand(a, index) != 0:
        return None
    element = ctx.operand(b, index)
    if _is_weight(element):
        ctx.zeroed |= element.atoms(prob)
    return element


def _is_weight(element: Element | None) -> bool:
    """Whether it is an element of one softmax, perhaps times finite factors or filled with 0."""
    if isinstance(element, sympy.Mul):
        others = [x for x in element.args if not x.has(prob)]
        inside = [x for x in element.args if x.has(prob)]
        return len(inside) == 1 and _is_weight(inside[0]) and not any(x.has(load) for x in others)
    if isinstance(element, where):
        branches = [x for x in element.args[1:] if x != 0]
        return len(branches) == 1 and _is_weight(branches[0]) and not element.args[0].has(prob)
    return isinstance(element, prob)


@element_of(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _(node, index, ctx: Lifter) -> Element:
    x, condition, value = node.args
    if _is_weight(replaced := _without_nan(condition, value, x, index, ctx)):
        return replaced
    x, condition, value = (ctx.operand(a, index) for a in (x, condition, value))
    condition = truth(condition)
    if _is_bool(node):
        return _choose(condition, truth(value), truth(x))
    return where(condition, number(value), number(x))


@element_of(torch.ops.fa3_shadow.stop.default)
def _(node, index, ctx: Lifter) -> Element:
    if node not in ctx.inside:
        raise Opaque(node, "a value that the program holds constant")
    raise Decline(
        "gradient-stopped",
        None,
        "Leave detach() and no_grad() out of the attention, or take its whole under no_grad().",
        message="the scores or weights are detached between the two products",
    )


@element_of(torch.ops.fa3_shadow.dropout.default)
def _(node, index, ctx: Lifter) -> Element:
    if node not in ctx.inside:
        raise Opaque(node, "dropout")
    if not ctx.weighs:
        raise Decline(
            "dropout-of-scores",
            None,
            "Drop the weights after the softmax.",
            message="the scores are dropped before the softmax",
        )
    element = ctx.broadcast(node.args[0], index)
    return element * dropout_weight(ctx.seed(node), float(node.args[1]))


@element_of(aten.nan_to_num.default)
def _(node, index, ctx: Lifter) -> Element:
    x = ctx.operand(node.args[0], index)
    nan, high, low = (*node.args[1:], *[None] * (4 - len(node.args)))
    if not _is_weight(x):
        if x.has(prob):
            raise Opaque(node, "NaN and infinities of changed weights replaced")
        limits = torch.finfo(node.meta["val"].dtype)
        high = limits.max if high is None else high
        low = limits.min if low is None else low
        return finite(number(x), sym(high), sym(low))
    if nan not in (None, 0, 0.0):
        raise Opaque(node, "NaN rows of the softmax replaced by something else than zeros")
    # A softmax is NaN in rows of -inf alone, and nowhere infinite.
    ctx.zeroed |= x.atoms(prob)
    return x


def finite(x: Expr, high: Expr, low: Expr) -> Expr:
    """The expression with its infinite constants replaced."""
    if x == sympy.oo:
        return high
    if x == -sympy.oo:
        return low
    if isinstance(x, where):
        return where(x.args[0], finite(x.args[1], high, low), finite(x.args[2], high, low))
    if isinstance(x, sympy.Add):
        # A finite score beside the lowest number is the lowest number.
        return sympy.Add(*(finite(part, high, low) for part in x.args))
    return x


# The largest n such that every integer up to n is exact in the type.
EXACT_INTEGERS = {torch.bfloat16: 256, torch.float16: 2048, torch.float32: 1 << 24}


@element_of(aten._to_copy.default, torch.ops.prims.convert_element_type.default)
def _(node, index, ctx: Lifter) -> Element:
    x = ctx.operand(node.args[0], index)
    target = node.meta["val"].dtype
    # vmap casts the Python numbers that it meets.
    number_cast = not isinstance(node.args[0], fx.Node)
    source = target if number_cast else node.args[0].meta["val"].dtype
    if target == torch.bool:
        return truth(x)
    x = number(x)
    if target.is_complex or source.is_complex:
        raise Opaque(node, "complex numbers")
    if not target.is_floating_point:
        return through_where(E.trunc, x) if source.is_floating_point else x
    if not source.is_floating_point and target in EXACT_INTEGERS:
        limits = bounds(x, ctx.ranges)
        widest = max((abs(v) for v in limits), default=0) if _numeric(limits) else None
        depends = bool(x.free_symbols) and not isinstance(x, (where, E.load))
        if depends and (widest is None or widest > EXACT_INTEGERS[target]):
            if target != torch.float32 or widest is not None:
                raise Opaque(node, f"positions rounded to {target}")
    return rounded(x, target)


def _numeric(limits) -> bool:
    return limits is not None and all(v.is_Integer for v in limits)


def rounded(x: Expr, dtype: torch.dtype) -> Expr:
    """Constants as the type holds them: finfo(float32).min is -inf in bfloat16."""
    if x.is_number and not x.is_Integer and not x.is_infinite and x.is_real:
        value = torch.tensor(float(x), dtype=torch.float64).to(dtype).item()
        if math.isinf(value):
            return sympy.oo if value > 0 else -sympy.oo
        exact = abs(float(x)) < 1e4
        return x if exact else sym(value)
    if isinstance(x, where):
        return where(x.args[0], rounded(x.args[1], dtype), rounded(x.args[2], dtype))
    return x


@element_of(
    aten.clone.default,
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
