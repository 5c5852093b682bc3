"""`assert_fused` and `snapshot`: what passes, what fails, and with which words."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import fa3_compile
from fa3_compile.testing import assert_fused, assert_matches_eager, snapshot

ROOT = Path(__file__).parents[1]


class Layers(nn.Module):
    """Causal attention, `layers` times over; `refactored` sums the scores up along the keys."""

    def __init__(self, layers=2, refactored=False, window=None):
        super().__init__()
        self.layers, self.refactored, self.window = layers, refactored, window

    def forward(self, x):
        for _ in range(self.layers):
            at = torch.arange(x.shape[-2])
            hidden = at[None, :] > at[:, None]
            if self.window:
                hidden = hidden | (at[:, None] - at[None, :] >= self.window)
            scores = x @ x.transpose(-2, -1) / 4
            if self.refactored:
                scores = scores.cumsum(-1)
            x = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ x
        return x


def x():
    return torch.randn(1, 2, 12, 16)


def test_a_fused_model_passes_and_gives_its_report():
    report = assert_fused(Layers(), x(), regions=2, forms="causal")
    assert len(report.fused) == 2
    assert_fused(Layers(3), x(), forms=["causal"] * 3, training=False)
    assert_fused(Layers(1), x(), kernels="reference", options={"kernels": "reference"})


@pytest.mark.parametrize(
    "model, expected, said",
    [
        (
            Layers(refactored=True),
            {},
            "region 0 of graph 0/0: left as it was by lift (not-pointwise)",
        ),
        (Layers(), {"regions": 3}, "expected 3 attention regions, found 2"),
        (Layers(window=4), {"forms": "causal"}, "expected form 'causal', found 'causal + window"),
        (Layers(), {"forms": ["causal"]}, "1 forms were named for 2 regions"),
        (Layers(), {"kernels": "cuda_sm90"}, "expected kernel 'cuda_sm90', found 'cpu'"),
        (nn.Linear(16, 16), {}, "no attention was found"),
    ],
    ids=["refactored", "regions", "form", "forms", "kernel", "no attention"],
)
def test_what_is_missing_is_said_with_the_report(model, expected, said):
    with pytest.raises(AssertionError) as caught:
        assert_fused(model, x(), **expected)
    first, report = str(caught.value).split("\n\n", 1)
    assert said in first
    assert report.startswith("fa3_compile: ")


def capped(q, k, v):
    return (20 * torch.tanh(q @ k.transpose(-2, -1) / 20)).softmax(-1) @ v


def test_what_only_a_gpu_kernel_takes_passes_without_a_gpu():
    inputs = [torch.randn(1, 2, 12, 16) for _ in range(3)]
    assert_fused(capped, *inputs, forms="softcap(20)")
    assert snapshot(capped, *inputs).startswith("1 of 1 regions fused")
    if not torch.cuda.is_available():
        with pytest.raises(AssertionError, match="no-kernel"):
            assert_fused(capped, *inputs, options={"kernels": "cpu"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has a kernel for it")
@pytest.mark.parametrize("options", [None, {"kernels": "cpu"}], ids=str)
def test_other_families_are_advised_where_some_were_left_out(options):
    inputs = [torch.randn(1, 2, 12, 16) for _ in range(3)]
    [region] = fa3_compile.explain(capped, *inputs, options=options).regions
    assert region.code == "no-kernel" and "the form of the scores" in region.hint
    assert ("allow other families" in region.hint) == (options is not None)


def test_a_snapshot_has_one_line_for_regions_that_are_alike():
    assert_expected_inline(
        snapshot(Layers(4), x()),
        """\
4 of 4 regions fused
0-3: causal | score 0.25*s | mask kv <= q""",
    )
    assert_expected_inline(
        snapshot(Layers(1, refactored=True), x()),
        """\
0 of 1 regions fused
0: left as it was by lift [not-pointwise]""",
    )


def test_a_snapshot_does_not_name_what_changes_from_machine_to_machine():
    text = snapshot(Layers(1), x(), options={"kernels": "reference"})
    assert text == snapshot(Layers(1), x())
    assert "cpu" not in text and __file__ not in text


def test_a_models_own_keywords_may_be_called_as_ours():
    def attention(q, model_or_fn, *, training, options, kwargs, seed):
        assert training == "yes"
        return (q @ model_or_fn.mT / options).softmax(-1) @ kwargs[seed]

    theirs = {"training": "yes", "options": 4, "kwargs": [x(), x()], "seed": 1}
    calls = {"model_or_fn": x(), "kwargs": theirs}
    assert_fused(attention, x(), regions=1, forms="plain", **calls)
    assert snapshot(attention, x(), **calls).startswith("1 of 1 regions fused")
    assert_matches_eager(attention, x(), backend=lambda gm, _: gm, **calls)


def test_a_keyword_that_is_given_twice_is_refused():
    with pytest.raises(TypeError, match="given by name and in kwargs, leave out one: window"):
        snapshot(Layers(), x(), window=3, kwargs={"window": 4})


@pytest.mark.parametrize(
    "named, passed",
    [("not gradients", 2), pytest.param("gradients", 1, marks=pytest.mark.slow)],
)
def test_the_example_of_the_documentation_passes(named, passed):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         "examples/test_fused_attention.py", "-k", named],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert f"{passed} passed" in done.stdout
