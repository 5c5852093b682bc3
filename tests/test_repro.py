"""`python -m fa3_compile repro`: a region cut out of a model says of itself what it said there."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fa3_compile.__main__ import main
from fa3_compile.backend import rewritten
from fa3_compile.errors import Fa3Error
from fa3_compile.explaining import explain_with
from fa3_compile.repro import repro, tensor
from fa3_compile.testing import assert_matches_eager


class Model(nn.Module):
    """Two attentions between projections; the second's scores may be summed up along the keys."""

    def __init__(self, summed=True):
        super().__init__()
        self.summed = summed
        self.projections = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))

    def attend(self, x, projection, summed):
        q, k, v = (t.view(2, -1, 2, 8).transpose(1, 2) for t in projection(x).split(16, dim=2))
        at = torch.arange(x.shape[1])
        scores = q @ k.transpose(-2, -1)
        scores = scores.cumsum(-1) if summed else scores
        weights = scores.masked_fill(at[:, None] < at, float("-inf")).softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(x.shape)

    def forward(self, x):
        x = self.attend(x, self.projections[0], False)
        return self.attend(x, self.projections[1], self.summed)


def x():
    return torch.randn(2, 6, 16)


def run(script):
    """The script imported, which registers it: Dynamo may read a function's globals there."""
    sys.modules["repro"] = module = types.ModuleType("repro")
    exec(script, module.__dict__)
    return module.__dict__


def test_the_first_region_that_was_left_is_cut_out_and_declines_alike():
    made = repro(Model(), (x(),))
    assert (made.region.index, made.region.code, made.faithful) == (1, "not-pointwise", True)
    module = run(made.script)
    (given,) = module["inputs"]()
    assert (given.shape, given.stride()) == ((2, 6, 48), (288, 48, 1))
    # What comes before the projection is not in it.
    assert "nn.functional.linear" not in made.script
    report = assert_matches_eager(module["attention"], given, backend=rewritten, training=True)
    assert [region.code for region in report.regions] == ["not-pointwise"]


def test_a_fused_region_can_be_named():
    made = repro(Model(), (x(),), region=0, training=False)
    assert made.region.fused and made.faithful
    assert "training=False" in made.script


@pytest.mark.parametrize(
    "summed, region, said",
    [(False, None, "nothing was left as it was"), (True, 2, "there is no region 2")],
)
def test_what_is_not_there_is_said(summed, region, said):
    with pytest.raises(Fa3Error, match=said):
        repro(Model(summed), (x(),), region=region)


def test_no_attention_is_said():
    with pytest.raises(Fa3Error, match="no attention was found"):
        repro(nn.Linear(2, 2), (torch.ones(1, 2),))


def a_call_and_a_layer_between(q, k, v):
    """`explain` has no skeleton of the first attention, and says nothing of the layer `u`."""
    distances = torch.cdist(q, k).softmax(-1) @ v
    u = ((q @ k.mT).relu() @ v).relu() @ k.mT
    return distances + u @ v + (q @ k.mT).cumsum(-1).softmax(-1) @ v


def test_regions_are_numbered_as_explain_numbers_them():
    model, inputs = a_call_and_a_layer_between, [torch.randn(1, 2, 6, 8) for _ in range(3)]
    options = {"kernels": "reference"}
    report = explain_with(rewritten, model, inputs, {}, options, None)
    assert [r.code for r in report.regions] == ["opaque-scores", "", "not-pointwise"]
    with pytest.raises(Fa3Error, match="a call that is not looked into"):
        repro(model, inputs, region=0, options=options)
    for number, own in ((1, "relu"), (2, "cumsum")):
        made = repro(model, inputs, region=number, options=options)
        assert made.faithful and made.region == report.regions[number]
        assert own in made.script


def a_projection_in_the_same_einsum(q, k, v):
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bhkd,hde->bqe", weights, v, q[0].mT @ k[0])


def keys_as_the_weight_of_a_linear(q, k, v):
    return F.linear(q[0, 0], k[0, 0] + v[0, 0]).cumsum(-1).softmax(-1) @ v[0, 0]


@pytest.mark.parametrize("model", [a_projection_in_the_same_einsum, keys_as_the_weight_of_a_linear])
def test_products_that_are_no_calls_of_their_own_are_cut_out(model):
    made = repro(model, [torch.randn(1, 2, 6, 8) for _ in range(3)], region=0)
    assert made.faithful
    assert "einsum" in made.script or "linear(" in made.script


def written_in_between(q, k, v):
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    v.mul_(2.0)
    return weights @ v


def test_writes_to_the_operands_come_along():
    made = repro(written_in_between, [torch.randn(1, 2, 6, 8) for _ in range(3)], region=0)
    assert "mul_(2.0)" in made.script
    assert made.faithful


def test_sizes_are_those_that_the_model_was_called_with():
    def attend(q, k, v, heads):
        scores = q @ k.transpose(-2, -1) / heads
        return scores.cumsum(-1).softmax(-1) @ v

    q = torch.randn(1, 2, 6, 8)
    torch._dynamo.mark_dynamic(q, 2)
    made = repro(attend, (q, q, q, 3))
    assert made.faithful
    assert "tensor((1, 2, 6, 8), (96, 48, 8, 1), torch.float32" in made.script


def test_the_command_writes_a_script_that_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_model.py").write_text(
        "import torch\n"
        "def attend(q):\n"
        "    w = (q @ q.mT).cumsum(-1).softmax(-1)  # ''' \"\"\" \\n {0} #\n"
        "    return w @ q\n"
        "def make():\n"
        "    return attend, (torch.randn(1, 2, 6, 8),)\n"
    )
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    out = tmp_path / "out.py"
    assert main(["repro", f"{tmp_path}/my_model.py:make", "--out", str(out)]) == 0
    assert f"written to {out}" in capsys.readouterr().out
    assert callable(run(out.read_text())["attention"])


def test_stand_ins_have_the_strides_and_kinds_that_are_asked_for():
    floats = tensor((2, 3, 4), (4, 0, 1), torch.bfloat16, "cpu", requires_grad=True)
    assert (floats.stride(), floats.requires_grad) == ((4, 0, 1), True)
    assert torch.equal(tensor((3,), (1,), torch.int64, "cpu"), torch.zeros(3, dtype=torch.int64))
    assert tensor((3,), (1,), torch.bool, "cpu").all()
