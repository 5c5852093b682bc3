"""The tuner with made-up times, and what the two families offer it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch

from fa3_compile.lower.binaries import cache
from fa3_compile.lower.choose import Problem
from fa3_compile.lower.tiles import tune, tune_forward
from fa3_compile.lower.tiles.config_sm90 import Sm90Config, candidates, table, variations
from fa3_compile.spec.attention import AttentionSpec


@dataclass(frozen=True)
class Tile:
    rows: int


TILES = [Tile(128), Tile(64), Tile(32)]
TIMES = {128: 3e-3, 64: 1e-3, 32: tune.UNFIT}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FA3_CACHE_DIR", str(tmp_path / "cache"))


def problem(autotune: str = "quick", **changes) -> Problem:
    lengths = {"batch": 2, "heads": 8, "kv_heads": 8, "q_len": 1000, "kv_len": 1000}
    lengths |= {"dim": 64, "v_dim": 64}
    spec = AttentionSpec.parse("attention(score=0.125*s, mask=kv <= q, dead=nan)")
    device = torch.device("cpu")
    fields = {"dtype": torch.bfloat16, "device": device, "capability": (9, 0), **lengths}
    return Problem(**{"spec": spec, "autotune": autotune, **fields, **changes})


def tuned(asked: Problem, tiles=TILES, times=TIMES, compiler="1.0") -> tuple[Tile, list[int]]:
    """The choice, and what was measured for it."""
    measured = []

    def measure(tile: Tile) -> float:
        measured.append(tile.rows)
        return times[tile.rows]

    return tune.tuned(asked, "family", compiler, tiles, measure), measured


def test_the_fastest_is_measured_once_and_kept():
    assert tuned(problem()) == (Tile(64), [128, 64, 32])
    assert tuned(problem()) == (Tile(64), [])
    [record] = (cache.root() / tune.KIND).glob("*/config.json")
    found = json.loads(record.read_text())
    assert found["config"] == {"rows": 64}
    assert [x["ms"] for x in found["measured"]] == [1.0, 3.0, None]


@pytest.mark.parametrize(
    "change",
    [
        {"q_len": 1025},
        {"kv_len": 4096},
        {"heads": 80},
        {"dtype": torch.float16},
        {"autotune": "full"},
        {"wants_lse": False},
        {"spec": AttentionSpec.parse("attention(score=0.125*s)")},
    ],
    ids=str,
)
def test_another_problem_is_measured_anew(change):
    tuned(problem())
    assert tuned(replace(problem(), **change))[1] == [128, 64, 32]


def test_lengths_of_a_bucket_share_a_choice():
    tuned(problem())
    assert tuned(problem(q_len=900, kv_len=513)) == (Tile(64), [])
    assert [tune.bucket(n) for n in (0, 1, 2, 3, 1024, 1025)] == [1, 1, 2, 4, 1024, 2048]


def test_another_compiler_and_other_candidates_are_measured_anew():
    tuned(problem())
    assert tuned(problem(), compiler="1.1")[1]
    # What was chosen is no longer offered.
    assert tuned(problem(), tiles=[Tile(128), Tile(32)]) == (Tile(128), [128, 32])


def test_a_damaged_record_is_measured_anew():
    tuned(problem())
    [record] = (cache.root() / tune.KIND).glob("*/config.json")
    record.write_text(record.read_text().replace("64", "32"))
    assert tuned(problem()) == (Tile(64), [128, 64, 32])
    assert tuned(problem()) == (Tile(64), [])


def test_nothing_measurable_leaves_the_table_and_no_record():
    times = dict.fromkeys(TIMES, tune.UNFIT)
    assert tuned(problem(), times=times)[0] == Tile(128)
    assert tuned(problem()) == (Tile(64), [128, 64, 32])


def test_when_not_to_tune():
    assert tune.effort(problem("full")) == "full"
    assert tune.effort(problem("none")) == "none"
    assert tune.effort(problem("full", deterministic=True)) == "none"


def test_progress_only_on_a_terminal(capsys, monkeypatch):
    tuned(problem())
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    tuned(problem("full"))
    assert "tuning family, 2 of 3: Tile(rows=64)" in capsys.readouterr().err


def test_triton_offers_a_few_or_all_that_fit():
    quick = tune_forward.candidates(problem("quick"))
    full = tune_forward.candidates(problem("full"))
    assert quick[0] == full[0] == tune_forward.table_config(problem())
    assert len(quick) == 1 + tune_forward.QUICK < len(full)
    assert set(quick) <= set(full)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("q_len", [1, 4096])
def test_hopper_offers_every_tile_that_fits(dim: int, q_len: int):
    first = candidates(dim, dim, q_len, True, True, 0)[0]
    found = variations(first, dim, dim, 0)
    assert first not in found and len(found) == len(set(found)) > 3
    assert all(x.fits(dim, dim) and x.longest_first == first.longest_first for x in found)
    if q_len == 1:
        assert {x.block_m for x in found} == {64} and {x.stages for x in found} > {2}


def test_every_tile_of_the_table_is_one_that_full_tries():
    for dim, row in table().items():
        for tile in row["full"]:
            config = Sm90Config(*tile, longest_first=False, ping_pong=dim <= 192)
            tried = variations(Sm90Config(*row["full"][-1], False, dim <= 192), dim, dim, 0)
            assert config in tried or tile == row["full"][-1]
