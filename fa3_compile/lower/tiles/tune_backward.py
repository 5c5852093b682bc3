"""The shipped tile configurations of the Triton backward.

`keys` is the kernel that owns a KV block and writes dK and dV, `queries` the one that owns a
query block and writes dQ, `dense` those that write gradients of tensors of queries and keys, of
which `diagonals` add up what lies on the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fa3_compile.lower.choose import Problem
from fa3_compile.lower.printers.hoist import ELEMENT, level
from fa3_compile.lower.tiles.config import TritonConfig, bits, head_class, nearest_arch
from fa3_compile.lower.tiles.tune_forward import ROW
from fa3_compile.spec.expr import loads_in
from fa3_compile.spec.shared_loads import keys_share

C = TritonConfig


@dataclass(frozen=True)
class Configs:
    """Tiles of one backward."""

    keys: TritonConfig
    queries: TritonConfig
    dense: TritonConfig | None = None  # as queries
    along: TritonConfig | None = None  # of diagonals; as queries

    @property
    def diagonals(self) -> TritonConfig:
        return self.along or self.queries


# (arch, head class) -> for 16 bits. On sm_90 the fastest measured of about ten each, causal at
# 16k; the widest spill a little (tests/numerics/test_triton_compile.py), and win all the same.
TABLE: dict[tuple[tuple[int, int], int], Configs] = {
    ((8, 0), 64): Configs(C(32, 128, 8, 3), C(128, 32, 4, 3)),
    ((8, 0), 96): Configs(C(32, 128, 8, 2), C(128, 32, 8, 2)),
    ((8, 0), 128): Configs(C(32, 128, 8, 2), C(128, 32, 8, 2)),
    ((8, 0), 192): Configs(C(32, 32, 8, 1), C(64, 32, 8, 1)),
    ((8, 0), 256): Configs(C(32, 64, 8, 1), C(64, 32, 8, 1)),
    ((8, 9), 64): Configs(C(32, 128, 4, 2), C(128, 32, 4, 2)),
    ((8, 9), 96): Configs(C(32, 64, 4, 2), C(64, 32, 4, 2)),
    ((8, 9), 128): Configs(C(32, 64, 4, 2), C(64, 32, 4, 2)),
    ((8, 9), 192): Configs(C(16, 64, 8, 1), C(64, 16, 8, 1)),
    ((8, 9), 256): Configs(C(16, 64, 8, 1), C(64, 16, 8, 1)),
    ((9, 0), 64): Configs(C(64, 64, 4, 3), C(128, 64, 4, 3)),
    ((9, 0), 96): Configs(C(64, 128, 8, 2), C(128, 64, 8, 3)),
    ((9, 0), 128): Configs(C(64, 128, 8, 3), C(128, 64, 8, 3)),
    ((9, 0), 192): Configs(C(64, 64, 8, 2), C(128, 32, 8, 2)),
    ((9, 0), 256): Configs(C(64, 64, 8, 2), C(128, 32, 8, 2)),
    ((10, 0), 64): Configs(C(64, 128, 8, 2), C(128, 64, 8, 2)),
    ((10, 0), 96): Configs(C(64, 128, 8, 1), C(128, 64, 8, 2)),
    ((10, 0), 128): Configs(C(64, 128, 8, 1), C(128, 64, 8, 2)),
    ((10, 0), 192): Configs(C(32, 64, 8, 1), C(64, 32, 8, 1)),
    ((10, 0), 256): Configs(C(32, 64, 8, 1), C(64, 32, 8, 1)),
}
TABLE |= {((12, 0), d): x for (arch, d), x in list(TABLE.items()) if arch == (8, 9)}
# For `diagonals`: what spills least (at most 84 bytes), on sm_90 at 128 the fastest of nine. A sum
# of a tile's size is kept beside the score and dP.
ALONG: dict[tuple[tuple[int, int], int], TritonConfig] = {
    ((8, 0), 64): C(64, 32, 4, 2),
    ((8, 0), 96): C(64, 32, 4, 2),
    ((8, 0), 128): C(64, 32, 4, 2),
    ((8, 0), 192): C(64, 32, 4, 1),
    ((8, 0), 256): C(64, 32, 8, 1),
    ((9, 0), 64): C(64, 64, 4, 2),
    ((9, 0), 96): C(64, 64, 8, 2),
    ((9, 0), 128): C(128, 64, 8, 2),
    ((9, 0), 192): C(64, 64, 8, 2),
    ((9, 0), 256): C(64, 64, 8, 1),
    ((10, 0), 64): C(64, 64, 8, 2),
    ((10, 0), 96): C(128, 64, 8, 1),
    ((10, 0), 128): C(128, 64, 8, 1),
    ((10, 0), 192): C(128, 64, 8, 1),
    ((10, 0), 256): C(64, 32, 8, 1),
}
ALONG |= {
    (x, d): tile for (arch, d), tile in ALONG.items() if arch == (8, 0) for x in ((8, 9), (12, 0))
}
# A tile of a captured tensor beside those of the score, P and dP.
DENSE_KEYS = {((9, 0), 96): C(32, 128, 8, 2), ((9, 0), 128): C(32, 128, 8, 2)}
# The numbers of dropout beside them, or a row's sums of dS and P: without, 780 bytes are spilled.
SMALLER_QUERIES = {((9, 0), 64): C(64, 64, 4, 3)}
# float32 multiplies without tensor cores ("ieee"): small tiles, the same everywhere.
FLOAT32 = {
    64: Configs(C(32, 32, 8, 1), C(32, 32, 8, 1)),
    96: Configs(C(32, 32, 8, 1), C(32, 32, 8, 1)),
    128: Configs(C(16, 32, 8, 1), C(32, 16, 8, 1)),
    192: Configs(C(16, 16, 8, 1), C(16, 16, 8, 1)),
    256: Configs(C(16, 16, 8, 1), C(16, 16, 8, 1)),
}


def table_configs(problem: Problem) -> Configs:
    """The shipped configurations."""
    if bits(problem.dtype) == 32:
        return FLOAT32[head_class(problem)]
    arch = nearest_arch(problem.capability or (8, 0))
    row = ROW.get(arch, arch), head_class(problem)
    configs = replace(TABLE[row], along=ALONG[row])
    queries = SMALLER_QUERIES.get(row, configs.queries)
    wanted = [i for i, needs_grad in enumerate(problem.aux_needs_grad) if needs_grad]
    if problem.spec.weight is not None:
        configs = replace(configs, queries=queries)
    elif keys_share(problem.spec, wanted):
        configs = replace(configs, queries=queries, dense=configs.queries)
    dense = any(level(x) == ELEMENT for x in loads_in(problem.spec.score))
    return replace(configs, keys=DENSE_KEYS[row]) if dense and row in DENSE_KEYS else configs
