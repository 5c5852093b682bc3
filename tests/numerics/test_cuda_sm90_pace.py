"""Which tile a Hopper forward takes where tiles are few, against what was measured."""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.kernels.sm90_shapes import MODELS, said
from fa3_compile.lower.choose import Problem
from fa3_compile.lower.kernels import cuda_sm90_keys
from fa3_compile.lower.kernels.cuda_sm90_keys import keys_of, layout_of
from fa3_compile.lower.tiles.config_sm90 import Sm90Config
from fa3_compile.lower.tiles.pace_sm90 import Work, key_blocks, microseconds, work_of
from fa3_compile.spec.attention import AttentionSpec

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MEASURED = RESULTS / "2026-11-22_h100_sm90_shapes.csv"
CAUSAL = AttentionSpec.parse("attention(score=0.1*s, mask=kv - q <= 0)")
BOTTOM_RIGHT = AttentionSpec.parse("attention(score=0.1*s, mask=kv - q - Skv + Sq <= 0)")
WINDOW = AttentionSpec.parse("attention(score=0.1*s, mask=(kv - q <= 0) & (q - kv <= 99))")
CACHE = AttentionSpec.parse("attention(score=0.1*s, mask=kv - load(0, 0) <= 0, aux=[int])")


def test_tiles_are_nearly_the_fastest_of_those_measured(monkeypatch) -> None:
    monkeypatch.setattr(cuda_sm90_keys, "processors", lambda device: 132)
    measured: dict[tuple, dict[str, float]] = defaultdict(dict)
    for row in csv.DictReader(MEASURED.open()):
        point = (row["model"], int(row["batch"]), int(row["length"]))
        measured[point][row["tile"]] = float(row["share"])
    lost = []
    for (name, batch, length), shares in measured.items():
        heads, kv_heads, dim, causal, *_ = MODELS[name]
        spec = CAUSAL if causal else AttentionSpec.parse("attention(score=0.1*s)")
        problem = Problem(spec, torch.bfloat16, torch.device("cuda:0"), (9, 0), batch, heads,
                          kv_heads, length, length, dim, dim)  # fmt: skip
        c = keys_of(problem, layout_of(spec, []))[0].config
        if said(c) in shares:
            lost.append(1 - shares[said(c)] / max(shares.values()))
    assert len(lost) > 0.9 * len(measured)
    assert max(lost) < 0.15 and sum(lost) / len(lost) < 0.03


@pytest.mark.parametrize(
    ("spec", "q_len", "kv_len", "expected"),
    [
        (CAUSAL, 300, 300, [2, 4, 5]),
        (CAUSAL, 300, 64, [1, 1, 1]),
        (BOTTOM_RIGHT, 200, 640, [9, 10]),
        (WINDOW, 256, 256, [2, 3]),  # the straight line is right of where the window begins
        (CACHE, 200, 640, [10, 10]),  # the captured length is not known
    ],
)
def test_key_blocks_of_query_blocks(spec, q_len, kv_len, expected) -> None:
    assert key_blocks(work_of(spec, 1, q_len, kv_len, 64), 128, 64) == expected


def test_waves() -> None:
    work = Work(8, 1024, 1024, 128, (0, 1024), (0, 1024))
    config = Sm90Config(128, 128, longest_first=False)
    once = microseconds(config, work, 64)
    assert microseconds(config, work, 63) == pytest.approx(2 * once)
    assert microseconds(config, work, 32) == pytest.approx(2 * once)
    # Parts help where tiles leave most of the card idle, and not where they fill it.
    dealt = replace(config, split=True)
    long = replace(work, heads=1, first=(0, 65536), last=(0, 65536), kv_len=65536)
    assert microseconds(dealt, long, 132) < microseconds(config, long, 132) / 3
    assert microseconds(dealt, replace(long, heads=64), 132) > microseconds(
        config, replace(long, heads=64), 132
    )
