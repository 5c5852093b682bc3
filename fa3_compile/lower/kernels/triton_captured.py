"""Gradients of captured tensors, from what the Triton backward's kernels leave of dS.

A load that lacks an axis comes as a float32 sum over it; one that has an element of its own for
each query and key is written by its kernel; what has no more than kv - q comes as sums along
diagonals (triton_diagonals.py). Any other, such as Swin's table, comes as dS in a float32 buffer of
at most SCRATCH bytes at a time, summed over the axes that the load does not have; what is left is
torch's own gradient of the index. No atomics: every sum has the same order each time.
"""

# sympy annotates every argument as Basic and every Function as a type.
# pyright: reportArgumentType=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from fa3_compile.lower.nested_autograd import gradients
from fa3_compile.lower.printers.elements import Shape, elements
from fa3_compile.lower.render.render_backward import is_plain
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec

SCRATCH = 2**28
# Programs that keep any GPU busy; with fewer, the axes that are summed over are split.
ENOUGH_PROGRAMS = 512
LARGEST_SPLIT = 64


@dataclass(frozen=True)
class Extent:
    """What one launch of a dense kernel covers.

    place   where it writes to: see the template
    outer   the one coordinate that is covered of those the captured tensor has; None for all
    rows    queries, from first_row on
    splits  parts that the sum over the other coordinates comes in
    """

    place: str
    outer: int | None
    first_row: int
    rows: int
    splits: int


@dataclass(frozen=True)
class Axes:
    """Which of the batch and the heads a load has (outers), and which its gradient sums over."""

    element: E.load
    shape: Shape

    @property
    def outers(self) -> int:
        symbols = self.element.free_symbols
        batch = self.shape.batch if E.B in symbols else 1
        return batch * (self.shape.heads if E.H in symbols else 1)

    @property
    def inners(self) -> int:
        return self.shape.batch * self.shape.heads // self.outers

    def outer_lengths(self, outer: int | None) -> tuple[int, int]:
        """Batch and heads that are covered, of one outer or of all."""
        symbols = self.element.free_symbols
        if outer is not None:
            return 1, 1
        return self.shape.batch if E.B in symbols else 1, self.shape.heads if E.H in symbols else 1


