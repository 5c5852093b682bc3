"""Lists of the blocks that a mask leaves, as the source of a Triton kernel.

For masks of captured tensors, since where documents begin and what is padding is known when the
attention runs; and for those that leave holes between the keys of a row. One cheap kernel looks
at the mask alone and writes, for each block of queries or of keys, which blocks of the other axis
it fills and which it cuts; the attention's kernels then walk those.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from fa3_compile.lower.printers import hoist
from fa3_compile.lower.render import render
from fa3_compile.lower.render.render import Writer
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.blocks import kv_bounds, may_have_holes, q_bounds

FIRST, LAST = sympy.symbols("first_of_tile last_of_tile", integer=True, nonnegative=True)
# Scores of a head below which another launch costs more than the blocks it saves.
WORTHWHILE = 2**20


def uses_lists(spec: AttentionSpec, q_len: int, kv_len: int) -> bool:
    """Whether the kernels for these lengths walk lists."""
    holes = bool(E.loads_in(spec.mask)) or may_have_holes(spec.mask)
    return holes and q_len * kv_len >= WORTHWHILE


def owner(spec: AttentionSpec) -> str:
    """The number of a list's head in all lists: heads that have the same mask share one."""
    axes = spec.mask.free_symbols
    both = {(True, True): "b * H + h", (True, False): "b", (False, True): "h"}
    return both.get((E.B in axes, E.H in axes), "0")


@dataclass(frozen=True)
class BlocksKey:
    """The kernel that writes lists for blocks of queries (`walks` "kv") or of keys ("q")."""

    spec: AttentionSpec
    walks: str

    @property
    def digest(self) -> str:
        """Names the kernel on disk."""
        return render.digest(self)

    def source(self) -> str:
        """The kernel's source. UnprintableError where there is no text for the mask."""
        writer = Writer(self.spec, False, self.walks, guards_keys=False)
        hoister = hoist.Hoister("m", writer.known, self.walks)
        placed = hoister.place(writer.printer.rewrite(self.spec.mask))
        loop = writer.statements(hoister)
        bounds, length = (kv_bounds, E.SKV) if self.walks == "kv" else (q_bounds, E.SQ)
        lo, hi = bounds(self.spec.mask, FIRST, LAST)
        fields = Fields(
            spec_text=str(self.spec),
            fast_tanh=False,
            random=self.spec.mask.has(E.uniform),
            walks=self.walks,
            aux_pointers=writer.aux_pointers,
            integers=writer.integers,
            preamble=writer.preamble,
            loop=loop,
            mask=writer.body(placed),
            lo=writer.bound_text(sympy.Max(lo, 0)),
            hi=writer.bound_text(sympy.Min(hi, length)),
            outer=owner(self.spec),
        )
        return render.render_template("block_lists.py.jinja", fields)


@dataclass(frozen=True)
class Fields:
    """What the template prints."""

    spec_text: str
    fast_tanh: bool
    random: bool
    walks: str
    aux_pointers: list[str]
    integers: list[str]
    preamble: list[str]
    loop: list[str]
    mask: str
    lo: str
    hi: str
    outer: str
