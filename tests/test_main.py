"""`python -m fa3_compile`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fa3_compile
from fa3_compile import report
from fa3_compile.__main__ import main
from fa3_compile.lower.binaries import cache
from tests.host_driver import launches

__all__ = ["launches"]

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def stub_backend(monkeypatch):
    def fa3(gm, example_inputs, **kwargs):
        report.record(report.RegionReport(0, report.enter_graph(), fused=torch.is_grad_enabled()))
        return gm.forward

    monkeypatch.setitem(sys.modules, "fa3_compile.backend", SimpleNamespace(fa3=fa3))


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "somebodys_model.py").write_text(
        "import torch\n"
        "def make():\n"
        "    return torch.nn.Linear(2, 2), (torch.ones(1, 2),)\n"
        "def alone():\n"
        "    return torch.nn.Linear(2, 2)\n"
        "def one_argument():\n"
        "    return torch.nn.Linear(2, 2), torch.ones(1, 2)\n"
        "def asks(x):\n"
        "    return x\n"
        "def make_with_keywords():\n"
        "    return torch.nn.Linear(2, 2), (), {'input': torch.ones(1, 2)}\n"
        "def make_with_our_keywords():\n"
        "    return lambda training, options: training * options, (), "
        "{'training': torch.ones(2), 'options': 3}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return "somebodys_model"


def test_env_names_versions_kernels_and_the_cache(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FA3_CACHE_DIR", str(tmp_path / "kernels"))
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    for expected in (fa3_compile.__version__, torch.__version__, str(tmp_path / "kernels")):
        assert expected in printed
    assert "reference" in printed


def test_env_names_the_gpu_and_its_driver(capsys, launches, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert re.search("driver +CUDA 13.0\n", printed) and "the host, sm_90" in printed


@pytest.mark.parametrize("command", ["env", "explain", "bench", "repro"])
def test_a_wrong_option_in_the_environment_is_said_not_raised(
    capsys, factory, monkeypatch, command
):
    monkeypatch.setenv("FA3_AUTOTUNE", "fast")
    assert main([command, f"{factory}:make"] if command != "env" else [command]) == 2
    assert "'none', 'quick' or 'full'" in capsys.readouterr().err


@pytest.mark.parametrize("function", ["make", "make_with_keywords", "make_with_our_keywords"])
def test_explain_prints_the_report(capsys, stub_backend, factory, function):
    assert main(["explain", f"{factory}:{function}"]) == 0
    assert "1 of 1 attention region fused, 1 graph" in capsys.readouterr().out


def test_explain_can_print_json_and_choose_the_mode(capsys, stub_backend, factory):
    assert main(["explain", f"{factory}:make", "--json", "--inference"]) == 0
    assert json.loads(capsys.readouterr().out)["regions"][0]["fused"] is False


@pytest.mark.parametrize("place", ["nowhere:make", "somebodys_model:missing", "somebodys_model"])
def test_explain_says_how_to_name_a_factory(capsys, factory, place):
    assert main(["explain", place]) == 2
    assert "package.module:function" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torch", "cannot be called without arguments"),
        ("asks", "cannot be called without arguments: missing a required argument: 'x'"),
        ("alone", "returned Linear, not (model, arguments)"),
        ("one_argument", "returned Tensor in the place of the arguments"),
    ],
)
def test_explain_says_what_a_factory_has_to_be(capsys, factory, name, said):
    assert main(["explain", f"{factory}:{name}"]) == 2
    error = capsys.readouterr().err
    assert said in error and "a single argument is (x,)" in error


def test_a_file_that_cannot_be_written_is_said_before_anything_is_compiled(capsys, factory):
    with pytest.raises(SystemExit):
        main(["explain", f"{factory}:make", "--html", "nowhere/report.html"])
    assert "nowhere/report.html cannot be written" in capsys.readouterr().err


def test_cache_counts_entries_and_clears_nothing_else(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FA3_CACHE_DIR", str(tmp_path))
    entry = cache.write("triton", "somekey", {"kernel.py": "pass"})
    (tmp_path / "triton" / "notes").mkdir()
    (tmp_path / "thesis.tex").write_text("mine")
    assert main(["cache", "--clear"]) == 0
    printed = capsys.readouterr().out
    assert "entries: 1" in printed and "triton" in printed
    assert not entry.exists()
    assert (tmp_path / "thesis.tex").exists() and (tmp_path / "triton" / "notes").exists()


def test_a_reader_who_has_seen_enough_is_no_error(tmp_path):
    """`| head`: nothing is read from the pipe, whose other end is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fa3_compile", "cache"]
    environment = {**os.environ, "FA3_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        command, env=environment, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