@dataclass(frozen=True)
class Layout(Axes):
    """The lengths that a dense kernel's work depends on, and its tile."""

    block_q: int
    block_kv: int

    def programs(self, extent: Extent) -> int:
        tiles = -(-extent.rows // self.block_q) * -(-self.shape.kv_len // self.block_kv)
        return tiles * (self.outers if extent.outer is None else 1) * extent.splits

    def integers(self, extent: Extent) -> dict[str, int]:
        """The kernel's parameters for an extent."""
        columns = self.shape.kv_len
        outers = self.outers if extent.outer is None else 1
        return {
            "first_tile": extent.first_row // self.block_q,
            "tiles": -(-extent.rows // self.block_q),
            "first_outer": extent.outer or 0,
            "outers": outers,
            "per_split": -(-self.inners // extent.splits),
            "row_stride": columns,
            "outer_stride": columns * extent.rows,
            "split_stride": columns * extent.rows * outers,
        }

    def extents(self, spec: AttentionSpec) -> list[Extent]:
        """Launches that cover everything, one of them where the kernel writes the gradient."""
        everything = Extent("own", None, 0, self.shape.q_len, 1)
        programs = self.programs(everything)
        splits = min(-(-ENOUGH_PROGRAMS // programs), self.inners, LARGEST_SPLIT)
        splits = 1 if programs * 2 > ENOUGH_PROGRAMS else splits
        splits = -(-self.inners // -(-self.inners // splits))  # none of them empty
        if is_plain(spec, self.element) and splits == 1:
            return [everything]
        whole = Extent("rows", None, 0, self.shape.q_len, splits)
        if self._bytes(whole) <= SCRATCH:
            return [whole]
        rows = SCRATCH // 4 // self.shape.kv_len
        rows = min(max(rows // self.block_q, 1) * self.block_q, self.shape.q_len)
        starts = range(0, self.shape.q_len, rows)
        return [
            Extent("rows", outer, start, min(rows, self.shape.q_len - start), 1)
            for outer in range(self.outers)
            for start in starts
        ]

    def _bytes(self, extent: Extent) -> int:
        integers = self.integers(extent)
        return 4 * integers["split_stride"] * extent.splits


@dataclass(frozen=True)
class Gathered:
    """The gradient of one load by way of scratch memory; run like a kernel's launch.

    Leaves the float32 gradient of the captured tensor in tensors[`<name>_grad`].
    """

    name: str
    layout: Layout
    spec: AttentionSpec
    sizes: tuple[int, ...]
    launches: Sequence[tuple[Extent, Callable[[Mapping[str, Tensor]], None]]]

    def __call__(self, tensors: dict[str, Tensor]) -> None:
        x = self.layout.element
        aux = [tensors[f"aux{i}"] for i in range(len(self.spec.aux))]
        device = tensors["q_ptr"].device
        total = torch.zeros(aux[x.tensor].shape, dtype=torch.float32, device=device)
        for extent, launch in self.launches:
            total += self._of_rows(self._run(extent, launch, tensors), extent, aux)
        tensors[f"{self.name}_grad"] = total

    def _run(self, extent: Extent, launch, tensors: Mapping[str, Tensor]) -> Tensor:
        """dS [B|1, H|1, rows, columns] of an extent."""
        lengths = (*self.layout.outer_lengths(extent.outer), extent.rows, self.layout.shape.kv_len)
        device = tensors["q_ptr"].device
        scratch = torch.empty((extent.splits, *lengths), dtype=torch.float32, device=device)
        launch({**tensors, f"{self.name}_ptr": scratch})
        return scratch[0] if extent.splits == 1 else scratch.sum(0)

    def _of_rows(self, found: Tensor, extent: Extent, aux: Sequence[Tensor]) -> Tensor:
        x, heads = self.layout.element, self.layout.shape.heads
        at: dict[sympy.Symbol, E.Expr] = {E.Q: E.Q + extent.first_row}
        if extent.outer is not None:
            b = extent.outer // heads if E.H in x.free_symbols else extent.outer
            at |= {E.B: sympy.Integer(b), E.H: sympy.Integer(extent.outer % heads)}
        lengths = self.layout.shape
        at |= {E.SQ: sympy.Integer(lengths.q_len), E.SKV: sympy.Integer(lengths.kv_len)}
        moved = x.xreplace(at)
        found, moved = compressed(found, moved, self.spec, aux, self.sizes)
        return chained([(moved, found)], self.spec, Shape(*found.shape), x.tensor, aux, self.sizes)


def compressed(found: Tensor, x: E.load, spec, aux, sizes) -> tuple[Tensor, E.load]:
    """dS with the keys that share an element summed, where one index of the load is made of kv
    alone and the others have none: [.., Sq, Skv] @ [Skv, places], instead of a scatter,
    which torch does key by key where many share one."""
    by_key = [d for d, i in enumerate(x.index) if E.KV in i.free_symbols]
    if len(by_key) != 1 or x.index[by_key[0]] == E.KV:
        return found, x
    [d] = by_key
    index = x.index[d]
    places = aux[x.tensor].shape[d]
    keys = found.shape[3]
    if E.loads_in(index) or index.free_symbols & {E.B, E.H, E.Q}:
        return found, x
    if places >= keys or places * keys > SCRATCH // 16:  # bytes of int64, and of float32
        return found, x
    shape = Shape(1, 1, 1, keys)
    [at] = elements([index], spec, shape, None, aux, sizes, torch.float32, found.device)
    at = at.expand(1, 1, 1, keys).reshape(-1).clamp(0, places - 1)
    summed = found @ F.one_hot(at, places).to(torch.float32)
    return summed, E.load(x.args[0], *(E.KV if i == d else y for i, y in enumerate(x.index)))


def chained(
    parts: Sequence[tuple[E.Expr, Tensor]],
    spec: AttentionSpec,
    shape: Shape,
    which: int,
    aux: Sequence[Tensor],
    sizes: Sequence[int],
) -> Tensor:
    """float32: sum over the parts of (d expression / d aux[which])^T applied to the cotangent."""
    leaf = aux[which].detach().to(torch.float32).requires_grad_()
    inputs = [leaf if i == which else x.detach() for i, x in enumerate(aux)]
    total = torch.zeros_like(leaf, requires_grad=False)
    for expr, cotangent in parts:
        if not any(x.tensor == which for x in E.loads_in(expr)):
            continue
        with torch.enable_grad():
            [value] = elements([expr], spec, shape, None, inputs, sizes, torch.float32, leaf.device)
            value = value.to(torch.float32).expand(cotangent.shape)
            [grad] = gradients([value], [leaf], [cotangent])
        assert grad is not None
        total += grad
    return total
