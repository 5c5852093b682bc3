"""Tile configurations of the Hopper kernel: what fits, and which to try first.

Measured in docs/kernel-notes.md. The first of `candidates` that ptxas builds without a spill is
taken, because what a printed score needs in registers only the compiler knows.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARED_MEMORY = 232448
# Scores, weights and output that a thread may hold, as D/2 + 3N/4, by the number of consumer
# warpgroups; beyond these even a plain score spills.
ACCUMULATORS = {1: 200, 2: 200, 3: 130}


@dataclass(frozen=True)
class Sm90Config:
    """One way to tile an attention. Printed configs can be pasted back.

    block_m        queries of a tile: 64 for each consumer warpgroup, of which there are 1 to 3
    block_n        keys of a tile: a multiple of 16
    longest_first  tiles are taken from a counter, the longest first, rather than in order
    ping_pong      warpgroups take turns to issue their products
    lazy           the row maximum is raised only where a score exceeds it by 8 in the exponent
    """

    block_m: int
    block_n: int
    longest_first: bool = True
    ping_pong: bool = True
    lazy: bool = True

    @property
    def threads(self) -> int:
        """Those of the consumers, and a warpgroup that loads."""
        return 128 * (self.block_m // 64 + 1)

    def shared_memory(self, dim_qk: int, dim_v: int, dense_tile: bool) -> int:
        """Bytes with one query stage, as attention_fwd.cuh lays them out."""
        kv = 2 * self.block_n * (_padded(dim_qk) + _padded(dim_v))
        dense = self.block_n // 64 * self.block_m * 128 if dense_tile else 0
        return 2 * self.block_m * _padded(dim_qk) + 2 * (kv + dense) + 2048

    def fits(self, dim_qk: int, dim_v: int, dense_tile: bool = False) -> bool:
        """Whether the tile can be expected to build without spills."""
        if dense_tile and self.block_n % 64:
            return False
        accumulators = dim_v // 2 + 3 * self.block_n // 4
        return (
            accumulators <= ACCUMULATORS[self.block_m // 64]
            and self.shared_memory(dim_qk, dim_v, dense_tile) <= SHARED_MEMORY
        )


def _padded(dim: int) -> int:
    return -(-dim // 32) * 32


# Largest V head dim -> tiles for a linear score and masks that are row intervals; for any other.
# 192 x 128 at 64 is of the second for its dense tiles, which are 64 or 128 keys wide.
TILES: dict[int, tuple[str, str]] = {
    64: ("192x128 192x96 128x128 128x96 128x64", "192x96 192x128 192x64 128x128 128x64"),
    96: ("192x96 192x80 128x128 128x96 128x64", "128x128 128x112 128x96 128x64"),
    128: ("192x80 192x64 128x128 128x96 128x64", "128x128 128x112 128x96 128x64"),
    160: ("128x112 128x96 128x80 128x64", "128x96 128x80 128x64 128x48"),
    192: ("128x96 128x80 128x64 128x48", "128x80 128x64 128x48 128x32"),
    256: ("128x80 128x64 128x48 128x32", "128x64 128x48 128x32 128x16"),
}
FEW_QUERIES = "64x128 64x96 64x80 64x64 64x48 64x32 64x16"


def candidates(
    dim_qk: int, dim_v: int, q_len: int, masked: bool, plain: bool, dense_tile: bool
) -> list[Sm90Config]:
    """What to build, the best first.

    plain  the score is linear in s, and no element has to be asked for its mask
    """
    names = TILES[next(x for x in TILES if dim_v <= x)][0 if plain else 1]
    if q_len <= 64:
        names = FEW_QUERIES
    configs = []
    for name in names.split():
        block_m, block_n = map(int, name.split("x"))
        if block_m == 192 and q_len <= 128:
            continue
        configs.append(
            Sm90Config(block_m, block_n, longest_first=masked, ping_pong=max(dim_qk, dim_v) <= 192)
        )
    return [x for x in configs if x.fits(dim_qk, dim_v, dense_tile)]
