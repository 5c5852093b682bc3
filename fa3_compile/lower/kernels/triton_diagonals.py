"""Gradients of captured tensors by the distance: of loads whose index has no more than kv - q.

Their kernel walks along bands of tiles that lie on the same diagonals (see
templates/triton/backward_diagonals.py.jinja), and leaves dS summed over them in a float32 buffer of
a tile's rows, each moved by a column, and Sq + Skv columns; torch sums the rows, and maps diagonals
to the tensor. No atomics: every sum has the same order each time.
"""

# sympy annotates every argument as Basic and every Function as a type.
# pyright: reportArgumentType=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import Tensor

from fa3_compile.lower.kernels import triton_captured
from fa3_compile.lower.kernels.triton_captured import Axes, chained, compressed
from fa3_compile.lower.kernels.triton_launch import bind_kernel
from fa3_compile.lower.printers.elements import Shape
from fa3_compile.lower.tiles.config import TritonConfig
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec

# As triton_captured.ENOUGH_PROGRAMS: some are as long as the sequence, others one tile.
ENOUGH_BANDS = 2048


@dataclass(frozen=True)
class Extent:
    """What one launch covers: one of the coordinates that the captured tensor has, or all (None);
    `splits` are the parts that the sum over the other coordinates comes in."""

    outer: int | None
    splits: int


@dataclass(frozen=True)
class Bands(Axes):
    """The lengths that the kernel's work depends on, and its tile, of whole block_kv in block_q."""

    block_q: int
    block_kv: int

    @property
    def count(self) -> int:
        steps, kv_tiles = (
            -(-self.shape.q_len // self.block_q),
            -(-self.shape.kv_len // self.block_kv),
        )
        return (steps - 1) * (self.block_q // self.block_kv) + kv_tiles

    @property
    def columns(self) -> int:
        return self.count * self.block_kv + self.block_q - 1

    @property
    def first_column(self) -> int:
        """Of the diagonal of the last query and the first key."""
        return -self.shape.q_len % self.block_q

    def programs(self, extent: Extent) -> int:
        return self.count * (self.outers if extent.outer is None else 1) * extent.splits

    def integers(self, extent: Extent) -> dict[str, int]:
        """The kernel's parameters for an extent."""
        outers = self.outers if extent.outer is None else 1
        return {
            "first_outer": extent.outer or 0,
            "outers": outers,
            "per_split": -(-self.inners // extent.splits),
            "row_stride": self.columns,
            "outer_stride": self.columns * self.block_q,
            "split_stride": self.columns * self.block_q * outers,
        }

    def extents(self) -> list[Extent]:
        """Launches that cover everything."""
        part = 4 * self.columns * self.block_q * self.outers
        if part > triton_captured.SCRATCH:
            return [Extent(outer, 1) for outer in range(self.outers)]
        splits = min(-(-ENOUGH_BANDS // self.programs(Extent(None, 1))), self.inners)
        splits = min(splits, triton_captured.SCRATCH // part)
        return [Extent(None, -(-self.inners // -(-self.inners // splits)))]  # none of them empty


@dataclass(frozen=True)
class DiagonalSums:
    """The gradient of one load by way of scratch memory; run like a kernel's launch.

    Leaves the float32 gradient of the captured tensor in tensors[`<name>_grad`].
    """

    name: str
    bands: Bands
    spec: AttentionSpec
    sizes: tuple[int, ...]
    launches: Sequence[tuple[Extent, Callable[[Mapping[str, Tensor]], None]]]

    def __call__(self, tensors: dict[str, Tensor]) -> None:
        aux = [tensors[f"aux{i}"] for i in range(len(self.spec.aux))]
        found = [self._sums(extent, launch, tensors) for extent, launch in self.launches]
        sums = found[0] if len(found) == 1 else torch.cat(found)
        shape, first = self.bands.shape, self.bands.first_column
        sums = sums.narrow(1, first, shape.q_len + shape.kv_len - 1)
        sums = sums.reshape(*self.bands.outer_lengths(None), 1, sums.shape[1])
        tensors[f"{self.name}_grad"] = self._of_diagonals(sums, aux)

    def _sums(self, extent: Extent, launch, tensors: Mapping[str, Tensor]) -> Tensor:
        """dS of an extent by outer and column."""
        outers = self.bands.outers if extent.outer is None else 1
        lengths = (extent.splits, outers, self.bands.block_q, self.bands.columns)
        # Only the first and last block_q columns have places that no tile writes to.
        scratch = torch.zeros(lengths, dtype=torch.float32, device=tensors["q_ptr"].device)
        launch({**tensors, f"{self.name}_ptr": scratch})
        return scratch.sum((0, 2))

    def _of_diagonals(self, sums: Tensor, aux: Sequence[Tensor]) -> Tensor:
        x, shape = self.bands.element, self.bands.shape
        at = {E.Q: sympy.S.Zero, E.KV: E.KV - (shape.q_len - 1)}
        at |= {E.SQ: sympy.Integer(shape.q_len), E.SKV: sympy.Integer(shape.kv_len)}
        moved = x.xreplace(at)
        if (placed := in_place(sums, moved, aux[x.tensor])) is not None:
            return placed
        sums, moved = compressed(sums, moved, self.spec, aux, self.sizes)
        parts = [(moved, sums)]
        return chained(parts, self.spec, Shape(*sums.shape), x.tensor, aux, self.sizes)


def in_place(sums: Tensor, x: E.load, tensor: Tensor) -> Tensor | None:
    """The tensor's gradient where the load takes a part of it as it is, [B|1, H|1, 1, diagonals];
    torch's own gradient of an index sorts the places. None for any other load."""
    total = torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
    part, axes = total, []
    for d, i in reversed(list(enumerate(x.index))):
        axis = {E.B: 0, E.H: 1}.get(i, 3)
        first = sympy.S.Zero if axis < 3 else i - E.KV
        if i.is_Integer and i < part.shape[d]:
            part = part.select(d, int(i))
            continue
        if not first.is_Integer or first < 0 or first + sums.shape[axis] > part.shape[d]:
            return None
        part = part.narrow(d, int(first), sums.shape[axis])
        axes.insert(0, axis)
    if len(set(axes)) < len(axes):
        return None
    part.copy_(sums.permute(*axes, *(a for a in range(4) if a not in axes)).view(part.shape))
    return total


def bind_diagonals(
    kernel,
    name: str,
    x: E.load,
    spec: AttentionSpec,
    shape: Shape,
    sizes: tuple[int, ...],
    tensors: Mapping[str, Tensor],
    integers: Mapping[str, int],
    constants: Mapping[str, object],
    config: TritonConfig,
) -> DiagonalSums:
    """The kernel of one load, for all its launches. Raises KernelBuildError."""
    bands = Bands(x, shape, config.block_q, min(config.block_kv, config.block_q))
    config = replace(config, block_kv=bands.block_kv)
    tensors = {**tensors, f"{name}_ptr": tensors["lse_ptr"]}  # any float32: it is made for each run
    launches = []
    for extent in bands.extents():
        given = {**integers, **bands.integers(extent)}
        launch = bind_kernel(kernel, config, bands.programs(extent), tensors, given, constants)
        launches.append((extent, launch))
    return DiagonalSums(name, bands, spec, sizes, launches)
