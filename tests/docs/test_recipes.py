"""The three recipes, followed: what was declined, unnamed or unknown no longer is."""

import importlib

import pytest
import torch

from fa3_compile import options
from fa3_compile.backend import rewritten
from fa3_compile.explaining import explain_with
from fa3_compile.frontend.lift import lift
from fa3_compile.lower import choose
from fa3_compile.spec.forms import mask_names, masks
from fa3_compile.spec.text import parse
from tests.docs.blocks import ROOT, blocks, run

RECIPES = ROOT / "docs" / "extending"


@pytest.fixture(autouse=True)
def registries_restored(monkeypatch):
    """As they are in a checkout that nobody has extended."""
    choose.kernels()
    importlib.import_module("fa3_compile.frontend.lift.elements")  # registers the rules
    monkeypatch.setattr(lift, "RULES", {**lift.RULES})
    monkeypatch.setattr(masks, "FORMS", [*masks.FORMS])
    monkeypatch.setattr(choose, "_kernels", {**choose._kernels})


def follow(page, steps):
    """Runs the page's blocks; `steps` maps a block's number to what is done before it."""
    namespace = {"__name__": "recipe"}
    for number, code in enumerate(blocks(RECIPES / page, "python")):
        steps.get(number, lambda _: None)(namespace)
        run(code, namespace, f"{page}[{number}]")


def test_a_declined_model_fuses_after_an_operator_is_added(monkeypatch):
    monkeypatch.delitem(lift.RULES, torch.ops.aten.hypot.default, raising=False)

    def declined(namespace):
        inputs = [torch.randn(1, 2, 12, 16) for _ in range(3)]
        report = explain_with(rewritten, namespace["attention"], inputs, {}, None, None)
        assert [region.code for region in report.regions] == ["not-pointwise"]
        assert "aten.hypot.default" in report.regions[0].reason

    follow("operator.md", {1: declined})


def test_a_mask_has_a_name_after_a_form_is_added():
    def unnamed(_):
        assert mask_names(parse("mod(q - kv, 512) < 128")) == ["custom mask"]

    follow("form.md", {0: unnamed})


def test_a_kernel_runs_after_it_is_added(monkeypatch):
    def named(_):
        # Step 2 of the page.
        monkeypatch.setattr(options, "KERNELS", (*options.KERNELS, "plain"))

    follow("kernel.md", {1: named})
    assert "plain" in [kernel.name for kernel in choose.kernels()]
