"""What stands around the operator, as tensor operations: factors on queries and on the output, and
weights that V has beside the softmax."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.dynamo.graph import example_value
from fa3_compile.frontend.lift.captured import Captured, Seed
from fa3_compile.frontend.lift.lift import sym
from fa3_compile.frontend.lift.placeholders import ANY_KEY, ROW_SUM, held, over_keys
from fa3_compile.frontend.region import Region
from fa3_compile.frontend.rewrite.emit import Emitter
from fa3_compile.spec import expr as E
from fa3_compile.spec.expr import Expr
from fa3_compile.spec.index import same

FUNCTIONS: dict[type, Callable] = {
    sympy.exp: torch.exp,
    sympy.log: torch.log,
    sympy.tanh: torch.tanh,
    sympy.sin: torch.sin,
    sympy.cos: torch.cos,
    sympy.Abs: torch.abs,
    sympy.sign: torch.sign,
    sympy.floor: torch.floor,
    sympy.Max: torch.maximum,
    sympy.Min: torch.minimum,
    sympy.Add: torch.add,
    sympy.Mul: torch.mul,
    sympy.And: torch.logical_and,
    sympy.Or: torch.logical_or,
    sympy.Not: torch.logical_not,
    sympy.Lt: torch.lt,
    sympy.Le: torch.le,
    sympy.Gt: torch.gt,
    sympy.Ge: torch.ge,
    sympy.Eq: torch.eq,
    sympy.Ne: torch.ne,
    E.erf: torch.erf,
    E.sigmoid: torch.sigmoid,
    E.trunc: torch.trunc,
    E.floordiv: torch.floor_divide,
    E.mod: torch.remainder,
    E.bitwise_and: torch.bitwise_and,
    E.bitwise_or: torch.bitwise_or,
    E.bitwise_xor: torch.bitwise_xor,
    E.left_shift: torch.bitwise_left_shift,
    E.right_shift: torch.bitwise_right_shift,
    E.where: torch.where,
}
BROADCAST = (sympy.Add, sympy.Mul, sympy.Max, sympy.Min, sympy.And, sympy.Or)


def coefficient(emit: Emitter, region: Region, pair: fx.Node, device: torch.device) -> fx.Node:
    """The op's out [B, H, Sq, Dv], of its outputs `pair`, times the region's coefficient where its
    rows stay, in out's dtype."""
    out = emit.function(operator.getitem, pair, 0)
    writer = _Writer(emit, region, region.coefficient_loads, device, pair)
    if not region.columns_of_ones:
        out = _times(emit, out, region.coefficient, writer)
        return _rows_kept(emit, region, out, pair, writer)
    # The program has filled rows before it adds up what is in them.
    out = _rows_kept(emit, region, out, pair, writer)
    width = emit.size(region.layout.total(region.layout.head_dim))
    writer.sums = emit.call("narrow", out, -1, width, 1)
    return _times(emit, emit.call("narrow", out, -1, 0, width), region.coefficient, writer)


def _rows_kept(
    emit: Emitter, region: Region, out: fx.Node, pair: fx.Node, writer: _Writer
) -> fx.Node:
    if region.rows == sympy.true:
        return out
    if region.nan_rows:
        lse = emit.call("unsqueeze", emit.function(operator.getitem, pair, 1), 3)
        out = emit.function(torch.where, emit.function(torch.isneginf, lse), float("nan"), out)
    return emit.function(torch.where, writer.write(region.rows), out, 0.0)


