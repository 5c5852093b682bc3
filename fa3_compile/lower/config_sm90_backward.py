"""Tile configurations of the Hopper backward: what to try, the best first.

Measured in docs/kernel-notes.md. The first that ptxas builds without a spill is taken.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sm90BackwardConfig:
    """One way to tile a backward. Printed configs can be pasted back.

    block_m        queries of a step: 64, or 64 for each consumer warpgroup
    block_n        keys of a tile: 64 for each consumer warpgroup
    longest_first  tiles are taken from a counter, the longest first, rather than in order
    early_values   dV is issued before dS is computed, where registers allow that
    """

    block_m: int
    block_n: int
    longest_first: bool = True
    early_values: bool = True

    @property
    def threads(self) -> int:
        """Those of the consumers, and a warpgroup that loads."""
        return 128 * (self.block_n // 64 + 1)

    @property
    def splits_columns(self) -> bool:
        """Whether warpgroups share out the columns of dQ rather than its rows."""
        return self.block_m == 64 and self.block_n > 64

    def sum_columns(self, dim_qk: int) -> int:
        """Columns of dQ that a warpgroup computes."""
        return 64 if self.splits_columns else dim_qk

    def sum_floats(self, dim_qk: int) -> int:
        """fp32 sums of a query block's dQ."""
        return self.block_n * self.sum_columns(dim_qk)

    def tile_dim(self, dim_qk: int) -> int:
        """The width of Q and K in shared memory."""
        return self.block_n if self.splits_columns else dim_qk


def candidates(dim_qk: int, dim_v: int, masked: bool) -> list[Sm90BackwardConfig]:
    """What to build, the best first; nothing for head dims beyond 128."""
    if max(dim_qk, dim_v) > 128:
        return []
    rows = (128, 64) if max(dim_qk, dim_v) <= 64 else (64,)
    return [
        Sm90BackwardConfig(block_m, 128, longest_first=masked, early_values=early)
        for block_m in rows
        for early in (True, False)
    ]
