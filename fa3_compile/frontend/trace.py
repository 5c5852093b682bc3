"""The shadow: a functional core-aten copy of a Dynamo graph, made only to be read.

The Dynamo graph speaks methods, functions, in-place operators and autocast regions; its shadow
says the same in one small functional vocabulary. Every Dynamo node's value is followed into the
shadow by a marker operator, so that what is found there can be spliced into the graph that
Dynamo gave. Nothing here changes that graph.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import rebind_unbacked

from fa3_compile.errors import Decline
from fa3_compile.frontend import flex, transforms
from fa3_compile.frontend.dynamo_graph import (
    example_value,
    opaque_target,
    storage_of,
    target_name,
    unwrapped,
)
from fa3_compile.frontend.gradients import stops
from fa3_compile.frontend.mutations import is_mutation, mutated_nodes
from fa3_compile.frontend.seeds import seeds
from fa3_compile.frontend.shadow_operators import MARK, STOP, UNKNOWN
from fa3_compile.frontend.spell_out import SPELLED_OUT

log = logging.getLogger(__name__)

READABLE = "Write score_mod and mask_mod with element-wise operations and reads of tensors."
aten = torch.ops.aten
KEPT_WHOLE = (
    aten.baddbmm.default,
    aten.addmm.default,
    aten._safe_softmax.default,
    aten.nan_to_num.default,
    aten.logsumexp.default,
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
        """The readers of a shadow node's elements: markers and questions of sizes left out."""
        return [user for user in node.users if user.target not in (MARK, *SIZES)]


def shadow(gm: fx.GraphModule) -> Shadow | None:
    """The shadow of the part of `gm` that attention can be made of; None if there is none."""
    if not seeds(gm.graph):
        return None
    scope = _Scope(gm)
    while True:
        try:
            with transforms.nesting_restored():
                return _shadow(gm, scope)
        except _Unreadable as unreadable:
            log.debug("%s cannot be read", unreadable.node, exc_info=True)
            scope.cut_out(unreadable.node, str(unreadable))


class _Unreadable(Exception):
    """A flex_attention, or a part of a vmap, that the shadow cannot run."""

    def __init__(self, node: fx.Node, why: str):
        super().__init__(why)
        self.node = node


def _shadow(gm: fx.GraphModule, scope: _Scope) -> Shadow:
    keep = _relevant(gm.graph, scope)
    cuts = [n for n in gm.graph.nodes if n in keep and scope.is_cut(n)]
    cuts = [n for n in cuts if _is_value(example_value(n)) and not transforms.is_wrapped(n)]
    # Asked while the program's own gradient mode is on, which the analysis turns off.
    stopping = stops(gm.graph)
    marks = _Marks()

    values = [example_value(node) for node in cuts]
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


@functools.cache
def _decompositions() -> dict:
    table = dict(torch._decomp.core_aten_decompositions())
    # Kept whole: what is known of them is shorter than what they decompose into, and torch
    # versions differ in which they decompose.
    for op in KEPT_WHOLE:
        table.pop(op, None)
    table[aten.linalg_vector_norm.default] = _sum_of_sizes
    return table


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
            stack.enter_context(fake_mode)
            # As for every further trace: what was read from tensors before is read anew.
            fake_mode.epoch += 1
            if fake_mode.shape_env is not None:
                stack.enter_context(fake_mode.shape_env.ignore_fresh_unbacked_symbols())
                # Composite operators in Python: some of those in C++ ask for sizes as numbers.
                stack.enter_context(enable_python_dispatcher())
        grad = torch.is_grad_enabled()
        try:
            yield
        finally:
            torch.set_grad_enabled(grad)


class _Scope:
    """Which nodes the shadow runs, and which it takes as given."""

    def __init__(self, gm: fx.GraphModule):
        # The span of transforms that each of these nodes is in: run, or cut as a whole.
        self.batched: dict[fx.Node, transforms.Span] = {}
        self.cut: dict[fx.Node, transforms.Span] = {}
        # Calls of flex_attention that are more than their mods say.
        self.refused: set[fx.Node] = set()
        self.declined: list[Decline] = []
        for span in transforms.spans(gm.graph):
            if span.batches_alone and not any(map(_cannot_run, span.nodes)):
                self.batched.update(dict.fromkeys(span.nodes, span))
            else:
                self._cut(span, "only plain vmap can be read")
        for node in gm.graph.nodes:
            if flex.is_call(node) and node not in self.cut:
                try:
                    flex.check(node, gm)
                except Decline as decline:
                    self._refuse(node, decline)

    def is_cut(self, node: fx.Node) -> bool:
        """Whether the shadow takes the node's value as given instead of running the node."""
        if node in self.batched or node in self.cut:
            return node in self.cut
        first = node.args[0] if node.args else None
        refused = node in self.refused or isinstance(first, fx.Node) and first in self.refused
        return refused or _is_cut(node)

    def cut_out(self, node: fx.Node, why: str) -> None:
        """Takes the value of what has turned out unreadable as given."""
        if node in self.batched:
            self._cut(self.batched[node], why)
        else:
            self._refuse(node, Decline("flex-unreadable", None, READABLE, message=why))

    def _cut(self, span: transforms.Span, why: str) -> None:
        for node in span.nodes:
            self.batched.pop(node, None)
            self.cut[node] = span
        softmax = transforms.softmax_of(span)
        if softmax is not None:
            self.declined.append(
                Decline(
                    "functorch",
                    softmax,
                    "Take gradients by loss.backward() or torch.autograd.grad.",
                    message=f"attention under {span.name} is left as it was: {why}",
                    stage="trace",
                )
            )

    def _refuse(self, node: fx.Node, decline: Decline) -> None:
        decline.node, decline.stage = node, "trace"
        self.refused.add(node)
        self.declined.append(decline)


