"""Reading Dynamo's torch-level graph: values, names, mutations, where a node was written."""

from __future__ import annotations

import math
import operator
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

SOFTMAX_NAMES = re.compile(r"softmax|softmin|exp|scaled_dot_product_attention|flex_attention")

# Functions that attention is never made of: the shadow takes their results as given.
OPAQUE_NAMES = frozenset(
    """linear layer_norm rms_norm group_norm batch_norm instance_norm conv1d conv2d conv3d
    cross_entropy nll_loss mse_loss interpolate avg_pool2d max_pool2d
    max_pool1d adaptive_avg_pool2d adaptive_avg_pool1d embedding_bag lstm gru topk sort argsort
    multinomial unique nonzero bincount histc searchsorted cdist grouped_mm _grouped_mm
    bernoulli rand randn randint rand_like randn_like normal grid_sample pad_sequence""".split()
)

INPLACE_OPERATORS = frozenset(
    {
        operator.iadd,
        operator.isub,
        operator.imul,
        operator.itruediv,
        operator.ifloordiv,
        operator.imod,
        operator.iand,
        operator.ior,
        operator.ixor,
        operator.ipow,
        operator.imatmul,
        operator.ilshift,
        operator.irshift,
        operator.setitem,
        operator.delitem,
    }
)


def target_name(node: fx.Node) -> str:
    """The function's or method's bare name."""
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return getattr(node.target, "__name__", str(node.target))


def example_value(node: fx.Node) -> Any:
    """Dynamo's fake value of a node, or None."""
    return node.meta.get("example_value")


def is_softmax_like(node: fx.Node) -> bool:
    """Whether a softmax may begin here: softmax by name, exp written by hand, SDPA, flex."""
    return node.op in ("call_function", "call_method") and bool(
        SOFTMAX_NAMES.search(target_name(node).replace("expand", ""))
    )


def opaque_target(node: fx.Node) -> bool:
    """Whether the shadow should not look inside this call."""
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    name = target_name(node)
    if name in OPAQUE_NAMES or "functorch" in (getattr(node.target, "__module__", "") or ""):
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.namespace not in ("aten", "prims")
    return isinstance(node.target, torch._ops.OpOverloadPacket)


def is_mutation(node: fx.Node) -> bool:
    """Whether the call may write to one of its tensor arguments."""
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name in (
            "__setitem__",
            "__iadd__",
            "__imul__",
            "__isub__",
            "__itruediv__",
        )
    if node.op != "call_function":
        return False
    if node.target in INPLACE_OPERATORS:
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return "triton_kernel_wrapper_mutation" in str(node.target)
    if node.kwargs.get("inplace") or node.kwargs.get("out") is not None:
        return True
    if node.target in (F.dropout, F.relu) and len(node.args) > 3:
        return bool(node.args[3])
    name = target_name(node)
    return name.endswith("_") and not name.endswith("__") and not name.startswith("_")


def mutated_nodes(node: fx.Node) -> list[fx.Node]:
    """The arguments that a mutation writes to."""
    if isinstance(node.target, torch._ops.OpOverload):
        written = []
        for i, argument in enumerate(node.target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
                written += [x for x in _flat(value) if isinstance(x, fx.Node)]
        return written
    out = node.kwargs.get("out")
    if out is not None:
        return [x for x in _flat(out) if isinstance(x, fx.Node)]
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return node.all_input_nodes
    return [x for x in _flat(node.args[0]) if isinstance(x, fx.Node)] if node.args else []


def unwrapped(value: torch.Tensor) -> torch.Tensor:
    """A tensor without the wrappers of functorch's transforms."""
    while is_functorch_wrapped_tensor(value):
        value = get_unwrapped(value)
    return value


def storage_of(node: fx.Node) -> int | None:
    """An identity of the memory that a node's value lives in; views share their base's."""
    value = example_value(node)
    if not isinstance(value, torch.Tensor):
        return None
    try:
        return unwrapped(value).untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def overwrite(source: fx.Node, since: fx.Node, until: fx.Node) -> fx.Node | None:
    """The first write to the memory of `source` after `since` and before `until`, if there is one.

    All three are nodes of one graph.
    """
    storage = storage_of(source)
    node = since.next
    while node is not until and node.op != "root":
        if is_mutation(node):
            for written in mutated_nodes(node):
                if written is source or (storage is not None and storage_of(written) == storage):
                    return node
        node = node.next
    return None


def may_be_infinite(node: fx.Node) -> bool:
    """Whether a float may be -inf or inf: one that is given, or made with an infinite constant.

    Parameters, integers, and what is computed of them by finite numbers count as finite.
    """
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        value = example_value(current)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        if current.op in ("placeholder", "get_attr"):
            if not isinstance(value, torch.nn.Parameter):
                return True
            continue
        numbers = _flat([*current.args, *current.kwargs.values()])
        if any(isinstance(x, float) and math.isinf(x) for x in numbers):
            return True
        if target_name(current) in ("log", "log2", "log10", "reciprocal"):
            return True
        stack.extend(current.all_input_nodes)
    return False


def _flat(value) -> list:
    if isinstance(value, (list, tuple)):
        return [y for x in value for y in _flat(x)]
    return [value]
