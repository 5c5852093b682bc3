"""Reading Dynamo's torch-level graph: values, names, memory, what is not looked into."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch._dispatch.python import enable_python_dispatcher

SOFTMAX_NAMES = re.compile(r"softmax|softmin|exp|scaled_dot_product_attention|flex_attention")

# Functions that attention is never made of: the shadow takes their results as given.
OPAQUE_NAMES = frozenset(
    """linear layer_norm rms_norm group_norm batch_norm instance_norm conv1d conv2d conv3d
    cross_entropy nll_loss mse_loss interpolate avg_pool2d max_pool2d
    max_pool1d adaptive_avg_pool2d adaptive_avg_pool1d embedding_bag lstm gru topk sort argsort
    multinomial unique nonzero bincount histc searchsorted cdist grouped_mm _grouped_mm
    bernoulli rand randn randint rand_like randn_like normal grid_sample pad_sequence""".split()
)

# Calls that ask a tensor for nothing but its shape, dtype and device.
SHAPE_READERS = frozenset(
    """size shape dim numel ndimension stride device dtype is_contiguous zeros_like ones_like
    full_like empty_like rand_like randn_like randint_like new_zeros new_ones new_full new_empty
    new_tensor""".split()
)
# Methods that ask their second tensor for nothing but these.
LIKE_ANOTHER = frozenset("to type_as expand_as view_as reshape_as".split())

# In the `meta` of a call of an opaque function that is a product of two activations after all.
IS_PRODUCT = "fa3_product"


def target_name(node: fx.Node) -> str:
    """The function's or method's bare name."""
    return name_of(node.target)


def name_of(target: Any) -> str:
    """The bare name of what a node calls."""
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return operator_name(target)[1]
    return getattr(target, "__name__", None) or str(target)


def operator_name(target: torch._ops.OpOverload | torch._ops.OpOverloadPacket) -> list[str]:
    """Namespace and name."""
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    return packet._qualified_op_name.split("::")


def example_value(node: fx.Node) -> Any:
    """Dynamo's fake value of a node, or None."""
    return node.meta.get("example_value")


def values_read(node: fx.Node) -> list[fx.Node]:
    """The inputs of which a node reads more than shape, dtype and device."""
    name = target_name(node)
    if name in SHAPE_READERS:
        return []
    if name in LIKE_ANOTHER and node.op == "call_method":
        return [x for x in node.args[:1] if isinstance(x, fx.Node)]
    return node.all_input_nodes


@contextlib.contextmanager
def computing_fakes(fake_mode) -> Iterator[None]:
    """Fake values are computed within, as Dynamo does it; None: with real tensors, as they are."""
    with contextlib.ExitStack() as stack:
        if fake_mode is not None:
            stack.enter_context(fake_mode)
            # Without it what is written in C++ (F.linear of torch 2.11) takes sizes as numbers,
            # and a graph that was dynamic is compiled anew for each.
            stack.enter_context(enable_python_dispatcher())
        yield


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
    if node.meta.get(IS_PRODUCT) or norms_by_given_statistics(node):
        return False
    if name in OPAQUE_NAMES or "functorch" in (getattr(node.target, "__module__", "") or ""):
        return True
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return operator_name(node.target)[0] not in ("aten", "prims")
    return False


def norms_by_given_statistics(node: fx.Node) -> bool:
    """Whether a call is a batch norm by running statistics, as in evaluation: it scales and shifts
    each channel by its own, and is element-wise."""
    if node.target is not torch.nn.functional.batch_norm:
        return False
    training = node.args[5] if len(node.args) > 5 else node.kwargs.get("training", False)
    return training is False


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


def may_be_infinite(node: fx.Node) -> bool:
    """Whether a float may be -inf or inf: one that is given, or made with an infinite constant.

    Parameters that learn, integers, and what is computed of them by finite numbers count as finite;
    a frozen parameter may be a mask. So does a product of matrices, as Q K^T itself: infinity among
    its terms is NaN in its sums.
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
            if not isinstance(value, torch.nn.Parameter) or not value.requires_grad:
                return True
            continue
        numbers = _flat([*current.args, *current.kwargs.values()])
        if any(isinstance(x, float) and math.isinf(x) for x in numbers):
            return True
        name = target_name(current)
        if name in ("log", "log2", "log10", "reciprocal"):
            return True
        if name in ("tanh", "sigmoid", "layer_norm") or _sums_products(current):
            continue
        stack.extend(current.all_input_nodes)
    return False


def _sums_products(node: fx.Node) -> bool:
    if target_name(node) not in ("matmul", "bmm", "mm", "linear") or not node.all_input_nodes:
        return False
    return example_value(node.all_input_nodes[0]).shape[-1] > 1


def flat_nodes(value: Any) -> list[fx.Node]:
    """The nodes in an argument, which may be a nest of lists."""
    return [x for x in _flat(value) if isinstance(x, fx.Node)]


def _flat(value) -> list:
    if isinstance(value, (list, tuple)):
        return [y for x in value for y in _flat(x)]
    return [value]
