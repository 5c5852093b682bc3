"""The shadow: a functional core-aten copy of a Dynamo graph, made only to be read.

The Dynamo graph speaks methods, functions, in-place operators and autocast regions; its shadow
says the same in one small functional vocabulary. Every Dynamo node's value is followed into the
shadow, as one of its outputs, so that what is found there can be spliced into the graph that
Dynamo gave. Nothing here changes that graph.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import rebind_unbacked
from torch.utils._pytree import key_get

from fa3_compile.errors import Decline
from fa3_compile.frontend.dynamo import transforms
from fa3_compile.frontend.dynamo.gradients import stops
from fa3_compile.frontend.dynamo.graph import (
    computing_fakes,
    example_value,
    storage_of,
    unwrapped,
)
from fa3_compile.frontend.dynamo.mutations import is_mutation, mutated_nodes
from fa3_compile.frontend.dynamo.seeds import seeds
from fa3_compile.frontend.expand import flex
from fa3_compile.frontend.expand.spell_out import SPELLED_OUT
from fa3_compile.frontend.shadow.operators import STOP, UNKNOWN
from fa3_compile.frontend.shadow.scope import Scope, is_subclass, relevant

log = logging.getLogger(__name__)

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
aten = torch.ops.aten
KEPT_WHOLE = (
    aten.baddbmm.default,
    aten.addmm.default,
    aten._safe_softmax.default,
    aten.nan_to_num.default,
    aten.logsumexp.default,
    aten.all.dim,
    aten.hardsigmoid.default,
    aten.hardswish.default,
    aten.sinc.default,
    aten.logaddexp.default,
)
# Of a tensor's shape alone, whatever its elements are.
SIZES = (
    aten.sym_size.int,
    aten.sym_stride.int,
    aten.sym_numel.default,
    aten.sym_storage_offset.default,
)


@dataclass
class Shadow:
    """The functional graph, and which of its nodes holds which Dynamo node's value."""

    graph: fx.Graph
    # A Dynamo node's value once it is made, and every value that it holds at some time.
    aten_of: dict[fx.Node, fx.Node]
    dynamo_of: dict[fx.Node, list[fx.Node]]
    # For a value and a holder, the Dynamo node since which it holds it: itself, or a mutation.
    since: dict[tuple[fx.Node, fx.Node], fx.Node]
    # Values that no Dynamo node holds as they are, by the node that makes them: a flex_attention's
    # weights, and what is wrapped by a transform.
    within: dict[fx.Node, fx.Node] = field(default_factory=dict)
    # Attention that cannot be read at all.
    declined: list[Decline] = field(default_factory=list)

    def users(self, node: fx.Node) -> list[fx.Node]:
        """The readers of a shadow node's elements: questions of sizes left out."""
        return [user for user in node.users if user.target not in SIZES]


def shadow(gm: fx.GraphModule) -> Shadow | None:
    """The shadow of the part of `gm` that attention can be made of; None if there is none."""
    if not seeds(gm.graph):
        return None
    scope = Scope(gm)
    while True:
        try:
            with transforms.nesting_restored():
                return _shadow(gm, scope)
        except _Unreadable as unreadable:
            log.info("%s cannot be read", unreadable.node, exc_info=True)
            scope.cut_out(unreadable.node, str(unreadable))


class _Unreadable(Exception):
    """A call that the shadow cannot run."""

    def __init__(self, node: fx.Node, why: str):
        super().__init__(why)
        self.node = node


def _shadow(gm: fx.GraphModule, scope: Scope) -> Shadow:
    keep = relevant(gm.graph, scope)
    cuts = [n for n in gm.graph.nodes if n in keep and scope.is_cut(n)]
    cuts = [n for n in cuts if _is_value(example_value(n)) and not transforms.is_wrapped(n)]
    cuts = [n for n in cuts if not is_subclass(example_value(n))]
    # Asked while the program's own gradient mode is on, which the analysis turns off.
    stopping = stops(gm.graph)
    marks = _Marks()

    values = _told_apart(cuts)
    # Dynamo's values live in a mode of their own, older than TracingContext's.
    fake_mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    shape_env = fake_mode.shape_env if fake_mode is not None else None

    def run(*values):
        cut_values = dict(zip(cuts, values, strict=True))
        # `boxed_run` and `run` want one argument a placeholder; cut values stand in for them.
        return _Reader(gm, scope, keep, cut_values, marks, stopping, shape_env).run_cut()

    with _analysis_only(fake_mode):
        traced = make_fx(
            dispatch_functionalize(run),
            decomposition_table=_decompositions(),
            _allow_non_fake_inputs=True,
        )(*values)
    return _connect(traced, cuts, marks, scope.declined)


