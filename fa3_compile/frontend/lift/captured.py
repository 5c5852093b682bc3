"""What the loads of an expression read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import fx

from fa3_compile.frontend.dynamo.graph import example_value, may_be_infinite
from fa3_compile.spec.expr import load


class Captured(NamedTuple):
    """What a load reads: a Dynamo node, and the node since which it holds the value."""

    source: fx.Node
    since: fx.Node

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


def reads_infinite(read: Sequence[load], loads: Sequence[Captured | Seed]) -> bool:
    """Whether one of these reads something, among what `loads` are, that may be infinite."""
    sources = [loads[x.tensor] for x in read]
    return any(isinstance(x, Captured) and may_be_infinite(x.source) for x in sources)
