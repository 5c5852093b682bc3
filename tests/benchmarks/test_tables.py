"""`benchmarks/tables.py`: the tables of docs/benchmarks.md and the README are what kept rows say."""

from pathlib import Path

import pytest

from benchmarks.rows import read
from benchmarks.tables import PLACE, fill

ROOT = Path(__file__).parents[2]
RUNS = sorted((ROOT / "benchmarks" / "results").glob("*_run_*.csv"))


def row(case, contender, direction="forward", **columns):
    empty = dict.fromkeys("ms tflops gbytes_s peak_gib kernel note".split(), "")
    machine = dict.fromkeys("device driver torch triton commit date".split(), "x")
    return (
        empty | machine | {"case": case, "contender": contender, "direction": direction} | columns
    )


def test_a_line_has_ours_and_the_others_with_our_share():
    rows = [
        row("causal-B1-S16k-D128", "fa3", tflops="750"),
        row("causal-B1-S16k-D128", "cudnn", tflops="600"),
        row("causal-B1-S16k-D128", "flash2", note="out of memory"),
        row("causal-B9-S16k-D128", "fa3", tflops="1"),
        row("full-B1-S16k-D64", "fa3", tflops="500"),
        row("full-B1-S16k-D64", "cudnn", note="RuntimeError: " + 80 * "x"),
    ]
    page = fill("a\n<!-- table dense_forward -->\nold\n<!-- end -->\nb", rows)
    assert "| causal-B1-S16k-D128 | 750 | 600 (1.25x) | out of memory |\n" in page
    assert "| full-B1-S16k-D64 | 500 | failed |  |" in page
    assert "old" not in page and page.startswith("a\n") and page.endswith("\nb")
    assert "B9" not in page
    assert fill(page, rows) == page


def test_models_are_held_against_the_faster_of_both_spellings():
    rows = [
        row("llama", "fa3", ms="50", peak_gib="3", kernel="cuda_sm90"),
        row("llama", "inductor", ms="120", peak_gib="11"),
        row("llama", "inductor sdpa", ms="75", peak_gib="4"),
        row("t5", "fa3", ms="6", peak_gib="1", kernel="cuda_sm90"),
        row("t5", "inductor", ms="12", peak_gib="2"),
        row("t5", "inductor sdpa", ms="18", peak_gib="2"),
        row("bloom", "fa3", ms="6", peak_gib="1", kernel="cuda_sm90"),
        row("bloom", "inductor", note="out of memory"),
        row("bloom", "inductor sdpa", ms="24", peak_gib="2"),
        row("bloom", "inductor sdpa", direction="training", note="there is none"),
    ]
    page = fill("<!-- table models -->\n<!-- end -->", rows)
    line = "| llama | forward | 50.0 | 120.0 | 75.0 | 1.50x | 3.00 | 11.00 | 4.00 | cuda_sm90 |"
    assert line in page
    assert "| t5 | forward | 6.0 | 12.0 | 18.0 | 2.00x |" in page
    assert "| bloom | forward | 6.0 | out of memory | 24.0 | 4.00x | 1.00 | out of memory |" in page
    assert "training" not in page


def test_commits_of_one_machine_and_day_are_said_together():
    rows = [row("a", "fa3", commit="2"), row("a", "flex", commit="1"), row("a", "b", torch="y")]
    assert fill("<!-- table machine -->\n<!-- end -->", rows) == (
        "<!-- table machine -->\n"
        "x, driver x, torch x, triton x, x, commits 1, 2; "
        "x, driver x, torch y, triton x, x, commits x\n<!-- end -->"
    )


def test_a_place_for_an_unknown_table_is_an_error():
    with pytest.raises(KeyError):
        fill("<!-- table nothing -->\n<!-- end -->", [])


@pytest.mark.skipif(not RUNS, reason="an sdist carries no results")
@pytest.mark.parametrize("name", ["docs/benchmarks.md", "README.md"])
def test_a_page_says_what_the_kept_rows_say(name):
    page = (ROOT / name).read_text()
    assert PLACE.search(page)
    assert fill(page, read(RUNS)) == page
