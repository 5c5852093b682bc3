"""What a random program that writes its attention out is made of.

Names are those of `layouts`, `masks`, `parts` and `mutants`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.programs import given, softmaxes
from tests.programs.expressions import Expression
from tests.programs.masks import MASKS, positions
from tests.programs.parts import Sizes

# Of two attentions: "difference" of their weights; "beside a call" of PyTorch's own.
TWO_ATTENTIONS = ("shared K and V", "shared scores", "difference", "beside a call")
OF_LSE = ("LSE", "function of LSE", "LSE by hand")
# Added to the weights.
BESIDE = ("function beside", "identity beside", "number beside")
USES = ("residual", "twice", "slice", "sum", "in place", "flat", *OF_LSE, *TWO_ATTENTIONS, *BESIDE)
# "flat batch" names every size but the length; "strided" cuts V's length to K's.
STATIC = ("flat batch", "strided", "cache that is written", "one buffer")
ADDITIVE = ("additive padding", "added empty sequence", "two paddings")
MAY_HIDE_ALL = ("padding", "empty sequence", *ADDITIVE, "random mask", "documents", "lengths")
# Whose weights have other batches than the operator, or heads in another order.
EXPRESSION, GIVEN = "expression", "given"
OTHER_BATCHES = ("windows", "one batch of K", "no batch", "gqa tiled")
BY_BATCH = (*MAY_HIDE_ALL, "bias", EXPRESSION)
K_WRITTEN = "K written after the scores"


@dataclass
class Recipe:
    """The parts of one program; "" for none. `other` sizes are those of a second call. `of_scores` and
    `of_values` are the two products, `kernels` and below are how it is run."""

    layout: str
    sizes: Sizes
    other: Sizes | None
    of_scores: str
    of_values: str
    keys: str
    masks: list[str]
    how: str
    fill: str
    combine: str
    modifiers: list[str]
    captured: str
    expression: Expression | None
    scale: str
    softmax: str
    late: str
    sink: str
    after: str
    after_masks: list[str]
    use: str
    context: str
    dtype: torch.dtype | None
    mutant: str
    seed: int
    dynamic: bool | None
    training: bool
    kernels: tuple[str, ...] | None
    numbers: str
    frozen: str

    @property
    def on_gpu(self) -> bool:
        return self.sizes.device != "cpu"

    @property
    def plain(self) -> bool:
        """Weights that are not normalised."""
        return self.softmax in softmaxes.UNNORMALISED

    @property
    def given(self) -> str:
        """What is done with a tensor of `given`, "" without one."""
        return self.captured.split(" ", 2)[2] if self.captured.startswith(GIVEN) else ""

    @property
    def by_batch(self) -> bool:
        """What it captures differs from batch to batch."""
        return self.captured in BY_BATCH or self.captured.startswith(f"{GIVEN} b")

    @property
    def hides(self) -> bool:
        """What it captures hides keys."""
        return self.captured in MAY_HIDE_ALL or self.given in given.HIDING

    @property
    def adds_lowest(self) -> bool:
        """What it captures adds finfo.min to scores."""
        return self.captured in ADDITIVE or self.given == given.ADDITIVE

    @property
    def grows(self) -> bool:
        """Scores may be many times the product."""
        factors = ("temperature", EXPRESSION)
        return "cube" in self.modifiers or self.captured in factors or self.given in given.FACTORS

    @property
    def dead(self) -> bool:
        """There may be rows without a key."""
        also = self.expression or self.hides or self.captured == "infinite bias"
        if self.captured in MAY_HIDE_ALL or self.masks and also:
            return True
        return bool(self.masks) and self._masks_hide_rows()

    def of_other_lengths(self) -> Recipe:
        """The same, for the second call."""
        sizes = self.other or self.sizes
        made = self.expression and self.expression.of_lengths(sizes.n, sizes.m, sizes.device)
        return replace(self, sizes=sizes, expression=made)

    def _masks_hide_rows(self) -> bool:
        return any(self._masks_hide_rows_of(x) for x in (self.sizes, self.other) if x)

    def _masks_hide_rows_of(self, sizes: Sizes) -> bool:
        at = positions(torch.empty(sizes.n, sizes.m))
        seen: Tensor | None = None
        for each in (MASKS[name](*at) for name in self.masks):
            both = torch.logical_or if self.combine == "or" else torch.logical_and
            seen = each if seen is None else both(seen, each)
        return seen is not None and not bool(seen.any(-1).all())

    def made_of(self) -> dict[str, str]:
        """Its parts by the names under which they are counted."""
        masks = f"{self.combine} of {self.masks} by {self.how} of {self.fill}"
        return {
            "layout": self.layout,
            "products": f"{self.of_scores}, {self.of_values}",
            "keys": self.keys,
            "lengths": f"{self.sizes.n} {self.sizes.m}",
            "second call": "of other lengths" if self.other else "",
            "head dim": str(self.sizes.dim),
            "masks": masks if self.masks else "",
            "modifiers": " ".join(self.modifiers),
            "captured": GIVEN if self.given else self.captured,
            GIVEN: self.given,
            "given axes": self.captured.split(" ")[1] if self.given else "",
            EXPRESSION: str(self.expression.text if self.expression else ""),
            "late": self.late,
            "scale": self.scale,
            "softmax": self.softmax,
            "sink": self.sink,
            "after": self.after,
            "masks after": " ".join(self.after_masks),
            "use": self.use,
            "context": self.context,
            "mutant": self.mutant,
            "numbers": self.numbers,
            "frozen": self.frozen,
        }
