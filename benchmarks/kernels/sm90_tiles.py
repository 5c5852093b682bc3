"""Times every tile of the Hopper forward kernel: what kernels/sm90/tiles.json is made from.

    python benchmarks/kernels/sm90_tiles.py JOB ...

build [DIM ...]   anywhere: builds, and says what spills
time [DIM ...]    on a Hopper GPU: builds, then times
forms             anywhere: forms that spill in the first tile
table FILE.csv    anywhere: tiles.json from those times

bf16, B*S = 16384, H*D = 2048, S = 2048 and 8192, the calls of all tiles in turn. Prints the tiles
of each head dim and column in order of the product of their times; all times go to $OUT.
"""

from __future__ import annotations

import csv
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from fa3_compile import resources
from fa3_compile.lower.binaries.build_nvrtc import BuildError, load
from fa3_compile.lower.choose import Problem
from fa3_compile.lower.kernels import cuda_sm90
from fa3_compile.lower.kernels.cuda_sm90_keys import keys_of, layout_of
from fa3_compile.lower.render.render_cuda import CudaKey
from fa3_compile.lower.tiles.config_sm90 import DENSE_COLUMNS, Sm90Config, variations
from fa3_compile.spec.attention import AttentionSpec
from tests.numerics.forms import FORMS as FORMS_TESTED
from tests.numerics.forms import inputs, shape_for

OUT = Path(os.environ.get("OUT", "."))
WORKERS = int(os.environ.get("WORKERS", str(min(16, os.cpu_count() or 1))))
DIMS = (64, 80, 96, 128, 160, 192, 256)
LENGTHS = (2048, 8192)
LEAST_KEYS = 48
TOKENS, WIDTH = 16384, 2048
CAUSAL = "mask=(kv - q <= 0), dead=nan"
FORMS = {
    "full": "score={scale}*s",
    "rows": "score={scale}*s, " + CAUSAL,
    "scores": "score=50.0*tanh({capped}*s), " + CAUSAL,
    "dense": "score={scale}*s + load(0, 0, h, q, kv), aux=[float]",
    "wide dense": "score={scale}*s + load(0, 0, h, q, kv), aux=[float]",
}
DENSE = {column: element for element, column in DENSE_COLUMNS.items()}


@dataclass(frozen=True)
class Case:
    """A column of the table at a head dim."""

    dim: int
    column: str

    @property
    def spec(self) -> AttentionSpec:
        scale = 1 / math.sqrt(self.dim)
        fields = FORMS[self.column].format(scale=scale, capped=scale / 50)
        return AttentionSpec.parse(f"attention({fields})")

    def keys(self) -> list[CudaKey]:
        """Every tile that fits, in the order of `variations`."""
        dense = DENSE.get(self.column, 0)
        masked = self.spec.has_mask
        first = Sm90Config(128, 64, longest_first=masked, ping_pong=True)
        configs = [first, *variations(first, self.dim, self.dim, dense)]
        key = CudaKey(self.spec, "Bf16", self.dim, self.dim, first)
        if dense:
            element = "Bf16" if dense == 2 else "float"
            key = replace(key, elements=(element,), unit=((3,),), tile=0)
        return [replace(key, config=x) for x in configs if x.ping_pong and x.block_n >= LEAST_KEYS]

    def tensors(self, length: int):
        batch, heads = TOKENS // length, WIDTH // self.dim
        q, k, v = (
            torch.randn(batch, length, heads, self.dim, device="cuda").bfloat16().transpose(1, 2)
            for _ in range(3)
        )
        if self.column not in DENSE:
            return q, k, v, []
        dtype = torch.bfloat16 if DENSE[self.column] == 2 else torch.float32
        bias = torch.randn(1, heads, length, length, device="cuda", dtype=dtype)
        return q, k, v, [bias]


def healthy(key: CudaKey) -> bool:
    """In a worker, so that the kernel lies in the cache on disk."""
    try:
        return load(key).healthy
    except (BuildError, RuntimeError):
        return False


def name(config: Sm90Config) -> str:
    return f"{config.block_m}x{config.block_n}"


def built(cases: Sequence[Case]) -> dict[Case, list[CudaKey]]:
    """The tiles of each case that neither spill nor serialise."""
    start = time.perf_counter()
    keys = {case: case.keys() for case in cases}
    flat = [key for found in keys.values() for key in found]
    with ProcessPoolExecutor(WORKERS) as pool:
        good = dict(zip(flat, pool.map(healthy, flat, chunksize=1)))
    print(f"built {len(flat)} kernels in {time.perf_counter() - start:.0f} s", flush=True)
    return {case: [x for x in found if good[x]] for case, found in keys.items()}


