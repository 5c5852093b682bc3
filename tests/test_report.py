"""The report: its renderings, its collection across threads, its log lines, and `explain`."""

import dataclasses
import json
import logging
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from fa3_compile import explain, report
from fa3_compile.backend import rewritten
from fa3_compile.errors import Decline
from fa3_compile.report import RegionReport, Report, Tiles, collect
from fa3_compile.source import short_path, where

GEMMA = RegionReport(
    index=0,
    graph="0/0",
    fused=True,
    where="modeling_gemma2.py:180: attn_weights = torch.matmul(query, key.transpose(2, 3))",
    form="softcap + causal",
    score="50*tanh(s/800)",
    mask="kv <= q",
    tiles=Tiles(empty=6, partial=4, full=6),
    kernel="triton",
    config="block_q=128 block_kv=64",
    other_kernels={"cpu": "the tensors are on cuda"},
    spec="softcap-spec",
)
TALKING = RegionReport.declined(
    2, "0/0", Decline("head-mixing", None, "mix after the softmax", stage="lift"), where="a.py:3"
)


def sample() -> Report:
    return Report(
        regions=[GEMMA, dataclasses.replace(GEMMA, index=1), TALKING],
        graphs=1,
        notes=["the backward runs through the reference"],
        compile_seconds=2.345,
    )


def test_text_has_one_block_a_region_and_refers_back_for_twins():
    assert_expected_inline(
        str(sample()),
        """\
fa3_compile: 2 of 3 attention regions fused, 1 graph, 0 graph breaks, first call 2.3 s

region 0 (graph 0/0): fused
  where   modeling_gemma2.py:180: attn_weights = torch.matmul(query, key.transpose(2, 3))
  form    softcap + causal
  score   50*tanh(s/800)
  mask    kv <= q
  tiles   6 skipped, 4 masked, 6 full, of 16
  kernel  triton block_q=128 block_kv=64
          not cpu: the tensors are on cuda

region 1 (graph 0/0): fused, like region 0

region 2 (graph 0/0): left as it was by lift
  where   a.py:3
  reason  head mixing [head-mixing]
  hint    mix after the softmax

note: the backward runs through the reference""",
    )


def test_a_run_of_twins_is_one_line():
    layers = [dataclasses.replace(GEMMA, index=i, graph=f"{i}/0") for i in range(30)]
    text = Report(regions=[*layers, TALKING, GEMMA]).text()
    assert "regions 1 to 29 (29 graphs): fused, like region 0\n" in text
    assert "region 31 (graph 0/0): fused, like region 0" in text


def test_a_region_that_differs_in_its_source_line_gets_its_own_block():
    other = dataclasses.replace(GEMMA, index=1, where="elsewhere.py:9")
    assert "like region" not in Report(regions=[GEMMA, other]).text()


def test_markdown_is_one_table_row_a_region_and_escapes_bars():
    masked = dataclasses.replace(GEMMA, mask="(kv <= q) | (kv < 4)")
    report = Report(regions=[masked, TALKING], graphs=1)
    assert report._repr_markdown_() == report.markdown()
    lines = report.markdown().splitlines()
    assert len(lines) == 6
    assert "`(kv <= q) \\| (kv < 4)`" in lines[4]
    assert {line.replace("\\|", "").count("|") for line in lines[2:]} == {9}
    assert "head mixing. mix after the softmax" in lines[5]


def test_json_holds_every_field():
    data = json.loads(sample().json())
    assert data["graphs"] == 1
    assert data["compile_seconds"] == 2.345
    assert [region["fused"] for region in data["regions"]] == [True, True, False]
    tiles = data["regions"][0]["tiles"]
    assert (tiles["empty"], tiles["partial"], tiles["full"], tiles["reason"]) == (6, 4, 6, "")
    assert set(data["regions"][0]) == {f.name for f in dataclasses.fields(RegionReport)}


def test_unknown_tiles_give_their_reason():
    assert str(Tiles(reason="read at run time")) == "read at run time"
    assert str(Tiles(empty=0, partial=0, full=1)) == "0 skipped, 0 masked, 1 full, of 1"


def test_declined_names_the_node():
    node = torch.fx.Graph().placeholder("weights")
    region = RegionReport.declined(0, "0/0", Decline("weights-used", node, stage="detect"))
    assert (region.node, region.code, region.reason) == ("weights", "weights-used", "weights used")
    assert region.line() == (
        "region 0 of graph 0/0: left as it was by detect (weights-used): weights used"
    )


def test_declined_names_the_line_that_it_was_decided_at():
    def attention(q, k, v):
        scores = (q @ k.mT).cumsum(-1)
        return scores.softmax(-1) @ v

    with collect() as collected:
        torch.compile(attention, backend=rewritten)(*(torch.ones(1, 2, 8, 4) for _ in range(3)))
    [region] = collected.regions
    line = attention.__code__.co_firstlineno
    assert region.where == f"tests/test_report.py:{line + 2}: return scores.softmax(-1) @ v"
    said = f"scores at tests/test_report.py:{line + 1}: scores = (q @ k.mT).cumsum(-1)"
    assert dict(region.rows())["node"] == said


def test_every_region_is_one_log_line_collected_or_not(caplog):
    with caplog.at_level(logging.INFO, "fa3_compile.report"):
        report.record(GEMMA)
        with collect() as collected:
            report.record(TALKING)
    assert [r.getMessage() for r in caplog.records] == [GEMMA.line(), TALKING.line()]
    assert collected.regions == [TALKING]


