"""`benchmarks/plot.py`: the pictures that a run's rows give."""

import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("matplotlib")

from benchmarks import plot


def row(case, contender, direction="forward", ms="1", tflops="", peak="", ok="True"):
    return {
        "case": case,
        "direction": direction,
        "contender": contender,
        "ms": ms,
        "tflops": tflops,
        "peak_gib": peak,
        "ok": ok,
        "device": "a card",
    }


ROWS = [
    *[row(f"causal-B1-S{n}k-D128", "fa3", tflops=str(100 * n)) for n in (2, 4, 8, 16)],
    row("softcap-B2-S8k-D128", "fa3", tflops="600"),
    row("softcap-B2-S8k-D128", "flex", tflops="187", direction="backward"),
    row("llama", "fa3", ms="50", peak="3.5"),
    row("llama", "inductor", ms="125", peak="11"),
]


def texts(path) -> str:
    """What matplotlib notes beside the outlines of each text."""
    return path.read_text()


def test_every_picture_is_drawn_and_is_the_same_again(tmp_path):
    first, second = (plot.draw(ROWS, tmp_path / name) for name in ("a", "b"))
    assert [path.stem for path in first] == ["lengths", "variants", "models", "memory"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    for path in first:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_the_speed_up_is_theirs_over_ours(tmp_path):
    models = next(p for p in plot.draw(ROWS, tmp_path) if p.stem == "models")
    assert "<!-- 2.5 -->" in texts(models)


def test_wrong_rows_are_not_drawn(tmp_path):
    wrong = [row("softcap-B2-S8k-D128", "fa3", tflops="600", ok="False")]
    assert plot.draw(wrong, tmp_path) == []
