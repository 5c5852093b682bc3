"""Tile configurations of the Hopper backward: what to try, the best first.

Measured in docs/kernel-notes.md. The first that ptxas builds without a spill is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fa3_compile.lower.tiles.config_sm90 import SHARED_MEMORY, tile_width


@dataclass(frozen=True)
class Sm90BackwardConfig:
    """One way to tile a backward. Printed configs can be pasted back.

    block_m        queries of a step: 64, or 64 for each consumer warpgroup
    block_n        keys of a tile: 64 for each consumer warpgroup
    longest_first  tiles are taken from a counter, the longest first, rather than in order
    grouped        several query heads share a KV head
    early_values   dV is issued before dS is computed, where registers allow that
    late_dq        dQ is computed a step later, so that no warpgroup waits for the other's dS
    wide           two warpgroups take a product each of the same 64 keys (head dims beyond 128)
    bits           what each element is asked, its mask or whether dropout keeps it, is found under
                   the products before, as a bit each
    in_turn        a block works the batches that share a dense input one after the other: the first
                   stores its gradient, to which the others add
    finishes       dQ is rounded to 16 bits by the main kernel's idle warps, not after it
    beside         row terms of heads that are worked next are computed, and dQ of those that were
                   worked before is rounded, by the main kernel between its tiles; wide ones only
    """

    block_m: int
    block_n: int
    longest_first: bool = True
    grouped: bool = False
    early_values: bool = True
    late_dq: bool = False
    wide: bool = False
    bits: bool = False
    in_turn: bool = False
    finishes: bool = False
    beside: bool = False

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

    def may_finish(self, dim_qk: int) -> bool:
        """Whether the main kernel can round dQ: of the columns that it multiplies all are Q's, and
        warps take 16 at a time."""
        columns = self.sum_columns(dim_qk)
        return sum(columns[: None if self.splits_columns or self.wide else 1]) == dim_qk and all(
            x % 16 == 0 for x in columns
        )

    def tile_dim(self, dim_qk: int) -> int:
        """The width of Q and K in shared memory."""
        return 64 * self.warpgroups if self.splits_columns else dim_qk

    def shared_memory(self, dim_qk: int, dim_v: int, dense_tile: bool) -> int:
        """Bytes, as kernels/sm90/backward_block.cuh lays them out."""
        width = tile_width(self.tile_dim(dim_qk)) + tile_width(dim_v)
        panel = 2 * self.block_m * self.block_n
        scores = panel * (2 if self.wide or self.late_dq else 1) + (8192 if self.wide else 0)
        dense = 2 * panel if dense_tile else 0
        return (
            2 * (self.block_n + 2 * self.block_m) * width
            + scores
            + dense
            + 24 * self.block_m
            + 1536
        )

    def fits(self, dim_qk: int, dim_v: int, dense_tile: bool) -> bool:
        return self.shared_memory(dim_qk, dim_v, dense_tile) <= SHARED_MEMORY


def candidates(
    dim_qk: int,
    dim_v: int,
    masked: bool,
    grouped: bool,
    tile_gradient: str = "",
    asks_elements: bool = False,
) -> list[Sm90BackwardConfig]:
    """What to build, the best first.

    tile_gradient  how dS becomes the gradient of a dense input: see CudaBackwardKey
    asks_elements  each element is asked for its mask, or whether dropout keeps it
    """
    if asks_elements:
        plain = candidates(dim_qk, dim_v, masked, grouped, tile_gradient)
        return [replace(x, bits=True) for x in plain] + plain
    if max(dim_qk, dim_v) > 128:
        found = [Sm90BackwardConfig(64, 64, masked, grouped, wide=True)]
        return _in_turn_first(found, tile_gradient)
    # (rows, early values, late dQ); at 128 rows early values never fit.
    ways = [(64, True, True), (64, False, True), (64, True, False), (64, False, False)]
    if max(dim_qk, dim_v) <= 64:
        ways = [(128, False, True), (128, False, False), *ways]
    found = [Sm90BackwardConfig(rows, 128, masked, grouped, *way) for rows, *way in ways]
    return _in_turn_first(found, tile_gradient)


def _in_turn_first(
    configs: list[Sm90BackwardConfig], tile_gradient: str
) -> list[Sm90BackwardConfig]:
    """Stored by the first batch and added to by the others: 392 TFLOP/s where adding takes 322."""
    return [replace(x, in_turn=True) for x in configs if tile_gradient == "add"] + configs
