"""A grammar of attention programs: attention written out (`by_hand`), and calls of PyTorch's
own (`calls`).

`programs()` draws one. A program is plain PyTorch, put together from closures, so that Dynamo
traces what a user would have written. A mutant is a program to which something was done: it may
be attention no more, which must not be fused, or attention of which more is used than the output.
"""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import strategies as st

from tests.programs.by_hand import by_hand
from tests.programs.calls import call
from tests.programs.choices import Choices, Drawn, Source
from tests.programs.program import Program

# What the programs of a family have in common: all that their kernel is made for.
KEPT = (
    "spelling", "n", "dim", "masks", "how", "fill", "combine", "modifiers", "captured", "given",
    "expression", "scale",
    "softmax", "late", "sink", "after", "masks after", "dtype", "training", "kernels",
    "attention", "attn_mask", "mask mods", "block", "score mod",
)  # fmt: skip


@st.composite
def programs(draw: st.DrawFn, device: str = "cpu") -> Program:
    """Programs with their arguments; on a GPU of sizes that a kernel has several tiles of."""
    return program(Choices(Drawn(draw)), device)


def family(source: Source, device: str, count: int) -> Iterator[Program]:
    """`count` programs of the same scores and softmax in different layouts, products, lengths, uses
    and contexts. What takes seconds is a kernel."""
    choices = Choices(source)
    yield program(choices, device)
    kept = {name: choices.made[name] for name in KEPT if name in choices.made}
    for _ in range(count - 1):
        yield program(Choices(source, kept), device)


def program(choices: Choices, device: str) -> Program:
    """The program of these choices."""
    written = choices.one_of("spelling", "by hand", "by hand", "by hand", "call") == "by hand"
    return by_hand(choices, device) if written else call(choices, device)
