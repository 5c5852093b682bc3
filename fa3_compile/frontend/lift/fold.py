"""Values that depend on no input: computed while compiling, and recognised where they are simple.

Models derive masks from positions they made themselves: `cumsum(diff(arange) != 1)` is 0 wherever
it is read. What is computed here is either one number, or a number that grows evenly along one
axis; anything else has to be read from memory when the program runs.
"""

from __future__ import annotations

import sympy
import torch
from torch import fx

from fa3_compile.frontend.lift.lift import Element, Index, Opaque, ancestors, sym
from fa3_compile.frontend.shadow.operators import UNKNOWN
from fa3_compile.frontend.shadow.same import is_random

# Above this, computing the value would cost more than it can save.
MOST_ELEMENTS = 1 << 20
MOST_NODES = 200
# Of which the CPU has no arange.
LARGE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def fold(node: fx.Node, index: Index) -> Element:
    """The element of a value that no input reaches. `Opaque` where there is no closed form."""
    value = _compute(node)
    if value.numel() == 0:
        raise Opaque(node, "an empty tensor")
    first = value.flatten()[0]
    if bool((value == first).all()):
        return _element(first)
    if value.dtype == torch.bool or not _exact_integers(value):
        raise Opaque(node, "a computed table")
    if not value.dtype.is_floating_point:
        value = value.long()  # 0 - 1 wraps around in uint8
        first = first.long()
    position = _element(first)
    for dim, size in enumerate(value.shape):
        if size > 1:
            step = value.select(dim, 1).flatten()[0] - first
            position = position + _element(step) * index[dim]
    if bool((value == _affine(value, first)).all()):
        return position
    raise Opaque(node, "a computed table")


def _exact_integers(value: torch.Tensor) -> bool:
    if not value.dtype.is_floating_point:
        return bool((value.double().abs() < 1 << 31).all())  # as kernels compute positions
    exact = value.dtype in (torch.float32, torch.float64)
    return exact and bool(((value == value.round()) & (value.abs() < 1 << 24)).all())


def _affine(value: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    made = first.expand(value.shape).clone()
    for dim, size in enumerate(value.shape):
        if size > 1:
            step = value.select(dim, 1).flatten()[0] - first
            shape = [size if d == dim else 1 for d in range(value.dim())]
            made = made + step * torch.arange(size).view(shape)
    return made


def _element(value: torch.Tensor) -> Element:
    if value.dtype == torch.bool:
        return sympy.true if value.item() else sympy.false
    return sym(value.item())


def _compute(node: fx.Node) -> torch.Tensor:
    """The node's value, by running what it is made of on the CPU."""
    needed = _sources(node)
    values: dict[fx.Node, object] = {}
    cpu = torch.device("cpu")
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        for source in node.graph.nodes:
            if source not in needed:
                continue
            if source.op == "get_attr":
                values[source] = _constant(source)
                continue
            args, kwargs = fx.node.map_arg((source.args, source.kwargs), values.__getitem__)
            kwargs = {k: cpu if k == "device" else v for k, v in kwargs.items()}
            values[source] = _call(source, args, kwargs)
    value = values[node]
    if not isinstance(value, torch.Tensor):
        raise Opaque(node, "no tensor")
    return value


def _call(node: fx.Node, args: tuple, kwargs: dict) -> object:
    """What the node's operator returns on the CPU, which may have no kernel for a GPU's types."""
    assert callable(node.target), "what is computed is calls of operators"
    dtype = kwargs.get("dtype")
    if node.target is torch.ops.aten.arange.start_step and dtype in LARGE_UNSIGNED:
        # As the shadow writes `torch.eye` of more than 256 columns.
        return node.target(*args, **kwargs | {"dtype": torch.int64}).to(dtype)
    try:
        return node.target(*args, **kwargs)
    except NotImplementedError as error:
        raise Opaque(node, f"the CPU cannot compute it ({error})") from error


def _constant(node: fx.Node) -> torch.Tensor:
    value = getattr(node.graph.owning_module, str(node.target))
    real = getattr(value, "constant", None)
    if real is None:
        raise Opaque(node, "a constant without a value")
    return real.cpu()


def _sources(node: fx.Node) -> set[fx.Node]:
    """What the node is made of. `Opaque` if an input, a random number or a dynamic size is."""
    seen: set[fx.Node] = set()
    for current in ancestors(node):
        seen.add(current)
        value = current.meta.get("val")
        if current.op == "placeholder" or len(seen) > MOST_NODES:
            raise Opaque(node, "it depends on an input")
        if is_random(current):
            raise Opaque(node, "it is random")
        if current.target is UNKNOWN:
            raise Opaque(node, "it is written to by a call that is not looked into")
        if isinstance(value, torch.Tensor):
            static = all(isinstance(n, int) for n in value.shape)
            if not static or value.numel() > MOST_ELEMENTS:
                raise Opaque(node, "its size is dynamic or too large")
        elif (
            current.op == "call_function"
            and value is not None
            and not isinstance(value, (tuple, list))
        ):
            raise Opaque(node, "a dynamic number")
    return seen
