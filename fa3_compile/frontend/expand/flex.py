"""`flex_attention`, spelled out in the plain tensor operations that its documentation promises.

In Dynamo's graph a call is one higher-order operator; score_mod and mask_mod are graphs of
scalars. They are mapped over b, h, q and kv, as PyTorch's own eager implementation does
(torch/_higher_order_ops/flex_attention.py, math_attention), and read like any other code.

A BlockMask's mask_mod is its mask. Its lists of blocks say which tiles a kernel may skip, and ours
derives that from the mask itself; what the lists say beyond the mask is checked by `blocks.check`.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fa3_compile import report
from fa3_compile.frontend.dynamo.graph import example_value, target_name
from fa3_compile.frontend.expand import flex_blocks, flex_rounding

# The names of flex_attention's arguments in the graph, in order; not all need be given.
ARGUMENTS = (
    "query",
    "key",
    "value",
    "score_mod",
    "block_mask",
    "scale",
    "kernel_options",
    "score_mod_other_buffers",
    "mask_mod_other_buffers",
)
# What flex_attention itself puts into kernel_options.
DEFAULT_OPTIONS = {
    "BACKEND": "AUTO",
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
}
OUTPUT_OPTIONS = ("OUTPUT_LOGSUMEXP", "OUTPUT_MAX")


@dataclass
class Call:
    """One flex_attention, its tensors as the shadow has them.

    query [B,H,Sq,D], key [B|1,Hkv,Skv,D], value [B|1,Hkv,Skv,Dv]; the mods take a score and
    (b, h, q, kv) as scalars, then their captured tensors.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    score_mod: fx.GraphModule
    mask_mod: fx.GraphModule
    scale: float
    score_captures: Sequence[Any]
    mask_captures: Sequence[Any]
    kernel_options: dict[str, Any]
    # The nodes of the score_mod that are constants for the gradient.
    stopping: set[fx.Node]


def is_call(node: fx.Node) -> bool:
    """Whether the node is a call of flex_attention."""
    higher_order = isinstance(node.target, torch._ops.HigherOrderOperator)
    return higher_order and target_name(node) == "flex_attention"


def mods(gm: fx.GraphModule) -> set[fx.GraphModule]:
    """The score_mods and mask_mods of every call in `gm`: graphs of scalars."""
    found = set()
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if is_call(node):
                given = arguments(node)
                for mod in (given["score_mod"], given["block_mask"][-1]):
                    found.add(getattr(module, str(mod.target)))
    return found


def arguments(node: fx.Node) -> dict[str, Any]:
    """The call's arguments by name, as nodes."""
    return {**dict(zip(ARGUMENTS, node.args)), **node.kwargs}


def inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes that a call's value depends on: all but the lists of blocks."""
    given = arguments(node)
    names = ("query", "key", "value", "scale")
    captured = [*given.get("score_mod_other_buffers", ()), *given.get("mask_mod_other_buffers", ())]
    return [x for x in (*(given[n] for n in names), *captured) if isinstance(x, fx.Node)]


def call_of(node: fx.Node, gm: fx.GraphModule, env: dict[fx.Node, Any]) -> Call:
    """The call that a node of `gm` makes, its tensors out of `env`."""
    given = arguments(node)
    score_mod, mask_mod = (
        getattr(gm, str(x.target)) for x in (given["score_mod"], given["block_mask"][-1])
    )

    def value(x):
        return env[x] if isinstance(x, fx.Node) else x

    return Call(
        value(given["query"]),
        value(given["key"]),
        value(given["value"]),
        score_mod,
        mask_mod,
        value(given["scale"]),
        [value(x) for x in given.get("score_mod_other_buffers", ())],
        [value(x) for x in given.get("mask_mod_other_buffers", ())],
        given["kernel_options"],
        _stopping(score_mod, given, any(x.requires_grad for x in example_value(node))),
    )


def stops(score_mod: fx.GraphModule) -> set[fx.Node]:
    """Where a score_mod says that no gradient flows."""
    found: set[fx.Node] = set()
    enabled = True
    for node in score_mod.graph.nodes:
        if target_name(node) == "_set_grad_enabled":
            enabled = bool(node.args[0])
        if not enabled or target_name(node) == "detach":
            found.add(node)
    return found


def _stopping(score_mod: fx.GraphModule, given: dict[str, Any], learned: bool) -> set[fx.Node]:
    """Where the score_mod holds constant what has a gradient outside it, if the call has one."""
    if not learned:
        return set()
    scores = [example_value(given[x]).requires_grad for x in ("query", "key")]
    captures = [
        isinstance(x, fx.Node) and getattr(example_value(x), "requires_grad", False)
        for x in given.get("score_mod_other_buffers", ())
    ]
    known = iter([any(scores), False, False, False, False, *captures])
    graded: set[fx.Node] = set()
    stopped: set[fx.Node] = set()
    stopping = stops(score_mod)
    for node in score_mod.graph.nodes:
        has = next(known, False) if node.op == "placeholder" else None
        if has or has is None and any(x in graded for x in node.all_input_nodes):
            (stopped if node in stopping else graded).add(node)
    return stopped