def timed(case: Case, keys: Sequence[CudaKey], length: int, rounds: int = 9) -> list[float]:
    """Median milliseconds of each tile."""
    q, k, v, aux = case.tensors(length)
    shape = (q.shape[0], q.shape[1], q.shape[1], length, length, case.dim, case.dim)
    dtypes = tuple(x.dtype for x in aux)
    problem = Problem(case.spec, q.dtype, q.device, (9, 0), *shape, aux_dtypes=dtypes)
    bounds = [cuda_sm90.bind(problem, q, k, v, aux, (), key) for key in keys]
    events = [[] for _ in bounds]
    for round_ in range(rounds + 1):
        for bound, record in zip(bounds, events):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            bound(q, k, v, aux)
            end.record()
            if round_:
                record.append((start, end))
    torch.cuda.synchronize()
    return [sorted(a.elapsed_time(b) for a, b in x)[len(x) // 2] for x in events]


SMALLER = ((128, 96), (128, 64), (128, 48), (128, 32), (128, 16))
FASTEST, LONGEST = 3, 5
TILES = "tiles by largest value head dim"


def table(file: str) -> None:
    """Rewrites kernels/sm90/tiles.json with the order of a CSV of times."""
    path = resources.kernels() / "sm90" / "tiles.json"
    content = json.loads(path.read_text())
    products: dict[str, dict[str, dict[str, float]]] = {}
    with open(file, newline="") as lines:
        for dim, column, tile, *times in list(csv.reader(lines))[1:]:
            found = products.setdefault(dim, {}).setdefault(column, {})
            found[tile] = math.prod(map(float, times))
    rows = {}
    for dim, columns in products.items():
        rows[dim] = {}
        for column, found in columns.items():
            order = sorted(found, key=lambda x: found[x])
            tiles = order[:FASTEST]
            # Few queries do not take tiles of 192.
            tiles += [x for x in order if x.startswith("128")][:1]
            tiles = list(dict.fromkeys(tiles))
            least = math.prod(map(int, tiles[0].split("x")))
            for m, n in SMALLER:
                if len(tiles) == LONGEST:
                    break
                fits = Sm90Config(m, n).fits(int(dim), int(dim), DENSE.get(column, 0))
                if fits and m * n < least and f"{m}x{n}" not in tiles:
                    tiles.append(f"{m}x{n}")
            rows[dim][column] = " ".join(tiles)
        rows[dim]["masks"] = content[TILES][dim]["masks"]
    content[TILES] = rows
    path.write_text(json.dumps(content, indent=2) + "\n")


def first_tiles(dim: int) -> list[tuple[str, list[str]]]:
    """In a worker: of each form the tiles that were built, up to one that is healthy."""
    found = []
    for form in FORMS_TESTED:
        shape = shape_for(form, dim, dim, 1027, 1027, 1)
        _, _, _, aux = inputs(form, shape, torch.bfloat16, "cpu", "bshd")
        lengths = vars(shape).values()
        dtypes = tuple(x.dtype for x in aux)
        device = torch.device("cuda:0")
        spec = form.spec()
        problem = Problem(spec, torch.bfloat16, device, (9, 0), *lengths, aux_dtypes=dtypes)
        tried = []
        for key in keys_of(problem, layout_of(spec, aux)):
            tried.append(name(key.config))
            if healthy(key):
                break
        found.append((form.name, tried))
    return found


def forms() -> None:
    with ProcessPoolExecutor(min(WORKERS, len(DIMS))) as pool:
        for dim, found in zip(DIMS, pool.map(first_tiles, DIMS)):
            spilled = [f"{name}: {' '.join(tried)}" for name, tried in found if len(tried) > 1]
            print(dim, len(found), "forms;", "; ".join(spilled), flush=True)


def main() -> None:
    mode, *dims = sys.argv[1:]
    if mode == "table":
        return table(*dims)
    if mode == "forms":
        return forms()
    cases = [Case(d, c) for d in (map(int, dims) if dims else DIMS) for c in FORMS]
    rows: list[tuple] = [("dim", "column", "tile", *(f"ms at {n}" for n in LENGTHS))]
    for case, keys in built(cases).items():
        if mode == "build":
            print(case.dim, case.column, *(name(x.config) for x in keys), flush=True)
            continue
        times = list(zip(*(timed(case, keys, n) for n in LENGTHS)))
        order = sorted(range(len(keys)), key=lambda i: math.prod(times[i]))
        work = 4 * TOKENS * WIDTH * (0.5 if case.spec.has_mask else 1)
        said = []
        for i in order:
            rows.append((case.dim, case.column, name(keys[i].config), *times[i]))
            rates = "/".join(f"{work * n / t / 1e9:.0f}" for n, t in zip(LENGTHS, times[i]))
            said.append(f"{name(keys[i].config)} {rates}")
        print(case.dim, case.column, ", ".join(said[:6]), flush=True)
        torch.cuda.empty_cache()
    if mode == "time":
        with open(OUT / "sm90_tiles.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main()
