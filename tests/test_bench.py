"""`python -m fa3_compile bench`: three ways to run a model, and what it leaves behind."""

import torch
from torch import nn

from fa3_compile.__main__ import main
from fa3_compile.bench import WAYS, bench, table


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.25))

    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ (x * self.scale)


def make():
    return Attention(), (torch.randn(1, 2, 16, 8),)


def test_every_way_is_timed_and_close_to_eager():
    model, inputs = make()
    report, results = bench(model, inputs, training=True)
    assert tuple(results) == tuple(report.milliseconds) == WAYS
    assert all(result.milliseconds > 0 for result in results.values())
    assert results["eager"].difference == 0.0
    assert all(result.difference < 1e-4 for result in results.values())
    assert [region.fused for region in report.regions] == [True]
    assert model.scale.grad is None
    assert [line.split()[0] for line in table(results).splitlines()[1:]] == list(WAYS)


def test_a_wrong_way_would_be_seen():
    from fa3_compile.bench import _difference

    right = [torch.tensor([1.0, -4.0, float("inf")])]
    assert _difference(right, right) == 0.0
    assert _difference([torch.tensor([1.0, -3.0, float("inf")])], right) == 0.25


def test_the_command_prints_the_report_and_writes_the_page(tmp_path, capsys, monkeypatch):
    def stub(model, args, kwargs, training):
        from fa3_compile.bench import Result
        from fa3_compile.report import Report

        assert training is False and len(args) == 1 and kwargs == {}
        times = dict.fromkeys(WAYS, 1.5)
        return Report(milliseconds=times), {name: Result(1.5) for name in WAYS}

    monkeypatch.setattr("fa3_compile.bench.bench", stub)
    page = tmp_path / "report.html"
    assert main(["bench", f"{__file__}:make", "--inference", "--html", str(page)]) == 0
    assert "inductor" in capsys.readouterr().out
    assert "1.500" in page.read_text()
