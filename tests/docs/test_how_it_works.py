"""The example of docs/how-it-works.md: the text that it shows is what the stages produce."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from fa3_compile.backend import rewritten
from fa3_compile.explaining import explain_with
from fa3_compile.frontend.dynamo.graph import target_name
from fa3_compile.frontend.shadow import trace
from tests.docs.blocks import ROOT, blocks, run

PAGE = ROOT / "docs" / "how-it-works.md"


@pytest.fixture(scope="module")
def stages():
    """The spec, the shadow's operators, and the rewritten graph of the page's example."""
    namespace = {"torch": torch, "F": F, "math": math}
    (code,) = blocks(PAGE, "python")
    run(code, namespace, "how-it-works.md")
    seen = {}

    def backend(gm, example_inputs, **settings):
        seen["shadow"] = [str(n.target) for n in trace.shadow(gm).graph.nodes]
        result = rewritten(gm, example_inputs, **settings)
        seen["rewritten"] = [target_name(n) for n in result.graph.nodes]
        return result

    def model(x, w_qkv):
        bias = torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64)
        return namespace["attention"](x, w_qkv, bias)

    inputs = (torch.randn(2, 24, 64), torch.randn(192, 64))
    report = explain_with(backend, model, inputs, {}, None, None)
    (region,) = report.regions
    return region, seen


def test_the_spec_is_the_one_shown(stages):
    region, _ = stages
    assert region.fused
    assert f"\n{region.spec}\n" in PAGE.read_text()


def test_the_shadow_has_the_operators_shown_in_their_order(stages):
    shown = re.findall(r"^\w+ +(aten\.[\w.]+) ", blocks(PAGE, "text")[0], re.MULTILINE)
    assert len(shown) == 6
    found = iter(stages[1]["shadow"])
    assert all(name in found for name in shown)


def test_the_rewritten_graph_calls_what_is_shown_in_its_order(stages):
    text = next(block for block in blocks(PAGE, "text") if "fa3.attention" in block)
    shown = re.findall(r"\.(\w+)\(", text)
    assert shown == ["unflatten", "narrow", "permute", "attention", "permute", "reshape"]
    found = iter(stages[1]["rewritten"])
    assert all(name in found for name in shown)
