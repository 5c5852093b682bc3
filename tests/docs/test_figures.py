"""The counts of the README are what the kept rows say; its table is in tests/benchmarks."""

import csv
import re

import pytest

from tests.docs.blocks import ROOT

RESULTS = ROOT / "benchmarks" / "results"
pytestmark = pytest.mark.skipif(not RESULTS.is_dir(), reason="an sdist carries no results")


def rows_of(name: str) -> list[dict[str, str]]:
    (file,) = RESULTS.glob(name)
    with file.open(encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def test_the_counts_of_architectures_and_modules_are_of_the_kept_rows():
    built = [
        row
        for row in rows_of("2026-11-22_architectures.csv")
        if row["transformers"].startswith("5.17") and not row["problem"]
    ]
    attended = [row for row in built if row["softmaxes"] not in ("", "0")]
    right = [row for row in attended if row["numbers"] == "ok"]
    bare = [row for row in right if row["left"] in ("", "0")]
    modules = [row for row in rows_of("*_packages.csv") if row["numbers"] == "ok"]
    said = re.sub(r"\s+", " ", (ROOT / "README.md").read_text())
    assert f"Of the {len(attended)} architectures with attention in transformers 5.17" in said
    assert f", {len(right)} agree with eager in outputs and all gradients" in said
    assert f" {len(bare)} have no softmax left" in said
    assert f"So do {len(modules)} modules of timm" in said
