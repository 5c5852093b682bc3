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
    wide           two warpgroups take a product each of the same 64 keys (head dims beyond 128)
    """

    block_m: int
    block_n: int
    longest_first: bool = True
    early_values: bool = True
    wide: bool = False

    @property
    def warpgroups(self) -> int:
        """Those that multiply; one more loads."""
        return 2 if self.wide else self.block_n // 64

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    @property
    def splits_columns(self) -> bool:
        """Whether warpgroups share out whole panels of dQ's columns rather than its rows."""
        return not self.wide and self.block_m == 64 and self.block_n > 64

    def sum_columns(self, dim_qk: int) -> list[int]:
        """Columns of dQ that each warpgroup computes."""
        if self.wide:
            first = 128 if dim_qk > 128 else -(-dim_qk // 128) * 64
            return [first, dim_qk - first]
        return [64 if self.splits_columns else dim_qk] * self.warpgroups

    def sum_floats(self, dim_qk: int) -> int:
        """fp32 sums of a query block's dQ."""
        return 64 * sum(self.sum_columns(dim_qk))

    def tile_dim(self, dim_qk: int) -> int:
        """The width of Q and K in shared memory."""
        return 64 * self.warpgroups if self.splits_columns else dim_qk


def candidates(dim_qk: int, dim_v: int, masked: bool) -> list[Sm90BackwardConfig]:
    """What to build, the best first."""
    if max(dim_qk, dim_v) > 128:
        return [Sm90BackwardConfig(64, 64, longest_first=masked, wide=True)]
    rows = (128, 64) if max(dim_qk, dim_v) <= 64 else (64,)
    return [
        Sm90BackwardConfig(block_m, 128, longest_first=masked, early_values=early)
        for block_m in rows
        for early in (True, False)
    ]
