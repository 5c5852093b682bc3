"""Splicing one `fa3::attention` node into the Dynamo graph in the place of a region."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import sympy
import torch
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend import flex, transforms
from fa3_compile.frontend.detect import D
from fa3_compile.frontend.dynamo_graph import (
    example_value,
    is_mutation,
    mutated_nodes,
    overwrite,
    storage_of,
    target_name,
)
from fa3_compile.frontend.lift import sym, written_between
from fa3_compile.frontend.logsumexp import Lse
from fa3_compile.frontend.region import Layout, Operand, Region
from fa3_compile.spec.expr import KV, Expr, floordiv


def check(graph: fx.Graph, region: Region) -> None:
    """`Decline` where the rewrite would change what the program computes or keeps."""
    _check_mutations(region)
    _check_interior_dead(graph, region)
    _place(graph, region)


def rewrite(graph: fx.Graph, region: Region, spec_text: str) -> fx.Node:
    """Replaces the region's output by the op; dead nodes are left to `remove_dead`."""
    output = region.output
    place = _place(graph, region)
    with graph.inserting_before(place):
        emit = _Emitter(graph, place)
        layout = region.layout
        heads = [*layout.kv_heads, *layout.group]
        rows = ([*layout.batch], heads, [*layout.query], [D])
        keys = ([*layout.batch], [*layout.kv_heads], [KV], [D])
        values = ([*layout.batch], [*layout.kv_heads], [KV], [*layout.head_dim])
        sizes = {**layout.size, KV: region.key_length}
        q = emit.operand(region.query, rows, sizes)
        k = emit.operand(region.key, keys, sizes)
        v = emit.operand(region.value, values, sizes)
        device = example_value(region.query.source).device
        aux = [emit.on_device(node, device) for node, _ in region.loads]
        numbers = [emit.size(size) for size in region.sizes]
        op = torch.ops.fa3.attention.default
        pair = emit.function(op, q, k, v, aux, numbers, spec_text)
        out = emit.function(operator.getitem, pair, 0)
        result = emit.output(out, region)
        statistics = {x.node: emit.statistic(pair, x, region) for x in region.statistics}
    for replaced, made in {output: result, **statistics}.items():
        made.meta.update(replaced.meta)
        replaced.replace_all_uses_with(made)
    return result


