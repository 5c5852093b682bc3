"""What a random program is drawn from: named choices, some of which may be given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st


class Choices:
    """Draws values by name. A name that is in `kept` has that value instead.

    made  every value by its name, for another program to keep
    """

    def __init__(self, draw: st.DrawFn, kept: Mapping[str, Any] | None = None) -> None:
        self._draw, self._kept = draw, kept or {}
        self.made: dict[str, Any] = {}

    def one_of(self, name: str, *values: Any) -> Any:
        return self._made(name, st.sampled_from(values))

    def up_to_two(self, name: str, values: Sequence[str], *, unique: bool = False) -> list[str]:
        return self._made(name, st.lists(st.sampled_from(values), max_size=2, unique=unique))

    def _made(self, name: str, strategy: st.SearchStrategy[Any]) -> Any:
        value = self._kept[name] if name in self._kept else self._draw(strategy)
        self.made[name] = value
        return value
