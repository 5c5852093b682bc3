"""Every code block and command of the README and the documentation is run."""

import shlex
import subprocess

import pytest

from fa3_compile.__main__ import main
from tests.docs.blocks import FENCE, ROOT, blocks, commands, run

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
RECIPES = {"operator.md", "form.md", "kernel.md"}
# Code that stands for itself: a part of a model, shown for what the stages make of it.
SHOWN = {"how-it-works.md"}
MODEL = """
import torch
def make():
    return (lambda q, k, v: (q @ k.mT).softmax(-1) @ v), [torch.randn(1, 2, 8, 16)] * 3
"""


def id_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if blocks(p, "python") and p.name not in RECIPES | SHOWN],
    ids=id_of,
)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for number, code in enumerate(blocks(page, "python")):
        run(code, namespace, f"{page.name}[{number}]")


def test_every_command_is_run_somewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_model.py").write_text(MODEL)
    typed = dict.fromkeys(command for page in PAGES for command in commands(page))
    assert typed
    for command in typed:
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            # .ci/run runs them; here that the targets exist.
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        elif words[:2] == ["pip", "install"]:
            assert words[2:] == ["."]  # tests/packaging/test_distributions.py
        elif words[0].endswith(".sh"):
            # Gigabytes of other torches: here that it is there, and a script.
            subprocess.run(["sh", "-n", words[0]], cwd=ROOT, check=True)
        elif words[1].startswith("benchmarks/"):
            _parses(words)
        else:
            assert words[:3] == ["python", "-m", "fa3_compile"], command
            place = [str(ROOT / w) if w.startswith("examples/") else w for w in words[3:]]
            assert main(place) == 0, capsys.readouterr()


def _parses(words: list[str]) -> None:
    """Benchmarks take minutes and a GPU: tests/benchmarks runs them, here the words are read."""
    from benchmarks import run as runner

    assert (ROOT / words[1]).is_file()
    if words[1].endswith("run.py"):
        arguments = runner.parser().parse_args(words[2:])
        assert arguments.list or runner.jobs(arguments)


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_every_block_says_what_it_is(page):
    languages = {block["language"] for block in FENCE.finditer(page.read_text())}
    assert languages <= {"python", "console", "text"}, languages
