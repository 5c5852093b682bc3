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

    @property
    def lengths(self) -> tuple[int, int, int, int]:
        """Of the sums: [B|1, H|1, 1, diagonals]."""
        return *self.outer_lengths(None), 1, self.shape.q_len + self.shape.kv_len - 1

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
class Part:
    """A part of the captured tensor that a load takes as it is: the place in each of its
    dimensions, and the axes of the sums [B|1, H|1, 1, diagonals] that lie along those that are
    left. Torch's own gradient of an index would sort the places."""

    places: tuple[slice | int, ...]
    axes: tuple[int, ...]

    @classmethod
    def of(cls, x: E.load, lengths: Sequence[int], shape: Sequence[int]) -> Part | None:
        """None where the load takes anything else of a tensor of this shape."""
        places, axes = [], []
        for i, length in zip(x.index, shape):
            if i.is_Integer and i < length:
                places.append(int(i))
                continue
            axis = {E.B: 0, E.H: 1}.get(i, 3)
            first = sympy.S.Zero if axis < 3 else i - E.KV
            if not first.is_Integer or first < 0 or first + lengths[axis] > length:
                return None
            places.append(slice(int(first), int(first) + lengths[axis]))
            axes.append(axis)
        return cls(tuple(places), tuple(axes)) if len(set(axes)) == len(axes) else None

    def gradient(self, sums: Tensor, tensor: Tensor) -> Tensor:
        total = torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
        part = total[self.places]
        rest = (a for a in range(4) if a not in self.axes)
        part.copy_(sums.permute(*self.axes, *rest).view(part.shape))
        return total


@dataclass(frozen=True)
class DiagonalSums:
    """The gradient of one load by way of scratch memory; run like a kernel's launch.

    Leaves the float32 gradient of the captured tensor in tensors[`<name>_grad`].
    """

    name: str
    bands: Bands
    by_diagonal: E.load  # kv counts the diagonals
    part: Part | None
    spec: AttentionSpec
    sizes: tuple[int, ...]
    launches: Sequence[tuple[Extent, Callable[[Mapping[str, Tensor]], None]]]

    def __call__(self, tensors: dict[str, Tensor]) -> None:
        found = [self._sums(extent, launch, tensors) for extent, launch in self.launches]
        sums = found[0] if len(found) == 1 else torch.cat(found)
        lengths = self.bands.lengths
        sums = sums.narrow(1, self.bands.first_column, lengths[3]).reshape(lengths)
        tensors[f"{self.name}_grad"] = self._of_diagonals(sums, tensors)

    def _sums(self, extent: Extent, launch, tensors: Mapping[str, Tensor]) -> Tensor:
        """dS of an extent by outer and column."""
        outers = self.bands.outers if extent.outer is None else 1
        lengths = (extent.splits, outers, self.bands.block_q, self.bands.columns)
        # Only the first and last block_q columns have places that no tile writes to.
        scratch = torch.zeros(lengths, dtype=torch.float32, device=tensors["q_ptr"].device)
        launch({**tensors, f"{self.name}_ptr": scratch})
        return scratch.sum((0, 2))

    def _of_diagonals(self, sums: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        x, spec = self.by_diagonal, self.spec
        aux = [tensors[f"aux{i}"] for i in range(len(spec.aux))]
        if self.part is not None:
            return self.part.gradient(sums, aux[x.tensor])
        sums, moved = compressed(sums, x, spec, aux, self.sizes)
        return chained([(moved, sums)], spec, Shape(*sums.shape), x.tensor, aux, self.sizes)


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
    at = {E.Q: sympy.S.Zero, E.KV: E.KV - (shape.q_len - 1)}
    at |= {E.SQ: sympy.Integer(shape.q_len), E.SKV: sympy.Integer(shape.kv_len)}
    by_diagonal = x.xreplace(at)
    part = Part.of(by_diagonal, bands.lengths, tensors[f"aux{x.tensor}"].shape)
    return DiagonalSums(name, bands, by_diagonal, part, spec, sizes, launches)
