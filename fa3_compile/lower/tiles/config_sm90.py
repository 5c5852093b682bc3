"""Tile configurations of the Hopper kernel: what fits, and which to try first.

The order is that of kernels/sm90/tiles.json, measured in docs/kernel-notes.md. The first of
`candidates` that ptxas builds without a spill is taken, because what a printed score needs in
registers only the compiler knows.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace

from fa3_compile import resources

SHARED_MEMORY = 232448
# Scores, weights and output that a thread may hold, as D/2 + 3N/4, by the number of consumer
# warpgroups; beyond these even a plain score spills.
ACCUMULATORS = {1: 200, 2: 200, 3: 130}
# The same where a tile may be stored as a part, which needs a few registers more.
SPLIT_ACCUMULATORS = {1: 200, 2: 180, 3: 0}


@dataclass(frozen=True)
class Sm90Config:
    """One way to tile an attention. Printed configs can be pasted back.

    block_m        queries of a tile: 64 for each consumer warpgroup, of which there are 1 to 3
    block_n        keys of a tile: a multiple of 16
    longest_first  tiles are taken from a counter, the longest first, rather than in order
    ping_pong      warpgroups take turns to issue their products
    stages         key and value tiles in shared memory
    packed         a tile holds queries of several heads that share a KV head (PackGQA)
    split          the key blocks of a tile may be dealt to several thread blocks (split-KV)
    held_queries   products read queries from registers, not from shared memory each time
    optimistic     weights are computed against the row maximum of the blocks before, and once more
                   where that was too low
    dense_first    scores begin with the dense input or a table by kv - q, and held queries are
                   multiplied beforehand by the factor of their products
    ahead          columns of a block whose optimistic weights are computed while the values of the
                   block before are still multiplied
    """

    block_m: int
    block_n: int
    longest_first: bool = True
    ping_pong: bool = True
    stages: int = 2
    packed: bool = False
    split: bool = False
    held_queries: bool = False
    optimistic: bool = False
    dense_first: bool = False
    ahead: int = 0

    @property
    def threads(self) -> int:
        """Those of the consumers, and a warpgroup that loads."""
        return 128 * (self.block_m // 64 + 1)

    def shared_memory(self, dim_qk: int, dim_v: int, dense: int) -> int:
        """Bytes with one query stage, as forward_block.cuh lays them out. `dense` are those of an
        element of the dense input, 0 without one."""
        kv = 2 * self.block_n * (tile_width(dim_qk) + tile_width(dim_v))
        dense *= self.block_n * self.block_m
        return 2 * self.block_m * tile_width(dim_qk) + self.stages * (kv + dense) + 2048

    def fits(self, dim_qk: int, dim_v: int, dense: int = 0) -> bool:
        """Whether the tile can be expected to build without spills; `dense` as above."""
        if self.held_queries and not (panel_columns(dim_qk) == 64 and dim_qk <= 128):
            return False
        if dense == 4 and self.block_n % 32:  # whole panels
            return False
        accumulators = dim_v // 2 + 3 * self.block_n // 4
        limits = SPLIT_ACCUMULATORS if self.split else ACCUMULATORS
        return (
            accumulators <= limits[self.block_m // 64]
            and self.shared_memory(dim_qk, dim_v, dense) <= SHARED_MEMORY
        )


def tile_width(dim: int) -> int:
    """Columns that a head dim takes in shared memory."""
    return -(-dim // 32) * 32


def panel_columns(dim: int) -> int:
    """Columns of a panel of OperandTile: 64, or 32 where that wastes less."""
    return 64 if tile_width(dim) % 64 == 0 else 32


@functools.cache
def table() -> dict[int, dict[str, tuple[tuple[int, int], ...]]]:
    """kernels/sm90/tiles.json: largest V head dim -> column -> (queries, keys) of tiles."""
    rows = json.loads((resources.kernels() / "sm90" / "tiles.json").read_text())
    return {
        int(dim): {column: tuple(map(_tile, names.split())) for column, names in row.items()}
        for dim, row in rows["tiles by largest value head dim"].items()
    }


def _tile(name: str) -> tuple[int, int]:
    block_m, block_n = map(int, name.split("x"))
    return block_m, block_n


# Where weights are better computed before the row maximum is known to hold: the first tile of these
# columns, in the rows of the table from one value head dim to another (docs/kernel-notes.md).
OPTIMISTIC = {
    "full": (64, 192, {"optimistic": True}),
    "rows": (64, 192, {"optimistic": True}),
    "capped": (64, 128, {"optimistic": True}),  # softcaps of "scores"
    "masks": (128, 128, {"optimistic": True, "ahead": 48}),
    "dense": (64, 192, {"optimistic": True}),
    "wide dense": (64, 256, {"optimistic": True}),
}
# A first tile where registers are left for 48 columns ahead.
BARE = {128: Sm90Config(128, 128, held_queries=True, optimistic=True, ahead=48)}
_HELD = Sm90Config(128, 128, held_queries=True, optimistic=True)
_BEGINS = replace(_HELD, dense_first=True)
# The column of the table of dense inputs, by bytes of an element.
DENSE_COLUMNS = {2: "dense", 4: "wide dense"}
# A first tile of dense inputs, and one where scores may begin with them, by bytes of an element,
# row of the table and whether there is a mask.
DENSE = {
    (2, 64, False): Sm90Config(192, 128, optimistic=True),
    (2, 128, False): _HELD,
    (4, 128, True): replace(_HELD, block_n=64),
}
DENSE_FIRST = {
    (2, 64, False): _BEGINS,
    (2, 64, True): _BEGINS,
    (2, 128, False): replace(_BEGINS, ahead=48),
    (2, 128, True): replace(_BEGINS, ahead=32),
    (4, 64, False): _BEGINS,
    (4, 64, True): _BEGINS,
}


def table_first(dim_qk: int, dim_v: int, q_len: int, masked: bool) -> Sm90Config | None:
    """Where scores begin with a table by kv - q. Weights ahead gain nothing there."""
    if q_len <= 64 or dim_v > 128 or not _BEGINS.fits(dim_qk, dim_v):
        return None
    return replace(_BEGINS, longest_first=masked)


# For up to 64 queries, where loads bound: as many stages as fit, up to this many.
FEW_QUERIES = "64x128 64x64 64x32"
LARGEST_STAGES = 4


@functools.lru_cache(maxsize=1024)
def candidates(
    dim_qk: int,
    dim_v: int,
    q_len: int,
    masked: bool,
    plain: bool,
    dense: int,
    group: int = 1,
    split: bool = False,
    asks_mask: bool = False,
    capped: bool = False,
    begins: bool = False,
    bare: bool = False,
) -> tuple[Sm90Config, ...]:
    """What to build, the best first.

    plain      the score is linear in s, and no element has to be asked for its mask
    dense      bytes of an element of the dense input, 0 without one
    group      query heads that may share a tile
    split      key blocks are dealt out; always possible with few queries, whatever their keys
               are, so that a growing cache needs one kernel
    asks_mask  the mask reads captured tensors or is asked for each element, or weights are
    capped     the score is a softcap of s
    begins     it may begin with the dense tile
    bare       neither an affine term nor a first key needs registers of a row
    """
    if q_len <= 64:
        return tuple(_few_queries(dim_qk, dim_v, dense, packs(group, q_len)))
    largest = next(x for x in table() if dim_v <= x)
    row = table()[largest]
    column = "rows" if masked else "full"
    if not plain:
        column = "masks" if asks_mask else "scores"
    if dense:
        column = DENSE_COLUMNS[dense]
    configs = []
    for block_m, block_n in row[column]:
        if block_m == 192 and q_len <= 128:
            continue
        configs.append(
            Sm90Config(
                block_m,
                block_n,
                longest_first=masked and not split,
                split=split,
            )
        )
    configs = [x for x in configs if x.fits(dim_qk, dim_v, dense)]
    kind = "capped" if capped and column == "scores" else column
    if kind in OPTIMISTIC and not split and configs:
        least, most, changes = OPTIMISTIC[kind]
        if least <= largest <= most:
            first = replace(configs[0], **changes)
            configs = [first] * first.fits(dim_qk, dim_v, dense) + configs
    if bare and column in ("full", "rows") and not split:
        first = BARE.get(largest)
        if first is not None and first.fits(dim_qk, dim_v):
            configs = [replace(first, longest_first=masked), *configs]
    if dense and not split and not asks_mask:
        place = dense, largest, masked
        found = [DENSE_FIRST.get(place)] * begins + [DENSE.get(place)]
        configs = [
            replace(x, longest_first=masked)
            for x in found
            if x is not None and x.fits(dim_qk, dim_v, dense) and x.block_m <= max(128, q_len)
        ] + configs
    return tuple(configs)


def smallest(config: Sm90Config, dim_qk: int, dim_v: int) -> Sm90Config | None:
    """One warpgroup in place of those of `config`, for more tiles."""
    block_n = 128 if max(dim_qk, dim_v) <= 128 else 64
    found = Sm90Config(64, block_n, longest_first=config.longest_first, ping_pong=False)
    return found if found.fits(dim_qk, dim_v) else None


def variations(config: Sm90Config, dim_qk: int, dim_v: int, dense: int) -> list[Sm90Config]:
    """Every tile that fits and differs from `config` in size, stages or ping-pong."""
    few = config.block_m == 64
    found = [
        replace(
            config,
            block_m=block_m,
            block_n=block_n,
            stages=stages,
            ping_pong=ping_pong,
            ahead=min(config.ahead, block_n),
        )
        for block_m in ((64,) if few else (192, 128))
        for block_n in range(176, 0, -16)
        for stages in (range(LARGEST_STAGES, 1, -1) if few else (2,))
        for ping_pong in ((False,) if few else (True, False))
    ]
    return [x for x in found if x != config and x.fits(dim_qk, dim_v, dense)]


def _few_queries(dim_qk: int, dim_v: int, dense: int, packed: bool) -> list[Sm90Config]:
    if packed and dense:  # which is of one head
        return []
    configs = []
    for block_m, block_n in map(_tile, FEW_QUERIES.split()):
        config = Sm90Config(
            block_m, block_n, longest_first=False, ping_pong=False, packed=packed, split=True
        )
        staged = [replace(config, stages=n) for n in range(LARGEST_STAGES, 1, -1)]
        configs += [x for x in staged if x.fits(dim_qk, dim_v, dense)][:1]
    return configs


# ---- few queries, many keys ----

# In key blocks: what a tile costs beside its own, and what putting the parts together costs.
TILE_COST, COMBINE_COST = 1, 4


@dataclass(frozen=True)
class Packing:
    """How the query heads of a KV head share tiles of 64 rows.

    heads   of a tile
    rows    queries of each
    chunks  runs of `heads` heads that make the group, the last of which may be shorter
    """

    heads: int
    rows: int
    chunks: int


def packing(group: int, q_len: int) -> Packing:
    """The packing with the fewest tiles, whose last is not much emptier than the rest."""
    chunks = -(-group // 64)
    heads = -(-group // chunks)
    blocks = -(-q_len // (64 // heads))
    return Packing(heads, -(-q_len // blocks), chunks)


def packs(group: int, q_len: int) -> bool:
    """Whether packed tiles are fewer, so that keys and values are read less often."""
    if group == 1 or not 0 < q_len <= 64:
        return False
    found = packing(group, q_len)
    return found.chunks * -(-q_len // found.rows) < group


def split_count(tiles: int, blocks: int, processors: int) -> int:
    """How many parts of its key blocks each tile is dealt in.

    Thread blocks work through the parts in waves; as few parts as fill one wave or a few are
    tried, and the cheapest is taken.
    """

    def cost(parts: int) -> int:
        waves = -(-tiles * parts // processors)
        combine = COMBINE_COST if parts > 1 else 0
        return waves * (-(-blocks // parts) + TILE_COST) + combine

    filling = (min(waves * processors // tiles, blocks) for waves in range(1, 9))
    return min((cost(n), n) for n in {1, *filling} if n > 0)[1]
