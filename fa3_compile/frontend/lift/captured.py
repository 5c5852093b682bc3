"""What the loads of an expression read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import fx

from fa3_compile.frontend.dynamo.graph import example_value, may_be_infinite
from fa3_compile.spec.expr import Expr, load


class Diagonals(NamedTuple):
    """A tensor that is the same along the diagonals of two of its dimensions, and along `idle`
    ones. What is read of it has neither: its first column, from the end, and behind it its first
    row are the last dimension, element 0 of which is the lowest of column - row."""

    row: int
    column: int
    idle: tuple[int, ...]


class Arranged(NamedTuple):
    """A tensor of queries and keys with its keys side by side.

    split  (dim, queries, keys) of a dimension that is both
    order  of the dimensions in memory, after that; None for that which they have
    """

    split: tuple[int, Expr, Expr] | None
    order: tuple[int, ...] | None


class Captured(NamedTuple):
    """What a load reads: a Dynamo node, and the node since which it holds the value.

    diagonals  if it is read as a vector by the distance
    places     what is read so, [distances]: the tensor's rows along `dim`, which are gathered from
               there and become its last dimension
    arranged   if its keys are brought side by side
    """

    source: fx.Node
    since: fx.Node
    diagonals: Diagonals | None = None
    places: Captured | None = None
    dim: int = 0
    arranged: Arranged | None = None

    @property
    def dtype(self) -> torch.dtype:
        return example_value(self.source).dtype

    @property
    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and example_value(self.source).requires_grad


class Seed(NamedTuple):
    """What the load of a dropout's seed reads: an int64 [1] that the rewrite draws.

    dropout  the Dynamo node in whose place it is drawn; None for the attention's own
    number   tells the seeds of one region apart
    """

    dropout: fx.Node | None
    number: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.int64

    @property
    def needs_grad(self) -> bool:
        return False


def is_by_distance(read: load, loads: Sequence[Captured | Seed]) -> bool:
    """Whether what is read is a tensor that is the same along its diagonals."""
    source = loads[read.tensor]
    return isinstance(source, Captured) and source.diagonals is not None


def reads_infinite(read: Sequence[load], loads: Sequence[Captured | Seed]) -> bool:
    """Whether one of these reads something, among what `loads` are, that may be infinite."""
    sources = [loads[x.tensor] for x in read]
    return any(isinstance(x, Captured) and may_be_infinite(x.source) for x in sources)
