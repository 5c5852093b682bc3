"""What goes wrong, in words for the person who meets it: what happened, where, and what to do.

`Decline` is no error: it is how a stage says that it leaves a region as the user wrote it.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.fx import Node


# The hint of a decline that is as it should be.
NOTHING = "There is nothing to change: PyTorch does this as well."


class Fa3Error(Exception):
    """An error whose text says what happened, where, and what to do about it."""

    def __init__(self, what: str, *, where: str, todo: str) -> None:
        self.what, self.where, self.todo = what, where, todo
        super().__init__(f"{what}\n  where: {where}\n  to do: {todo}")


class OptionError(Fa3Error, ValueError):
    """An option or environment variable with an unknown name or an illegal value."""

    @classmethod
    def unknown(
        cls,
        name: str,
        legal: Iterable[str],
        *,
        where: str,
        others: Iterable[str] = (),
        like: str = "",
    ) -> OptionError:
        """`name`, meant as `like`, is none of `legal`, which the message lists, nor of `others`."""
        legal = list(legal)
        close = nearest(like or name, [*legal, *others])
        did_you_mean = f"did you mean {close!r}? " if close else ""
        return cls(
            f"unknown name {name!r}",
            where=where,
            todo=f"{did_you_mean}The names are {', '.join(legal)}"
            + (", and every key of torch._inductor.config" if others else ""),
        )

    @classmethod
    def illegal(cls, name: str, value: object, takes: str, *, where: str) -> OptionError:
        """`name` is an option and takes something else than `value`."""
        return cls(
            f"option {name!r} cannot be {value!r} (of type {type(value).__name__})",
            where=where,
            todo=f"set {name!r} to {takes}",
        )


class InternalError(Fa3Error, RuntimeError):
    """A bug in fa3_compile: raised under the option `strict`, logged once otherwise."""

    def __init__(self, what: str, *, where: str) -> None:
        super().__init__(
            what,
            where=where,
            todo="this is a bug in fa3_compile: please report it with this message. Until then, "
            "options={'strict': False} leaves the graph as it was wherever this happens",
        )


class Decline(Exception):
    """A region stays as the user wrote it, and this is why.

    Raised by any front-end stage; caught in one place, the region loop, which fills in `stage`
    and records it in the report.

    stage    the stage that declined: "trace", "detect", "lift", ...; set by the region loop
    code     the reason as an identifier in kebab-case: "weights-used"
    node     the node of the graph at which it was decided, or None for the whole region
    message  the reason as a sentence; by default the words of `code`
    hint     what the user could change to have the region fused
    """

    def __init__(
        self,
        code: str,
        node: Node | None = None,
        hint: str = "",
        *,
        message: str = "",
        stage: str = "",
    ) -> None:
        self.code, self.node, self.hint, self.stage = code, node, hint, stage
        self.message = message or code.replace("-", " ")
        super().__init__(code, self.message)

    def __str__(self) -> str:
        at = f" at {self.node}" if self.node is not None else ""
        return f"{self.message}{at}" + (f" ({self.hint})" if self.hint else "")


def nearest(name: str, legal: Iterable[str]) -> str | None:
    """The legal name that `name` was probably meant to be, or None when none is close."""
    close = get_close_matches(name.lower(), list(legal), n=1, cutoff=0.6)
    return close[0] if close else None
