"""`benchmarks/run.py` on a CPU: that what is wrong is seen, and what a run leaves behind."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import torch

from benchmarks import contenders
from benchmarks.cases import TOKENS, WIDTH, all_cases, tiny
from benchmarks.run import case_rows, main
from tests.models.large import LARGE

CPU = torch.device("cpu")
BY_NAME = {case.name: case for case in all_cases()}


@pytest.fixture
def run(tmp_path):
    def run(*words: str) -> tuple[int, list[dict[str, str]]]:
        out = tmp_path / "rows.csv"
        code = main(["--tiny", "--device", "cpu", "--out", str(out), *words])
        with out.open(newline="") as file:
            return code, list(csv.DictReader(file))

    return run


def test_the_cases_are_those_of_the_tables():
    dense = [case for case in all_cases() if case.group == "dense"]
    assert len(dense) == 12
    assert {case.batch * case.kv_len for case in dense} == {TOKENS}
    assert {case.heads * case.dim for case in dense} == {WIDTH}
    assert {case.heads // case.kv_heads for case in all_cases() if case.group == "decode"} == {8}


@pytest.mark.parametrize(
    "case", [x for x in all_cases() if x.group == "variants"], ids=lambda x: x.name
)
def test_the_share_of_pairs_is_what_the_mask_leaves(case):
    rows, columns = torch.arange(3000)[:, None], torch.arange(3000)[None, :]
    captured = case.variant.capture(tiny(case), CPU)
    if case.variant.seen is None or captured and case.variant.name != "alibi":
        expected = {"bias": 1.0, "relative": 1.0, "documents8": 1 / 8}[case.variant.name]
    else:
        expected = case.variant.seen(rows, columns, *captured).double().mean().item()
    assert case.variant.share(3000, 3000) == pytest.approx(expected, abs=1e-9)


def test_a_run_writes_a_row_for_each_contender_with_what_it_ran_on(run, capsys):
    code, rows = run("--cases", "alibi-*", "--only", "fa3", "inductor",
                     "--direction", "forward", "backward")  # fmt: skip
    assert code == 0
    assert [(r["direction"], r["contender"]) for r in rows] == [
        (direction, name) for direction in ("forward", "backward") for name in ("fa3", "inductor")
    ]
    assert [r["kernel"] for r in rows] == ["cpu", "", "cpu, gradients cpu", ""]
    assert all(r["ok"] == "True" and float(r["ms"]) > 0 for r in rows)
    assert {r["torch"] for r in rows} == {torch.__version__}
    assert {"device", "driver", "triton", "commit"} <= rows[0].keys()
    assert "alibi-" in capsys.readouterr().out


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wrong_contender_is_said_and_not_timed(monkeypatch, direction):
    def scaled(name, case, inputs):
        eager = case.eager()
        return lambda q, k, v, *captured: eager(q, k * 1.02, v, *captured)

    monkeypatch.setattr(contenders, "contender", scaled)
    case = tiny(BY_NAME["softcap-B2-S8k-D128"])
    (row,) = case_rows(case, direction, ["flex"], CPU, torch.float32)
    assert (row.ok, row.ms) == (False, None)
    assert row.note.startswith("WRONG")


def test_a_contender_that_fails_leaves_the_others_alone(monkeypatch):
    def failing(name, case, inputs):
        if name == "cudnn":
            raise torch.OutOfMemoryError("out of memory")
        return None if name == "flash3" else case.eager()

    monkeypatch.setattr(contenders, "contender", failing)
    case = tiny(BY_NAME["causal-B8-S2k-D64"])
    rows = case_rows(case, "forward", ["cudnn", "flash3", "flex"], CPU, torch.float32)
    assert [(row.contender, row.note, row.ok) for row in rows] == [
        ("cudnn", "out of memory", False),
        ("flex", "", True),
    ]


def test_a_spent_budget_starts_nothing_and_says_what_is_left(run, capsys):
    code, rows = run("--cases", "causal-B8-S2k-D64", "--budget", "-1")
    assert (code, rows) == (0, [])
    assert "left: causal-B8-S2k-D64 forward" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_is_held_against_eager_and_timed(run, monkeypatch):
    small = {"n_embd": 32, "n_layer": 1, "n_head": 2}
    entry = LARGE["gpt2"]
    monkeypatch.setitem(LARGE, "gpt2", replace(entry, config={**entry.config, **small}))
    code, rows = run("--models", "gpt2", "--only", "fa3", "--direction", "training")
    assert code == 0
    assert [(r["case"], r["kernel"], r["ok"]) for r in rows] == [
        ("gpt2", "cpu, gradients cpu", "True")
    ]


def test_the_list_names_every_case_and_model(capsys):
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(case.name in printed for case in all_cases())
    assert "llama" in printed