def _place(graph: fx.Graph, region: Region) -> fx.Node:
    """Before which node the op stands: what it replaces, and after any vmap around that."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    replaced = [region.output, *(x.node for x in region.statistics)]
    place = min(replaced, key=order.__getitem__)
    around = [span for span in transforms.spans(graph) if any(n in span.nodes for n in replaced)]
    if around:
        place = around[-1].nodes[-1].next
    operands = (region.query, region.key, region.value)
    read = [*(x.since for x in operands), *(since for _, since in region.loads)]
    late = [n for n in read if order[n] >= order[place]]
    early = [u for n in replaced for u in n.users if order[u] < order[place]]
    if late or early:
        raise Decline(
            "order",
            (late or early)[0],
            "Use the log-sum-exp, and leave vmap, after the attention as a whole.",
            message="a part of the attention is used before the whole can be computed",
        )
    return place


def follow_replacements(region: Region, replaced: dict[fx.Node, fx.Node]) -> None:
    """Reads the results of earlier rewrites in place of what they replaced."""
    for operand in (region.query, region.key, region.value):
        operand.source = replaced.get(operand.source, operand.source)
    region.loads[:] = [(replaced.get(node, node), since) for node, since in region.loads]


def remove_dead(graph: fx.Graph) -> None:
    """Erases what nothing live reads: in-place writes to dead tensors included."""
    live = _live(graph)
    for node in reversed(graph.nodes):
        if node not in live and node.op not in ("placeholder", "output"):
            for user in list(node.users):
                if user in live:
                    raise RuntimeError(f"{user} is live and reads dead {node}")
            graph.erase_node(node)
    transforms.remove_empty(graph)


def _check_mutations(region: Region) -> None:
    """No operand may be written between where it is read in eager and where the op reads it."""
    operands = (region.query, region.key, region.value)
    for source, since in [*((x.source, x.since) for x in operands), *region.loads]:
        written = overwrite(source, since, until=region.output)
        if written is not None:
            raise written_between(source, written)


def _check_interior_dead(graph: fx.Graph, region: Region) -> None:
    """The scores and weights may be used by nothing but the region itself."""
    operands = (region.query, region.key, region.value)
    read = [*(x.source for x in operands), *(node for node, _ in region.loads)]
    statistics = [x.node for x in region.statistics]
    live = _live(graph, without=(region.output, *statistics), read=read)
    region.statistics = [x for x in region.statistics if x.node in live]
    for node in region.interior:
        if node in statistics:
            continue
        if node not in live:
            continue
        reader = next((u for u in node.users if u in live and u not in region.interior), node)
        raise Decline(
            "weights-used",
            reader,
            "Do not return or reuse the attention weights (output_attentions=False).",
            message=f"the scores or weights ({node}) are also used by {target_name(reader)}",
        )


def _live(
    graph: fx.Graph, without: Sequence[fx.Node] = (), read: Sequence[fx.Node] = ()
) -> set[fx.Node]:
    """What the outputs and side effects need, if `without` read `read` instead of their inputs."""
    live: set[fx.Node] = set()
    stack = [*read]
    stack += [n for n in graph.nodes if n.op in ("output", "placeholder") or _has_effect(n)]
    mutations = [n for n in graph.nodes if is_mutation(n)]
    while True:
        while stack:
            node = stack.pop()
            if node in live:
                continue
            live.add(node)
            if node not in without:
                stack.extend(node.all_input_nodes)
        storages = {storage_of(n) for n in live} - {None}
        stack = [
            n
            for n in mutations
            if n not in live
            and any(w in live or storage_of(w) in storages for w in mutated_nodes(n))
        ]
        if not stack:
            return live


def _has_effect(node: fx.Node) -> bool:
    """Whether a node has to stay although nobody reads it. Unknown calls do."""
    if node.op in ("call_module",):
        return True
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return not flex.is_call(node)
    name = target_name(node)
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.namespace not in ("aten", "prims", "fa3") and not node.users
    value = example_value(node)
    stateful = name.startswith(
        ("_enter", "_exit", "_set", "manual_seed", "_log", "set_", "_assert")
    )
    random = "rand" in name or name in ("dropout", "bernoulli", "normal", "multinomial")
    if is_mutation(node):
        return False  # followed to what it writes
    return stateful or random and not _is_idle_dropout(node) or (value is None and not node.users)


def _is_idle_dropout(node: fx.Node) -> bool:
    if target_name(node) != "dropout":
        return False
    p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
    return not training or p == 0


class _Emitter:
    """Writes torch-level calls before one node."""

    def __init__(self, graph: fx.Graph, before: fx.Node):
        self.graph, self.before = graph, before

    def call(self, method: str, x, *args) -> fx.Node:
        node = self.graph.call_method(method, (x, *args))
        return self._valued(node, lambda x, *args: getattr(x, method)(*args))

    def function(self, target, *args) -> fx.Node:
        return self._valued(self.graph.call_function(target, args), target)

    def _valued(self, node: fx.Node, run: Callable) -> fx.Node:
        """The node with a value as Dynamo's have, which AOTAutograd's cache asks for."""
        values = fx.node.map_arg(node.args, example_value)
        with torch.no_grad():
            node.meta["example_value"] = run(*values)
        return node

    def size(self, size: Expr):
        """A size as an int, or as nodes that compute it from tensors of the program."""
        if size.is_Integer:
            return int(size)
        if size.is_Symbol:
            return self._symbol(size)
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
        if isinstance(size, floordiv):
            return self.function(operator.floordiv, *map(self.size, size.args))
        raise Decline("size-unclear", self.before, "", message=f"no tensor has the size {size}")

    def _symbol(self, symbol):
        for node in self.graph.nodes:
            if node is self.before:
                break
            value = example_value(node)
            if isinstance(value, torch.SymInt) and sym(value) == symbol:
                return node
            if isinstance(value, torch.Tensor):
                for d, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt) and sym(size) == symbol:
                        return self.call("size", node, d)
        raise Decline("size-unclear", self.before, "", message=f"no tensor has the size {symbol}")

    def on_device(self, node: fx.Node, device: torch.device) -> fx.Node:
        value = example_value(node)
        if value.device == device:
            return node
        if value.dim() == 0 and value.device.type == "cpu":
            return self.call("to", node, device)
        raise Decline("mixed-devices", node, f"Move it to {device}.")

    def operand(self, operand: Operand, target: tuple[list, ...], sizes) -> fx.Node:
        """The operand as a tensor whose dimensions are the target's groups of axes."""
        x = operand.source
        view = operand.view
        if operand.place.cast is not None:
            x = self.call("to", x, operand.place.cast)
        for dim, shape in reversed(view.splits):
            # Splits are recorded by their place in `parts`; later ones first keeps places valid.
            x = self.call("unflatten", x, _dim_before(view, dim), [self.size(n) for n in shape])
        symbols: list = []
        dim = 0
        for part in view.parts:
            if part[0] == "select":
                x = self.call("select", x, dim, self.size(part[1]))
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


def _dim_before(view, place: int) -> int:
    """The dimension of the source that a split at `place` in the parts belongs to."""
    dim, at = 0, 0
    widths = {p: len(shape) for p, shape in view.splits}
    while at < place:
        at += widths.get(at, 1)
        dim += 1
    return dim
