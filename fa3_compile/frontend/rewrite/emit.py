"""Writing a region as torch-level calls: its operands, captured tensors, outputs."""

from __future__ import annotations

import operator
from collections.abc import Callable

import sympy
import torch
from torch import fx
from torch.utils._sympy.symbol import SymT, symbol_is_type
from torch.utils.checkpoint import CheckpointPolicy

from fa3_compile.errors import Decline
from fa3_compile.frontend.detect.logsumexp import Lse
from fa3_compile.frontend.dynamo.gradients import has_gradient
from fa3_compile.frontend.dynamo.graph import (
    computing_fakes,
    example_value,
    target_name,
    unwrapped,
)
from fa3_compile.frontend.lift.captured import Arranged, Captured, Diagonals, Seed
from fa3_compile.frontend.lift.lift import sym
from fa3_compile.frontend.lift.placeholders import D
from fa3_compile.frontend.region import Layout, Operand, Region
from fa3_compile.spec.expr import KV, Expr, floordiv, mod

SIZES_OF_TWO = {
    floordiv: operator.floordiv,
    mod: operator.mod,
    sympy.Max: torch.sym_max,
    sympy.Min: torch.sym_min,
}
MOST_SEEDS = 2**63 - 1


class Emitter:
    """Writes torch-level calls before one node."""

    def __init__(self, graph: fx.Graph, before: fx.Node, like: torch.Tensor):
        """`like` is a tensor of the graph, whose fake mode new tensors are made in."""
        self.graph, self.before = graph, before
        self.fake_mode = getattr(unwrapped(like), "fake_mode", None)
        self.seeds: dict[Seed, fx.Node] = {}

    def call(self, method: str, x, *args) -> fx.Node:
        node = self.graph.call_method(method, (x, *args))
        return self._valued(node, lambda x, *args: getattr(x, method)(*args))

    def function(self, target: Callable, *args, **kwargs) -> fx.Node:
        return self._valued(self.graph.call_function(target, args, kwargs), target)

    def _valued(self, node: fx.Node, run: Callable) -> fx.Node:
        """The node with a value as Dynamo's have, which AOTAutograd's cache asks for."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), example_value)
        with torch.no_grad(), computing_fakes(self.fake_mode):
            node.meta["example_value"] = run(*args, **kwargs)
        return node

    def size(self, size: Expr):
        """A size as an int, or as nodes that compute it from tensors of the program."""
        if size.is_Integer:
            return int(size)
        if size.is_Symbol:
            return self._symbol(size)
        if isinstance(size, sympy.Pow) and size.exp.is_Integer and size.exp > 0:
            # Two dynamic dimensions that were equal while tracing.
            return self.size(sympy.Mul(*[size.base] * int(size.exp), evaluate=False))
        if isinstance(size, (sympy.Add, sympy.Mul)):
            combine = operator.add if isinstance(size, sympy.Add) else operator.mul
            total = self.size(size.args[0])
            for arg in size.args[1:]:
                other = self.size(arg)
                if isinstance(total, int) and isinstance(other, int):
                    total = combine(total, other)
                else:
                    total = self.function(combine, total, other)
            return total
        if type(size) in SIZES_OF_TWO and len(size.args) == 2:
            return self.function(SIZES_OF_TWO[type(size)], *map(self.size, size.args))
        raise Decline(
            "size-unclear",
            self.before,
            "Take sizes from the shapes of tensors.",
            message=f"no tensor has the size {size}",
        )

    def _symbol(self, symbol):
        for node in self.graph.nodes:
            if node is self.before:
                break
            value = example_value(node)
            if isinstance(value, torch.SymInt) and (times := _multiple(value, symbol)):
                return self._divided(node, times)
            if isinstance(value, torch.Tensor):
                for d, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt) and (times := _multiple(size, symbol)):
                        return self._divided(self.call("size", node, d), times)
        raise Decline(
            "size-unclear",
            self.before,
            "Take sizes from the shapes of tensors.",
            message=f"no tensor has the size {symbol}",
        )

    def _divided(self, size: fx.Node, by: int) -> fx.Node:
        return size if by == 1 else self.function(operator.floordiv, size, by)

    def captured(self, x: Captured | Seed, device: torch.device) -> fx.Node:
        """What a load reads, on the attention's device."""
        if isinstance(x, Seed):
            # Terms that one dropout was applied to lose the same elements.
            if x not in self.seeds:
                self.seeds[x] = self.seed(x, device)
            return self.seeds[x]
        if x.arranged is not None:
            return self._arranged(self.captured(x._replace(arranged=None), device), x.arranged)
        if x.diagonals is not None:
            vector = self._by_distance(x, x.diagonals)
            same = example_value(vector).device == device
            return vector if same else self.call("to", vector, device)
        if x.places is not None:
            at = self.captured(x.places, device)
            table = self.captured(Captured(x.source, x.since), device)
            kept = example_value(table).dtype
            # Most distances share a row; its gradient would be added up in 16 bits, by atomics that
            # wait for each other.
            is_wide = not has_gradient(table) or kept not in (torch.float16, torch.bfloat16)
            table = table if is_wide else self.call("to", table, torch.float32)
            rows = self.function(operator.getitem, table, (*[slice(None)] * x.dim, at))
            rows = rows if is_wide else self.call("to", rows, kept)
            return self.call("contiguous", self.call("movedim", rows, x.dim, -1))
        value = example_value(x.source)
        number = _changing_float(x.source)
        if number is not None:
            one = self.function(torch.ones, (), dtype=value.dtype, device=device)
            return self.function(operator.mul, one, number)
        if value.device == device:
            return x.source
        if value.dim() == 0 and value.device.type == "cpu":
            return self.call("to", x.source, device)
        raise Decline(
            "mixed-devices",
            x.source,
            f"Move it to {device}.",
            message=f"{x.source} is on {value.device}, q on {device}",
        )

    def _arranged(self, x: fx.Node, how: Arranged) -> fx.Node:
        if how.split is not None:
            d, *sizes = how.split
            x = self.call("unflatten", x, d, [self.size(n) for n in sizes])
        if how.order is None:
            return x
        return self.call("contiguous", self.call("permute", x, how.order))

    def _by_distance(self, x: Captured, diagonals: Diagonals) -> fx.Node:
        """What is read of a tensor that is the same along its diagonals: made once for all that
        read it, where the tensor is."""
        name = f"{x.source} since {x.since}, {diagonals}"
        for node in self.graph.nodes:
            if node.meta.get("by_distance") == name:
                return node
        i, j, idle = diagonals
        with self.graph.inserting_before(max(x.source, x.since).next):
            held = x.source
            for d in sorted(idle, reverse=True):
                held = self.call("select", held, d, 0)
            held = self.call(
                "movedim", held, [d - sum(k < d for k in idle) for d in (i, j)], [-2, -1]
            )
            rows, columns = (self.call("size", held, d) for d in (-2, -1))
            device = example_value(held).device
            last = self.function(operator.sub, rows, 1)
            at = self.function(
                torch.arange, self.function(operator.add, last, columns), device=device
            )
            after = self.function(operator.sub, at, last)
            places = [self.call("clamp", self.call("neg", after), 0), self.call("clamp", after, 0)]
            # One gather, into which Inductor writes what the tensor is made of.
            vector = self.function(operator.getitem, held, (..., *places))
        vector.meta["by_distance"] = name
        return vector

    def seed(self, seed: Seed, device: torch.device) -> fx.Node:
        """An int64 [1], drawn where the program drew its dropout."""
        early = seed.dropout is not None and seed.dropout < self.before
        with self.graph.inserting_before(seed.dropout if early else self.before):
            drawn = self.function(torch.randint, MOST_SEEDS, (1,), dtype=torch.int64, device=device)
        # Otherwise the partitioner may draw another one in the backward, where a memory budget
        # makes it compute again whatever is cheap.
        drawn.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        return drawn

    def operand(self, operand: Operand, target: tuple[list, ...], sizes) -> fx.Node:
        """The operand as a tensor whose dimensions are the target's groups of axes, with what is
        behind it along its keys."""
        if not operand.behind:
            return self._part(operand, target, sizes)
        parts = [self._part(x, target, {**sizes, KV: x.length}) for x in operand.parts]
        return self.function(torch.cat, parts, target.index([KV]))

    def _part(self, operand: Operand, target: tuple[list, ...], sizes) -> fx.Node:
        x = operand.source
        view = operand.view
        if operand.place.cast is not None:
            x = self.call("to", x, operand.place.cast)
        if view.merged is not None:
            x = self.call("flatten", x, *view.merged)
        for dim, shape in reversed(view.splits):
            # Splits are recorded by their place in `parts`; later ones first keeps places valid.
            x = self.call("unflatten", x, _dim_before(view, dim), [self.size(n) for n in shape])
        symbols: list = []
        dim = 0
        for part in view.parts:
            if part[0] == "select":
                x = self._at(x, dim, part[1])
                continue
            axis, start = part[1], part[2]
            if start is not None:
                x = self.call("narrow", x, dim, self.size(start), self.size(axis.size))
            symbols.append(axis.symbol)
            dim += 1
        wanted = [a for group in target for a in group]
        order = [symbols.index(a) for a in wanted if a in symbols]
        if order != list(range(len(order))):
            x = self.call("permute", x, order)
        missing = [i for i, a in enumerate(wanted) if a not in symbols]
        for i in missing:
            x = self.call("unsqueeze", x, i)
        if missing:
            x = self.call(
                "expand",
                x,
                *[self.size(sizes[a]) if i in missing else -1 for i, a in enumerate(wanted)],
            )
        return self._grouped(x, target, sizes)

    def _at(self, x: fx.Node, dim: int, position: Expr) -> fx.Node:
        """One position of a dimension. Where that is all of it, as in a batch of one, a view whose
        gradient is a view: that of select is a copy among zeros."""
        length = example_value(x).shape[dim]
        if isinstance(length, int) and length == 1:
            return self.call("squeeze", x, dim)
        return self.call("select", x, dim, self.size(position))

    def _grouped(self, x, target, sizes):
        """One dimension a group: groups of several axes merged, empty ones added."""
        if any(len(group) > 1 for group in target):
            shape = [
                self.size(sympy.Mul(*(sizes.get(a, -1) for a in group))) if group != [D] else -1
                for group in target
            ]
            return self.call("reshape", x, shape)
        for i, group in enumerate(target):
            if not group:
                x = self.call("unsqueeze", x, i)
        return x

    def beside(self, parts: list[fx.Node], zeros: int) -> fx.Node:
        """Operands side by side along d, and some zeros."""
        x = self.function(torch.cat, parts, -1)
        return self.function(torch.nn.functional.pad, x, (0, zeros)) if zeros else x

    def statistic(self, pair: fx.Node, statistic: Lse, region: Region) -> fx.Node:
        """The LSE [B, H, Sq] in the shape, type and unit of the node that it replaces."""
        layout, value = region.layout, example_value(statistic.node)
        flat = [*layout.batch, *layout.kv_heads, *layout.group, *layout.query]
        x = self.function(operator.getitem, pair, 1)
        x = self.call("reshape", x, [self.size(layout.size[a]) for a in flat] or [1])
        wanted = [a for axes in statistic.dims for a in axes]
        x = self.call("permute", x, [flat.index(a) for a in wanted]) if wanted != flat else x
        shape = [self.size(sympy.Mul(*(layout.size[a] for a in axes))) for axes in statistic.dims]
        x = self.call("reshape", x, shape)
        if statistic.factor != 1:
            x = self.function(operator.mul, x, statistic.factor)
        return self.call("to", x, value.dtype)

    def output(self, out: fx.Node, region: Region) -> fx.Node:
        """[B, H, Sq, Dv] in the shape of the node that it replaces."""
        layout: Layout = region.layout
        groups = (
            layout.batch,
            [*layout.kv_heads, *layout.group],
            layout.query,
            layout.head_dim,
        )
        flat = [a for group in groups for a in group]
        if [len(g) for g in groups] != [1, 1, 1, 1]:
            out = self.call("reshape", out, [self.size(layout.size[a]) for a in flat] or [1])
        wanted = [a for axes in region.output_axes for a in axes]
        order = [flat.index(a) for a in wanted]
        if order != list(range(len(order))):
            out = self.call("permute", out, order)
        if [len(axes) for axes in region.output_axes] != [1] * len(wanted):
            out = self.call(
                "reshape",
                out,
                [
                    self.size(sympy.Mul(*(layout.size[a] for a in axes)))
                    for axes in region.output_axes
                ],
            )
        return out


def _multiple(size: torch.SymInt, symbol: sympy.Symbol) -> int:
    """How many times the symbol a size is; 0 where it is something else."""
    times, of = sym(size).as_coeff_Mul()
    return int(times) if of == symbol and times.is_Integer else 0


def _changing_float(source: fx.Node) -> fx.Node | None:
    """The number that a Python float is read as, which Dynamo passes as a tensor.

    AOTAutograd has the float compiled in, and the graph compiled again for each value, unless it
    sees the number in arithmetic with a tensor.
    """
    for user in source.users:
        value = example_value(user)
        if target_name(user) == "item" and isinstance(value, torch.SymFloat):
            if all(symbol_is_type(x, SymT.FLOAT) for x in value.node.expr.free_symbols):
                return user
    return None


def _dim_before(view, place: int) -> int:
    """The dimension of the source that a split at `place` in the parts belongs to."""
    dim, at = 0, 0
    widths = {p: len(shape) for p, shape in view.splits}
    while at < place:
        at += widths.get(at, 1)
        dim += 1
    return dim