def test_nested_blocks_both_collect_and_a_closed_one_does_not():
    with collect() as outer:
        with collect() as inner:
            report.record(GEMMA)
        report.record(TALKING)
    report.record(GEMMA)
    assert outer.regions == [GEMMA, TALKING]
    assert inner.regions == [GEMMA]


def test_a_block_that_raises_stops_collecting():
    with pytest.raises(ZeroDivisionError), collect() as collected:
        raise ZeroDivisionError
    report.record(GEMMA)
    assert collected.regions == []


def in_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_threads_with_blocks_of_their_own_do_not_mix():
    seen = []

    def work():
        with collect() as other:
            report.record(TALKING)
        seen.extend(other.regions)

    with collect() as mine:
        report.record(GEMMA)
        in_thread(work)
    assert (mine.regions, seen) == ([GEMMA], [TALKING])


def test_a_thread_without_a_block_reports_to_whoever_collects():
    with collect() as mine:
        in_thread(lambda: report.record(GEMMA))
    assert mine.regions == [GEMMA]


def test_what_lowering_learns_later_is_filled_in_by_spec():
    with collect() as collected:
        report.record(dataclasses.replace(GEMMA, kernel="", config=""))
        report.record(TALKING)
        report.update("softcap-spec", kernel="triton", config="block_q=64")
    assert collected.regions[0].config == "block_q=64"
    assert collected.regions[1] == TALKING


def test_a_note_is_kept_once():
    with collect() as collected:
        report.note("no GPU")
        report.note("no GPU")
    assert collected.notes == ["no GPU"]


def attend(q, k, v):
    scores = q @ k.transpose(-2, -1)
    return torch.softmax(scores, dim=-1) @ v


def graph_of(fn, *args):
    graphs = []
    torch._dynamo.reset()
    torch.compile(fn, backend=lambda gm, _: graphs.append(gm) or gm.forward)(*args)
    return graphs[0].graph


def test_where_is_the_users_line():
    nodes = graph_of(attend, *(torch.ones(1, 2, 3, 4) for _ in range(3))).nodes
    softmax = next(node for node in nodes if "softmax" in str(node.target))
    line = attend.__code__.co_firstlineno + 2
    assert (
        where(softmax) == f"tests/test_report.py:{line}: return torch.softmax(scores, dim=-1) @ v"
    )


def test_where_leaves_out_torchs_own_frames():
    nodes = graph_of(nn.Sequential(nn.Linear(2, 2)), torch.ones(2, 2)).nodes
    linear = next(node for node in nodes if "linear" in str(node.target))
    assert "torch/nn" not in where(linear)
    assert where(torch.fx.Graph().placeholder("x")) == ""


def test_paths_start_at_the_package_or_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert short_path(torch.__file__) == "torch/__init__.py"
    assert short_path(str(tmp_path / "model.py")) == "model.py"
    assert short_path("/elsewhere/model.py") == "/elsewhere/model.py"


@pytest.fixture
def stub_backend(monkeypatch):
    """A backend that records what it was given and compiles with aot_eager."""
    from torch._dynamo.backends.debugging import aot_eager

    calls = []

    def fa3(gm, example_inputs, **kwargs):
        graph = report.enter_graph()
        report.record(RegionReport(len(calls), graph, fused=True))
        calls.append(SimpleNamespace(kwargs=kwargs, grad=torch.is_grad_enabled()))
        return aot_eager(gm, example_inputs)

    monkeypatch.setitem(sys.modules, "fa3_compile.backend", SimpleNamespace(fa3=fa3))
    return calls


def test_explain_counts_graphs_and_places_breaks(stub_backend):
    def broken(x):
        x = x + 1
        print("a graph break")
        return x * 2

    explained = explain(broken, torch.ones(2), options={"strict": True})
    assert explained.graphs == 2
    assert len(explained.graph_breaks) == 1
    line = broken.__code__.co_firstlineno + 2
    assert f'tests/test_report.py:{line}: print("a graph break")' in explained.graph_breaks[0]
    assert explained.compile_seconds is not None and explained.compile_seconds > 0
    assert [call.kwargs for call in stub_backend] == [{"options": {"strict": True}}] * 2


def test_explain_reports_again_what_was_compiled_before(stub_backend):
    compiled = torch.compile(attend, backend="eager")
    inputs = [torch.randn(1, 2, 8, 4) for _ in range(3)]
    compiled(*inputs)
    assert [len(explain(fn, *inputs).regions) for fn in (compiled, attend, attend)] == [1, 1, 1]


@pytest.mark.parametrize("training", [None, False, True])
def test_explain_restores_modes_and_writes_no_gradients(stub_backend, training):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    model[1].eval()
    x = torch.ones(2, 4, requires_grad=True)
    backwards = []
    x.register_hook(backwards.append)
    explained = explain(model, x, training=training)
    assert len(backwards) == (1 if training else 0)
    assert [m.training for m in model.modules()] == [True, True, False]
    assert all(t.grad is None for t in (*model.parameters(), x))
    assert [call.grad for call in stub_backend] == [training is not False]
    assert explained.notes == []


def test_explain_says_when_there_was_nothing_to_differentiate(stub_backend):
    explained = explain(attend, *(torch.ones(1, 2, 8, 4) for _ in range(3)), training=True)
    assert "no backward was run" in explained.notes[0]


def test_explain_raises_what_the_model_raises_and_restores_its_mode(stub_backend):
    class Failing(nn.Module):
        def forward(self, x):
            raise ValueError("not today")

    model = Failing()
    with pytest.raises(ValueError, match="not today"):
        explain(model, torch.ones(2), training=False)
    assert model.training
