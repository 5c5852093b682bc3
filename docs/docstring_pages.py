"""The pages that docstrings make: the API, and a map of the modules."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fa3_compile
from fa3_compile import report, testing

ROOT = Path(__file__).resolve().parent.parent
# The folders of the map, in the order in which an attention passes through them.
FOLDERS = (
    "fa3_compile",
    "fa3_compile/frontend",
    "fa3_compile/frontend/dynamo",
    "fa3_compile/frontend/expand",
    "fa3_compile/frontend/shadow",
    "fa3_compile/frontend/lift",
    "fa3_compile/frontend/lift/elements",
    "fa3_compile/frontend/detect",
    "fa3_compile/frontend/layout",
    "fa3_compile/frontend/rewrite",
    "fa3_compile/frontend/reasons",
    "fa3_compile/spec",
    "fa3_compile/spec/forms",
    "fa3_compile/lower",
    "fa3_compile/lower/kernels",
    "fa3_compile/lower/printers",
    "fa3_compile/lower/render",
    "fa3_compile/lower/tiles",
    "fa3_compile/lower/binaries",
    "fa3_compile/lower/launch",
    "fa3_compile/runtime",
    "kernels/sm90",
    "kernels/include/fa3",
)
API = {
    "fa3_compile": (
        fa3_compile.explain,
        fa3_compile.collect,
        fa3_compile.list_kernels,
        fa3_compile.Report,
    ),
    "fa3_compile.report": (report.RegionReport, report.Tiles),
    "fa3_compile.testing": (
        testing.assert_fused,
        testing.snapshot,
        testing.assert_matches_eager,
    ),
}
METHODS = {report.Report: ("fused", "summary", "text", "json", "markdown", "to_html", "plot_tiles")}


def api_page() -> str:
    parts = [
        "# API\n",
        'To use the package `torch.compile(model, backend="fa3")` is enough, with its '
        "[options](options.md). These are for looking at what it did, and for tests of it.\n",
    ]
    for module, members in API.items():
        for member in members:
            parts.append(f"## {module}.{member.__name__}\n\n{_member(member)}\n")
    return "\n".join(parts)


def _member(member: Any) -> str:
    """Its docstring, a function's signature before it, and a class's methods behind it."""
    if not inspect.isclass(member):
        return f"```python\n{_signature(member)}\n```\n\n{_formatted(member)}"
    methods = [f"### {name}\n\n{_member(vars(member)[name])}" for name in METHODS.get(member, ())]
    return "\n\n".join([_formatted(member), *methods])


def _signature(function: Any) -> str:
    """As it is called; long ones a line an argument."""
    if isinstance(function, property):
        signature = inspect.signature(function.fget)
        return f"{function.fget.__name__}: {signature.return_annotation}"
    signature = inspect.signature(function)
    arguments = [
        re.sub(r": '([^']*)'", r": \1", str(parameter))  # annotations that are not evaluated
        for name, parameter in signature.parameters.items()
        if name != "self"
    ]
    positional = [n for n, p in signature.parameters.items() if p.kind is p.POSITIONAL_ONLY]
    arguments[len(positional) : len(positional)] = ["/"] if positional else []
    returns = f" -> {signature.return_annotation}"
    inside = ", ".join(arguments)
    if len(inside) > 60:
        inside = "".join(f"\n    {argument}," for argument in arguments) + "\n"
    return f"{function.__name__}({inside}){returns}"


def _formatted(documented: Any) -> str:
    """A docstring as markdown: lines `name   text` become a list."""
    paragraphs = inspect.cleandoc(documented.__doc__ or "").split("\n\n")
    return "\n\n".join(_paragraph(paragraph) for paragraph in paragraphs)


def _paragraph(paragraph: str) -> str:
    items = described(paragraph)
    if paragraph.startswith("    "):
        return f"```text\n{textwrap.dedent(paragraph)}\n```"
    if not items:
        return paragraph
    return "\n".join(f"- `{name}`: {said.strip()}" for name, said in items.items())


# ---- modules ----


def modules_page() -> str:
    parts = [
        "# The modules\n",
        "What each says of itself in its first lines. [How it works](how-it-works.md) takes one "
        "example through them.\n",
    ]
    for folder in FOLDERS:
        rows = "\n".join(f"| `{name}` | {said} |" for name, said in _modules(ROOT / folder))
        parts.append(f"## {folder}\n\n{_head(ROOT / folder)}\n\n| | |\n|---|---|\n{rows}\n")
    return "\n".join(parts)


def _modules(folder: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(x for x in folder.iterdir() if x.suffix in (".py", ".cuh")):
        if file.name != "__init__.py":
            yield file.name, cell(_first_paragraph(file))


def cell(text: str) -> str:
    """For a table: what ends a cell or begins a tag is escaped, outside of code spans."""
    parts = text.split("`")
    parts[::2] = (x.replace("|", "\\|").replace("<", "&lt;") for x in parts[::2])
    return "`".join(parts)


def _head(folder: Path) -> str:
    package = folder / "__init__.py"
    return _first_paragraph(package) if package.is_file() else ""


def _first_paragraph(file: Path) -> str:
    """Of a Python file's docstring, or of the comment at the head of a CUDA header."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    else:
        lines = (
            line.removeprefix("//").strip() for line in text.partition("#pragma")[0].split("\n")
        )
        said = "\n".join(lines).strip()
    return " ".join(said.split("\n\n")[0].split())


def described(docstring: str) -> dict[str, str]:
    """name -> text of the lines `name   text`, continued by deeper lines; also of several names,
    whose text may begin in the line below."""
    found: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(docstring).splitlines():
        start = re.match(r"(\w+(?:, \w+)*)(?: {2,}(\S.*)|$)", line)
        if start:
            name = start[1]
            found[name] = start[2] or ""
        elif name and line.startswith("  "):
            found[name] += " " + line.strip()
        else:
            name = ""
    return found
