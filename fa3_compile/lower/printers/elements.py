"""A spec's expressions as tensors: every score, mask, fill, sink and weight, element by element.

`elements` runs a torch program that TorchPrinter wrote; it is an ordinary differentiable
function of `s` and the captured tensors, and can be traced by make_fx.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from fa3_compile.lower.printers.philox import uniform
from fa3_compile.lower.printers.printer import Env
from fa3_compile.lower.printers.printer_torch import TorchPrinter
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.expr import COORDINATES, SKV, SQ, Boolean, Expr, load

AXES = tuple(x.name for x in COORDINATES)


@dataclass(frozen=True)
class Shape:
    """The lengths of the axes (b, h, q, kv), SymInt where they are dynamic."""

    batch: int
    heads: int
    q_len: int
    kv_len: int

    @property
    def lengths(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.q_len, self.kv_len


def elements(
    exprs: Sequence[Expr | Boolean],
    spec: AttentionSpec,
    shape: Shape,
    s: Tensor | None,
    aux: Sequence[Tensor],
    sizes: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    kept: Tensor | None = None,
) -> list[Tensor]:
    """Each expression as a tensor that broadcasts to [B, H, Sq, Skv].

    `s` is the raw dot products [B, H, Sq, Skv] of `dtype`, or None if no expression has it. Where
    the mask `kept` is False, infinities and NaN that are read are 1 instead: 0, the gradient
    there, times their slope would be NaN.
    """
    program = _program(tuple(exprs), spec.aux)
    return program(s, shape, aux, sizes, dtype, device, functools.partial(_finite, kept))


@functools.lru_cache(maxsize=1024)
def _program(exprs: tuple[Expr | Boolean, ...], aux: tuple[str, ...]) -> Callable:
    lines, results = TorchPrinter().print_block(exprs, Env(load=_load_text, aux=aux))
    used = {str(x) for e in exprs for x in e.free_symbols} - {"s"}
    results = [
        f"torch.full((), {r}, dtype={_dtype_text(e)}, device=device)"
        if not (e.free_symbols or e.atoms(load))
        else r
        for e, r in zip(exprs, results)
    ]
    source = "\n    ".join(
        [
            "def program(s, shape, aux, sizes, dtype, device, finite):",
            *(_symbol_line(name) for name in sorted(used)),
            *lines,
            f"return [{', '.join(results)}]",
        ]
    )
    scope = {"torch": torch, "axis": _axis, "view": _view, "gather": _gather}
    scope["uniform"] = uniform
    exec(compile(source, "<fa3 elements>", "exec"), scope)
    return scope["program"]


def _dtype_text(expr: Expr | Boolean) -> str:
    return "torch.bool" if isinstance(expr, sympy.logic.boolalg.Boolean) else "dtype"


def _symbol_line(name: str) -> str:
    if name in AXES:
        return f"{name} = axis({AXES.index(name)}, shape, device)"
    value = {SQ.name: "shape.q_len", SKV.name: "shape.kv_len"}.get(name, f"sizes[{name[1:]}]")
    return f"{name} = torch.full((), {value}, dtype=torch.int64, device=device)"


def _axis(axis: int, shape: Shape, device: torch.device) -> Tensor:
    """The coordinates along one axis, as a tensor that broadcasts along the others."""
    positions = torch.arange(shape.lengths[axis], device=device)
    return positions.view([-1 if i == axis else 1 for i in range(len(AXES))])


def _load_text(element: load, index: list[str]) -> str:
    """A view of the tensor where every index is a constant or one coordinate, in any order;
    else a gather."""
    axes = [str(x) for x in element.index if x in COORDINATES]
    plain = all(x.is_Integer or x in COORDINATES for x in element.index)
    tensor = f"aux[{element.tensor}]"
    listed = ", ".join(index)
    if plain and len(set(axes)) == len(axes):
        names = ", ".join(str(x) if x.is_Integer else repr(str(x)) for x in element.index)
        return f"finite(view({tensor}, [{names}], [{listed}], shape))"
    return f"finite(gather({tensor}, [{listed}]))"


def _finite(kept: Tensor | None, x: Tensor) -> Tensor:
    if kept is None or not x.is_floating_point():
        return x
    return torch.where(kept | x.isfinite(), x, 1.0)


def _view(tensor: Tensor, index: list[str | int], positions: list[Tensor | int], shape: Shape):
    """tensor[index], where an index is a constant or the name of an axis, without a gather.

    The tensor may be longer than the axis. Where it may be shorter, elements beyond it are ones
    that the expression guards against: those need the gather's clamped positions.
    """
    for length, at in zip(tensor.shape, index):
        if isinstance(at, str):
            if not guard_or_false(length >= shape.lengths[AXES.index(at)]):
                return _gather(tensor, positions)
        elif not guard_or_false(length > at):
            return _gather(tensor, positions)
    for dim in reversed(range(len(index))):
        at = index[dim]
        if isinstance(at, int):
            tensor = tensor.select(dim, at)
        else:
            wanted = shape.lengths[AXES.index(at)]
            if not guard_or_false(tensor.shape[dim] == wanted):
                tensor = tensor.narrow(dim, 0, wanted)
    axes = [AXES.index(x) for x in index if isinstance(x, str)]
    tensor = tensor.permute([axes.index(x) for x in sorted(axes)])
    for axis in range(len(AXES)):
        if axis not in axes:
            tensor = tensor.unsqueeze(axis)
    return tensor


def _gather(tensor: Tensor, index: list[Tensor | int]) -> Tensor:
    """tensor[index] with positions clamped to the tensor: `where(i < n, load(0, i), 0)` is
    evaluated on both sides."""
    if not index:
        return tensor
    clamped = []
    for length, at in zip(tensor.shape, index):
        if guard_or_false(length == 1):
            at = 0  # the gradient is then summed before it is scattered
        if isinstance(at, int):
            at = torch.full((), at, dtype=torch.int64, device=tensor.device)
        if at.dim() == 0:  # FakeTensor gets the shape wrong with an index without axes
            at = at.view([1] * len(AXES))
        clamped.append(at.clamp(min=0).clamp(max=length - 1))
    return tensor[tuple(clamped)]
