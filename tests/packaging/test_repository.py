"""What is kept in order beside the code: lengths, the changelog, the templates, what CI runs."""

import re
import subprocess

import pytest

import fa3_compile
from fa3_compile.__main__ import main
from tests.packaging.test_distributions import ROOT

MOST_LINES = 400
# Longer for one reason: one kernel's whole source. Nothing joins it without a reason of its own.
LONGER = {
    "templates/triton/attention_backward.py.jinja",
}
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def sources():
    for folder in ("fa3_compile", "kernels", "templates"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".cuh", ".jinja"):
                yield file


def test_no_module_is_longer_than_a_reader_bears():
    long = {
        file.relative_to(ROOT).as_posix()
        for file in sources()
        if len(file.read_text().splitlines()) > MOST_LINES
    }
    assert long <= LONGER, f"split them: {sorted(long - LONGER)}"


def test_the_longer_ones_exist():
    assert all((ROOT / file).is_file() for file in LONGER)


def test_the_changelog_has_the_version_or_what_comes_next():
    headings = re.findall(r"^## \[?([^\]\s]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased" or headings[0] == fa3_compile.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", fa3_compile.__version__)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_the_issue_templates_ask_for_what_a_command_gives(template, capsys):
    yaml = pytest.importorskip("yaml")
    form = yaml.safe_load(template.read_text())
    if template.stem == "config":
        return
    assert form["name"] and form["description"]
    for field in form["body"]:
        assert field["type"] in {"textarea", "dropdown"} and field["attributes"]["label"]
        for command in re.findall(r"python -m fa3_compile (\w+)", str(field)):
            with pytest.raises(SystemExit) as done:
                main([command, "--help"])
            assert done.value.code == 0


def test_ci_runs_what_the_contributing_page_says():
    ran = (ROOT / ".ci" / "run").read_text()
    assert all(f"make {target}\n" in ran for target in ("lint", "docs", "demo", "test"))


def test_what_is_tracked_is_text_and_small():
    """No binaries but pictures, and nothing that a wheel or a reader should not carry."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        file = ROOT / name
        if file.is_file():
            assert file.stat().st_size < 2**19, name
            if file.suffix not in (".png",):
                file.read_text(encoding="utf-8")