def _told_apart(cuts: list[fx.Node]) -> list:
    """The cuts' values, one for each input: the backward of an autograd function is given its
    result's as that of the gradient."""
    values: dict[fx.Node, Any] = {}
    given: set[int] = set()
    for node in cuts:
        value = example_value(node)
        if isinstance(value, torch.Tensor) and node.op == "placeholder":
            if id(value) in given:
                value = value.new_empty_strided(value.shape, value.stride())
            given.add(id(value))
        values[node] = value
    return [*values.values()]


@functools.cache
def _decompositions() -> dict:
    table = dict(torch._decomp.core_aten_decompositions())
    # Kept whole: what is known of them is shorter than what they decompose into, and torch
    # versions differ in which they decompose.
    for op in KEPT_WHOLE:
        table.pop(op, None)
    table[aten.linalg_vector_norm.default] = _sum_of_sizes
    for op in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        table[op] = functools.partial(_filled, table[op])
    return table


def _filled(decomposed, x, mask, value):
    """As it is decomposed, in the strides of what is filled: a fill in place is written back to
    what that is a view of, which has to be a view of the result."""
    found = decomposed(x, mask, value)
    if found.shape != x.shape or found.stride() == x.stride():
        return found
    return torch.ops.prims.copy_strided(found, x.stride())


def _sum_of_sizes(x, ord=2, dim=None, keepdim=False, *, dtype=None):
    """The 1-norm as the sum that it is, so that what it normalises is seen; others are kept."""
    if ord != 1 or dim is None or dtype not in (None, x.dtype):
        return NotImplemented
    return x.abs().sum(dim, keepdim)


@contextlib.contextmanager
def _analysis_only(fake_mode) -> Iterator[None]:
    """No gradients, Dynamo's own fake mode, and every global mode restored afterwards."""
    context = TracingContext.try_get()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if context is not None and fake_mode is not None:
            stack.enter_context(TracingContext.patch(fake_mode=fake_mode))
        if fake_mode is not None:
            stack.enter_context(computing_fakes(fake_mode))
            if fake_mode.shape_env is not None:
                stack.enter_context(fake_mode.shape_env.ignore_fresh_unbacked_symbols())
        grad = torch.is_grad_enabled()
        try:
            yield
        finally:
            torch.set_grad_enabled(grad)


@dataclass
class _Marks:
    """Which Dynamo nodes hold the outputs of the shadow."""

    # (a Dynamo node, the node since which it holds the output, whether that is only a part of it)
    held: list[tuple[fx.Node, fx.Node, bool]] = field(default_factory=list)
    made: list[torch.Tensor] = field(default_factory=list)

    def add(self, value: torch.Tensor, holder: fx.Node, at: fx.Node, *, within=False) -> None:
        inner = unwrapped(value)
        self.made.append(_as_it_is_now(inner))
        self.held.append((holder, at, within or inner is not value))


def _as_it_is_now(value: torch.Tensor) -> torch.Tensor:
    """The value that functionalisation has for a tensor, which later writes leave as it is."""
    if not isinstance(value, FunctionalTensor):
        return value
    torch._sync(value)  # pyright: ignore[reportPrivateImportUsage]
    return torch._from_functional_tensor(value.elem)  # pyright: ignore