def _cannot_run(node: fx.Node) -> bool:
    """Whether a node has no meaning for vmap."""
    return not transforms.is_transform(node) and (
        node.op == "call_module"
        or isinstance(node.target, torch._ops.HigherOrderOperator)
        or "dropout" in target_name(node)
    )


@dataclass
class _Marks:
    """What MARK's numbers stand for."""

    # (a Dynamo node, the node since which it holds the marked value)
    held: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    # The numbers of values that are part of a Dynamo node, and held by none.
    within: set[int] = field(default_factory=set)
    made: list[torch.Tensor] = field(default_factory=list)

    def add(self, value: torch.Tensor, holder: fx.Node, at: fx.Node, *, within=False) -> None:
        inner = unwrapped(value)
        if within or inner is not value:
            self.within.add(len(self.held))
        self.made.append(MARK(inner, len(self.held)))
        self.held.append((holder, at))


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
                # A number that is read from a tensor keeps the symbol that Dynamo has for it.
                rebind_unbacked(self.shape_env, node, self.env[node])
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
            if not flex.is_call(n) and n not in self.scope.batched:
                raise
            raise _Unreadable(n, f"{type(error).__name__}: {error}".split("\n")[0]) from error
        self.marks.add(weights, n, n, within=True)
        return outputs

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
    return isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool))


def _is_cut(node: fx.Node) -> bool:
    if node.op in ("placeholder", "get_attr"):
        return True
    if flex.is_call(node):
        return False
    if node.op == "call_module" or opaque_target(node):
        return True
    # What a cut tuple was taken apart into is cut too.
    first = node.args[0] if node.args else None
    return (
        node.op == "call_function"
        and getattr(node.target, "__name__", "") == "getitem"
        and isinstance(first, fx.Node)
        and not isinstance(example_value(first), torch.Tensor)
        and _is_cut(first)
    )


def _relevant(graph: fx.Graph, scope: _Scope) -> set[fx.Node]:
    """Ancestors and descendants of the seeds, up to cuts, with all mutations kept."""
    forward: set[fx.Node] = set()
    stack = [node for node in seeds(graph) if not scope.is_cut(node)]
    while stack:
        node = stack.pop()
        if node in forward or node.op == "output":
            continue
        forward.add(node)
        stack.extend(user for user in node.users if not scope.is_cut(user))
    keep: set[fx.Node] = set()
    stack = list(forward)
    stack += [n for n in graph.nodes if _changes_mode(n)]
    stack += [n for n in scope.batched if transforms.enters(n) or transforms.leaves(n)]
    mutations = [n for n in graph.nodes if is_mutation(n)]
    while True:
        while stack:
            node = stack.pop()
            if node in keep:
                continue
            keep.add(node)
            if scope.is_cut(node):
                stack.extend(mutated_nodes(node))
            else:
                stack.extend(flex.inputs(node) if flex.is_call(node) else node.all_input_nodes)
        # A write reaches what is kept through any view of the same memory.
        storages = {storage_of(n) for n in keep} - {None}
        stack = [n for n in mutations if n not in keep and _writes_to(n, keep, storages)]
        if not stack:
            return keep


def _writes_to(mutation: fx.Node, nodes: set[fx.Node], storages: set) -> bool:
    written = mutated_nodes(mutation)
    return any(n in nodes or storage_of(n) in storages or storage_of(n) is None for n in written)


def _changes_mode(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return name in ("_enter_autocast", "_exit_autocast", "_set_grad_enabled")


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
    for node in graph.nodes:
        if node.target is not MARK:
            continue
        aten, number = node.args
        if number in marks.within:
            within.setdefault(aten, marks.held[number][0])
        else:
            held.append((aten, *marks.held[number]))
    order = {node: i for i, node in enumerate(cuts[0].graph.nodes)} if cuts else {}
    for aten, dynamo, at in sorted(held, key=lambda x: (order.get(x[2], 0), order.get(x[1], 0))):
        aten_of.setdefault(dynamo, aten)
        if dynamo not in dynamo_of.setdefault(aten, []):
            dynamo_of[aten].append(dynamo)
            since[aten, dynamo] = at
    return Shadow(graph, aten_of, dynamo_of, since, within, declined)
