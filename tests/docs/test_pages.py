"""The generated pages, and the links and file names of all pages; `make docs` builds them strictly."""

import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import fa3_compile
from fa3_compile import testing
from fa3_compile.options import Options
from tests.docs.blocks import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import gallery_forms
import generate

PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("benchmarks/**/*.md")]
)
GENERATED = {"gallery.md", "api.md", "modules.md", "options.md", "errors.md"}
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def pages():
    return generate.pages()


def test_the_gallery_shows_every_form_fused(pages):
    gallery = pages["gallery.md"]
    for function, (title, _) in gallery_forms.FORMS.items():
        assert f"## {title}\n" in gallery
        assert f"def {function.__name__}(" in gallery
    # A picture for each mask that positions alone decide, or decide in part.
    assert gallery.count("<svg") == 14
    assert "`50*tanh(0.005*s)`" in gallery
    assert "| mask | `(kv <= 299) | (kv <= q)` |" in gallery
    assert "ALiBi + causal" in gallery
    assert "stays with Inductor" in gallery and "`cuda_sm90`" in gallery


def test_the_options_page_has_every_option_and_kernel(pages):
    for field in fields(Options):
        assert f"`{field.name}` | `FA3_{field.name.upper()}`" in pages["options.md"]
    assert "| `cpu` | 10 | ATen's own flash kernel" in pages["options.md"]


def test_the_api_page_has_every_public_name(pages):
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", pages["api.md"], re.M | re.S))
    for name in {*fa3_compile.__all__} - {"__version__"}:
        assert f"fa3_compile.{name}" in sections
    for name, function in (
        ("fa3_compile.explain", fa3_compile.explain),
        ("fa3_compile.testing.assert_fused", testing.assert_fused),
        ("fa3_compile.testing.assert_matches_eager", testing.assert_matches_eager),
    ):
        for parameter in {*inspect.signature(function).parameters} - {"model_or_fn"}:
            item = rf"^- `([\w, ]+, )?{parameter}(, [\w, ]+)?`: \S"
            assert re.search(item, sections[name], re.M), (name, parameter)
    for column in fields(fa3_compile.Report):
        assert f"- `{column.name}`: " in sections["fa3_compile.Report"]


def test_every_module_says_what_it_is_for(pages):
    listed = dict(re.findall(r"^\| `([\w.]+)` \| (.*) \|$", pages["modules.md"], re.MULTILINE))
    files = [*generate.PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.cuh")]
    assert {x.name for x in files} - {"__init__.py"} == {*listed}
    assert [name for name, said in listed.items() if len(said) < 20] == []


def test_the_errors_page_has_every_decline_of_the_sources(pages):
    text = "".join(file.read_text() for file in generate.PACKAGE.rglob("*.py"))
    named = set(re.findall(r'Decline\(\s*"([a-z-]+)"', text))
    assert len(named) > 10
    listed = {refusal.code for refusal in generate.refusals()}
    assert named <= listed
    assert "| `not-pointwise` |" in pages["errors.md"]
    # Sentences that a name stands for are followed to where it is assigned, each with its hint.
    said = {(x.said, x.hint) for x in generate.refusals() if x.code == "output-unclear"}
    assert len(said) == 3 and all(sentence != "output unclear" and hint for sentence, hint in said)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in LINK.findall(text):
        if re.match(r"https?://|#", link):
            continue
        target = link.partition("#")[0]
        assert (page.parent / target).exists() or target in GENERATED, f"{page.name}: {link}"


def test_every_picture_is_shown():
    shown = {Path(link).name for page in PAGES for link in LINK.findall(page.read_text())}
    assert {x.name for x in (ROOT / "docs" / "images").iterdir()} <= shown


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_files_that_a_page_names_exist(page):
    """`fa3_compile/frontend/lift/lift.py`, `tests/numerics`; from the checkout or from the package."""
    if page.name == "CHANGELOG.md":
        return
    for name in re.findall(r"`((?:[\w.-]+/)+[\w.*-]*)`", page.read_text()):
        roots = [ROOT, ROOT / "fa3_compile", page.parent, ROOT / "kernels" / "include"]
        assert any([*root.glob(name.rstrip("/"))] for root in roots), f"{page.name}: {name}"
