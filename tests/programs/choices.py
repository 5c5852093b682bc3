"""What a random program is drawn from: named choices, some of which may be given."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from hypothesis import strategies as st


class Source(Protocol):
    """Where choices come from."""

    def one(self, values: Sequence[Any]) -> Any: ...

    def some(self, values: Sequence[Any], most: int, unique: bool) -> list[Any]: ...


class Drawn:
    """Hypothesis, which finds a smaller program where one is wrong."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    def one(self, values: Sequence[Any]) -> Any:
        return self._draw(st.sampled_from(values))

    def some(self, values: Sequence[Any], most: int, unique: bool) -> list[Any]:
        return self._draw(st.lists(st.sampled_from(values), max_size=most, unique=unique))


class Random:
    """A generator, which draws little twice."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def one(self, values: Sequence[Any]) -> Any:
        return self._random.choice(values)

    def some(self, values: Sequence[Any], most: int, unique: bool) -> list[Any]:
        count = self._random.randint(0, most)
        if unique:
            return self._random.sample(values, count)
        return self._random.choices(values, k=count)


class Choices:
    """Values by name. A name that is in `kept` has that value.

    made  every value by its name, for another program to keep
    """

    def __init__(self, source: Source, kept: Mapping[str, Any] | None = None) -> None:
        self._source, self._kept = source, kept or {}
        self.made: dict[str, Any] = {}

    def one_of(self, name: str, *values: Any) -> Any:
        found = self._kept[name] if name in self._kept else self._source.one(values)
        self.made[name] = found
        return found

    def up_to_two(self, name: str, values: Sequence[str], *, unique: bool = False) -> list[str]:
        found = self._kept[name] if name in self._kept else self._source.some(values, 2, unique)
        self.made[name] = found
        return found
