"""One random attention program, whatever it was drawn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

Expected = Literal["fused", "left", "either"]


class Program:
    """A function of tensors, its arguments, how it is run, and what it was made of.

    again      arguments of other lengths, for a second call
    expected   "either" where fusing is a matter of taste: only the numbers count
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: tuple[Tensor, ...],
        made_of: dict[str, str],
        expected: Expected,
        run: dict[str, Any],
        again: tuple[Tensor, ...] | None = None,
    ):
        self.function, self.arguments, self.made_of = function, arguments, made_of
        self.expected, self.run, self.again = expected, run, again

    def __repr__(self) -> str:
        return f"Program({self.made_of}, expected={self.expected!r}, run={self.run})"