class _Reader(fx.Interpreter):
    """Runs the relevant nodes of the Dynamo graph on fakes, marking every tensor they make."""

    def __init__(self, gm, scope, keep, cut_values, marks, stopping, shape_env):
        super().__init__(gm, garbage_collect_values=False)
        self.scope, self.keep, self.cut_values = scope, keep, cut_values
        self.shape_env = shape_env
        self.marks, self.stopping = marks, stopping

    def run_cut(self):
        for node in self.module.graph.nodes:
            if node in self.cut_values:
                self.env[node] = self.cut_values[node]
            if node not in self.keep or node.op == "output":
                continue
            cut = self.scope.is_cut(node)
            written = self._written_by(node) if is_mutation(node) else []
            if cut:
                for changed in written and mutated_nodes(node):
                    _make_unknown(self.env.get(changed))
            else:
                self.env[node] = self.run_node(node)
                self._keep_symbols(node)
                written = [node, *written]
            for changed in written:
                value = self.env.get(changed)
                if isinstance(value, torch.Tensor):
                    self.marks.add(value, changed, node)
            if node in self.stopping:
                stopped = self.env[node] = STOP(self.env[node])
                self.marks.add(stopped, node, node)
        return self.marks.made

    def run_node(self, n: fx.Node):
        try:
            if not flex.is_call(n):
                return super().run_node(n)
            call = flex.call_of(n, self.module, self.env)
            outputs, weights = flex.spelled_out(call, STOP)
        except Exception as error:
            if n.op not in ("call_function", "call_method"):
                raise
            raise _Unreadable(n, f"{type(error).__name__}: {error}".split("\n")[0]) from error
        self.marks.add(weights, n, n, within=True)
        return outputs

    def _keep_symbols(self, node: fx.Node) -> None:
        """Gives numbers that were read from a tensor the symbols that Dynamo has for them.

        A fake tensor that Dynamo read too remembers its own; one that was made here does not.
        """
        bindings = node.meta.get("unbacked_bindings") or {}
        read = [(symbol, key_get(self.env[node], path)) for symbol, path in bindings.items()]
        if all(isinstance(x, SYMBOLIC) and x.node._expr != symbol for symbol, x in read):
            rebind_unbacked(self.shape_env, node, self.env[node])

    def _written_by(self, mutation: fx.Node) -> list[fx.Node]:
        """The nodes whose values a mutation changes, through whatever view."""
        storages = {storage_of(n) for n in mutated_nodes(mutation)} - {None}
        return [n for n in self.env if n is not mutation and storage_of(n) in storages]

    def call_function(self, target: Callable, args, kwargs):
        return super().call_function(SPELLED_OUT.get(target, target), args, kwargs)


def _make_unknown(value) -> None:
    """Writes what nothing is known of to a tensor, as a call that is not looked into does."""
    if isinstance(value, torch.Tensor):
        # Elements of one address take one write.
        layout = zip(value.shape, value.stride(), strict=True)
        once = tuple(slice(0, 1 if stride == 0 else None) for _, stride in layout)
        value[once].copy_(UNKNOWN(value[once]))


def _is_value(value) -> bool:
    return isinstance(value, (torch.Tensor, *SYMBOLIC))


def _connect(
    traced: fx.GraphModule, cuts: list[fx.Node], marks: _Marks, declined: list[Decline]
) -> Shadow:
    graph = traced.graph
    # What functionalisation made of an alias that nobody reads would count as a second reader.
    graph.eliminate_dead_code()
    aten_of: dict[fx.Node, fx.Node] = {}
    dynamo_of: dict[fx.Node, list[fx.Node]] = {}
    since: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
    within: dict[fx.Node, fx.Node] = {}
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    held = [(aten, dynamo, dynamo) for dynamo, aten in zip(cuts, placeholders, strict=True)]
    output = graph.output_node()
    for aten, (dynamo, at, is_part) in zip(output.args[0], marks.held, strict=True):
        if is_part:
            within.setdefault(aten, dynamo)
        else:
            held.append((aten, dynamo, at))
    output.args = ((),)  # no reader of them
    order = {node: i for i, node in enumerate(cuts[0].graph.nodes)} if cuts else {}
    for aten, dynamo, at in sorted(held, key=lambda x: (order.get(x[2], 0), order.get(x[1], 0))):
        aten_of.setdefault(dynamo, aten)
        if dynamo not in dynamo_of.setdefault(aten, []):
            dynamo_of[aten].append(dynamo)
            since[aten, dynamo] = at
    return Shadow(graph, aten_of, dynamo_of, since, within, declined)