def with_beside(
    emit: Emitter, region: Region, out: fx.Node, value: fx.Node, device: torch.device
) -> fx.Node:
    """out [B, H, Sq, Dv] plus V [B, Hkv, Skv, Dv] weighed by what stands beside the softmax."""
    if region.beside == 0:
        return out
    writer = _Writer(emit, region, region.coefficient_loads, device)
    layout = region.layout
    heads, group = layout.total(layout.kv_heads), layout.total(layout.group)
    shape = [layout.total(layout.batch), heads * group, layout.total(layout.query)]
    keys = region.key_length
    if not E.depends_on(region.beside, [E.KV]):
        keys, value = sympy.S.One, emit.call("sum", value, -2, True)
    # Expanded first: the gradient is added up over batch and heads before it is rounded.
    weights = writer.write(region.beside)
    weights = emit.call("expand", weights, [emit.size(x) for x in (*shape, keys)])
    weights = emit.call("type_as", weights, value)
    weights = emit.call("unflatten", weights, 1, [emit.size(heads), emit.size(group)])
    added = emit.function(torch.matmul, weights, emit.call("unsqueeze", value, 2))
    return emit.function(operator.add, out, emit.call("flatten", added, 1, 2))


def about_its_mean(emit: Emitter, region: Region, value: fx.Node) -> fx.Node:
    """V [B, Hkv, Skv, Dv] less its mean over the keys, where what stands beside the softmax takes
    off each row what the softmax adds up to: (softmax - 1/n) V is the same of any V - c, and two
    large products that cancel where c is left in."""
    spec, constant = region.spec, not E.depends_on(region.beside, E.COORDINATES)
    adds_up = spec.normalized and spec.weight is None and not spec.sinks and spec.dead != "zero"
    if not (constant and adds_up) or region.rows != sympy.true or len(region.pairs) > 1:
        return value
    total = sympy.expand(region.coefficient + region.beside * region.key_length)
    if region.beside == 0 or not total.is_number or abs(total) > 1e-12:
        return value
    mean = emit.call("mean", emit.call("detach", value), -2, True)
    return emit.function(operator.sub, value, emit.call("nan_to_num", mean, 0.0, 0.0, 0.0))


def scaled_queries(
    emit: Emitter, region: Region, queries: fx.Node, factor: Expr, device: torch.device
) -> fx.Node:
    """Queries [B, H, Sq, D] times one of the region's factors on them, in their dtype."""
    return _times(emit, queries, factor, _Writer(emit, region, region.factor_loads, device))


def _times(emit: Emitter, x: fx.Node, factor: Expr, writer: _Writer) -> fx.Node:
    if factor == 1:
        return x
    if factor.is_number:
        return emit.function(torch.mul, x, float(factor))
    divisors = [y.base for y in sympy.Mul.make_args(factor) if y.is_Pow and y.exp == -1]
    rest = factor * sympy.Mul(*divisors)
    found = x
    # The gradient of 1 / x is of 1 / x**2, which vanishes where x is large.
    for divisor in divisors:
        found = emit.function(torch.div, found, writer.write(divisor))
    if rest != 1:
        found = emit.function(torch.mul, found, writer.write(rest))
    return emit.call("type_as", found, x)