def check(node: fx.Node, gm: fx.GraphModule) -> None:
    """`Decline` where the call is more than its score_mod and mask_mod say."""
    given = arguments(node)
    flex_blocks.check(
        given["block_mask"],
        getattr(gm, str(given["block_mask"][-1].target)),
        given.get("mask_mod_other_buffers", ()),
    )
    ignored = {
        name: value
        for name, value in given["kernel_options"].items()
        if name not in OUTPUT_OPTIONS and DEFAULT_OPTIONS.get(name, ...) != value
    }
    if ignored:
        report.note(f"flex_attention's kernel_options are for its own kernels: {ignored} ignored")


def spelled_out(call: Call, stop: Callable[[Tensor], Tensor]):
    """((out, lse, largest score), weights); the statistics in units of log 2, as the graph has
    them, and rows without a key as flex has them: zeros, and -inf.

    stop   makes a value a constant for the gradient
    """
    with _cast_by_autocast(call):
        query, key, value = call.query, call.key, call.value
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        group = query.size(1) // key.size(1)
        if group > 1:
            key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        key, value = (x.expand(query.size(0), *x.shape[1:]) for x in (key, value))
        scores = query.to(wide) @ key.to(wide).transpose(-2, -1) * call.scale
        at = [torch.arange(n, device=query.device) for n in scores.shape]
        mask_mod, score_mod = Mod(call.mask_mod), Mod(call.score_mod, call.stopping, stop)
        seen = over_coordinates(lambda *x: mask_mod.run(*x, *call.mask_captures))(*at)
        captures = flex_rounding.widened(call.score_mod, call.score_captures)
        scores = over_coordinates(lambda s, *x: score_mod.run(s, *x, *captures), scored=True)(
            scores, *at
        )
        scores = scores.to(wide).masked_fill(seen.logical_not(), -math.inf)
        weights = torch.ops.aten._safe_softmax(scores, -1)
        out = weights.to(query.dtype) @ value
        # The FLASH backend's statistics are natural logarithms.
        unit = 1.0 if call.kernel_options.get("BACKEND") == "FLASH" else math.log(2)
        statistics = scores.logsumexp(-1) / unit, scores.amax(-1) / unit
    return (out, *statistics), weights


@contextlib.contextmanager
def _cast_by_autocast(call: Call):
    """Under autocast flex casts Q, K and V, and nothing else."""
    device = call.query.device.type
    if not torch.is_autocast_enabled(device):
        yield
        return
    dtype = torch.get_autocast_dtype(device)
    call.query, call.key, call.value = (x.to(dtype) for x in (call.query, call.key, call.value))
    with torch.autocast(device, enabled=False):
        yield


def over_coordinates(function: Callable, scored: bool = False) -> Callable:
    """A function of (score,) b, h, q, kv mapped over all four."""
    for mapped in reversed(range(4)):
        dims = tuple(0 if i == mapped else None for i in range(4))
        function = torch.vmap(function, in_dims=((0,) if scored else ()) + dims)
    return function


class Mod(fx.Interpreter):
    """Runs a mod's graph; indexing by scalars is a read, not a conversion to a Python number."""

    def __init__(self, mod: fx.GraphModule, stopping: Collection[fx.Node] = (), stop=None):
        super().__init__(mod)
        self.stopping, self.stop = stopping, stop

    def run_node(self, n: fx.Node):
        value = super().run_node(n)
        return self.stop(value) if self.stop is not None and n in self.stopping else value

    def call_function(self, target, args, kwargs):
        if target is operator.getitem and isinstance(args[0], Tensor):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            if all(isinstance(x, Tensor) for x in places):
                return torch.ops.aten.index.Tensor(args[0], list(places))
        return super().call_function(target, _arithmetic(target.__name__, args), kwargs)

    def call_method(self, target, args, kwargs):
        return super().call_method(target, _arithmetic(str(target), args), kwargs)


def _arithmetic(name: str, args: tuple) -> tuple:
    """Numbers known only when the program runs, as tensors: vmap cannot cast them to a dtype."""
    if not hasattr(operator, name):
        return args
    dtypes = {torch.SymInt: torch.int64, torch.SymFloat: torch.get_default_dtype()}
    return tuple(
        torch.scalar_tensor(x, dtype=dtypes[type(x)]) if type(x) in dtypes else x for x in args
    )