class _Writer:
    """Writes an expression as tensors that broadcast against [B, H, Sq, Skv].

    pair  the op's outputs: out, and the sums of rows [B, H, Sq] that an expression may have
    sums  those sums [B, H, Sq, 1], where they are columns of out
    """

    sums: fx.Node | None = None

    def __init__(
        self,
        emit: Emitter,
        region: Region,
        loads: Sequence[Captured | Seed],
        device: torch.device,
        pair: fx.Node | None = None,
    ):
        self.emit, self.region, self.pair, self.device = emit, region, pair, device
        wide = example_value(region.value.source).dtype == torch.float64
        self.float = torch.float64 if wide else torch.float32
        self.loads = loads
        layout = region.layout
        self.lengths = {
            E.B: layout.total(layout.batch),
            E.H: layout.total(layout.kv_heads) * layout.total(layout.group),
            E.Q: layout.total(layout.query),
            E.KV: region.key_length,
        }
        self.lengths[ANY_KEY] = self.lengths[E.KV]

    def write(self, expr: Expr | Boolean):
        """The expression as a node or, of numbers alone, as a number."""
        if expr in (sympy.true, sympy.false):
            return self._tensor(bool(expr))
        if expr.is_Integer:
            return self._tensor(int(expr))
        if expr.is_number:
            return self._tensor(float(expr), self.float)
        if expr in self.lengths:
            return self._position(expr)
        if expr == ROW_SUM and self.sums is not None:
            return self.emit.call("to", self.sums, self.float)
        if expr == ROW_SUM:
            return self.emit.call(
                "unsqueeze", self.emit.function(operator.getitem, self.pair, 1), 3
            )
        if expr.is_Symbol:
            return self._tensor(self.emit.size(expr))
        if isinstance(expr, E.load):
            return self._load(expr)
        if isinstance(expr, held):
            return self.emit.call("detach", self.write(expr.args[0]))
        if isinstance(expr, over_keys):
            return self.emit.call("sum", self.write(expr.args[0]), -1, True)
        if isinstance(expr, sympy.Pow):
            base, power = self.write(expr.base), self.write(expr.exp)
            if not (expr.exp.is_Integer and expr.exp.is_positive):
                # Of integers, torch.pow(2, -1) is 0.
                base = self.emit.call("to", base, self.float)
            return self._call(torch.pow, base, power)
        if type(expr) not in FUNCTIONS:
            raise Decline(
                "coefficient-unclear",
                self.region.output,
                "Multiply the attention's output instead of its weights.",
                message=f"no tensor operation for {type(expr).__name__} in {expr}",
            )
        function = FUNCTIONS[type(expr)]
        args = [self.write(x) for x in expr.args]
        if not isinstance(expr, BROADCAST):
            return self._call(function, *args)
        total = args[0]
        for arg in args[1:]:
            total = self._call(function, total, arg)
        return total

    def _call(self, function: Callable, *args) -> fx.Node:
        return self.emit.function(function, *args)

    def _tensor(self, value, dtype: torch.dtype | None = None) -> fx.Node:
        # Without axes, so that it leaves the others' types alone.
        return self.emit.function(torch.tensor, value, dtype=dtype, device=self.device)

    def _position(self, coordinate) -> fx.Node:
        length = self.emit.size(self.lengths[coordinate])
        x = self.emit.function(torch.arange, length, device=self.device)
        axis = _axis(coordinate)
        return self.emit.call("view", x, [-1 if d == axis else 1 for d in range(4)])

    def _load(self, x: E.load) -> fx.Node:
        captured = self.loads[x.tensor]
        assert isinstance(captured, Captured)
        tensor = self.emit.captured(captured, self.device)
        wide = self.float if captured.dtype.is_floating_point else torch.int64
        if captured.dtype not in (torch.bool, wide):
            # What is computed of it is not rounded further than the output, nor does it wrap.
            tensor = self.emit.call("to", tensor, wide)
        coordinates = [i for i in x.index if not i.is_Integer]
        if len({*coordinates}) == len(coordinates) and all(i in self.lengths for i in coordinates):
            return self._view(tensor, x.index)
        places = tuple(self.write(i) for i in x.index)
        return self.emit.call("__getitem__", tensor, places)

    def _view(self, tensor: fx.Node, index: Sequence[Expr]) -> fx.Node:
        """A tensor read at coordinates, each once: a view, whose gradient adds nothing up."""
        axes = []
        for i in index:
            if i.is_Integer:
                tensor = self.emit.call("select", tensor, len(axes), int(i))
                continue
            length = self.lengths[i]
            if not same(sym(example_value(tensor).shape[len(axes)]), length):
                tensor = self.emit.call("narrow", tensor, len(axes), 0, self.emit.size(length))
            axes.append(_axis(i))
        if axes != sorted(axes):
            tensor = self.emit.call(
                "permute", tensor, sorted(range(len(axes)), key=axes.__getitem__)
            )
        for d in range(4) if axes else ():
            tensor = self.emit.call("unsqueeze", tensor, d) if d not in axes else tensor
        return tensor


def _axis(coordinate: Expr) -> int:
    return (E.B, E.H, E.Q, E.KV).index(E.KV if coordinate == ANY_KEY else coordinate)
