"""The pages made from the code: those of `docstring_pages`, the gallery, the options, the errors.
`docs/hooks.py` adds them.

python docs/generate.py FOLDER    writes them, to be looked at
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "docs")) if path not in sys.path]

import torch

import gallery_forms as gallery
from docstring_pages import api_page, cell, described, modules_page
from fa3_compile import errors, options
from fa3_compile.backend import rewritten
from fa3_compile.explaining import explain_with
from fa3_compile.lower.choose import Problem, kernels
from fa3_compile.report_tiles import svg
from fa3_compile.spec.attention import AttentionSpec

PACKAGE = ROOT / "fa3_compile"
# What a column of the gallery stands for: a problem's device, capability and dtype.
DEVICES = {
    "Hopper, bf16": ("cuda", (9, 0), torch.bfloat16),
    "other NVIDIA, bf16": ("cuda", (8, 0), torch.bfloat16),
    "CPU, float32": ("cpu", None, torch.float32),
}


def pages() -> dict[str, str]:
    """Markdown by file name."""
    return {
        "gallery.md": gallery_page(),
        "api.md": api_page(),
        "modules.md": modules_page(),
        "options.md": options_page(),
        "errors.md": errors_page(),
    }


# ---- gallery ----


def gallery_page() -> str:
    parts = [
        "# Gallery of forms\n",
        "Each function below is `docs/gallery_forms.py`'s, run through the pass when "
        "this page was built: formula, picture and kernels are what it answered. Pictures show "
        "2048 x 2048 elements in tiles of 128 x 128: grey is skipped, orange runs with the mask, "
        "blue without it.\n",
    ]
    for function, (title, said) in gallery.FORMS.items():
        region = _region(function)
        source = inspect.getsource(function)
        picture = svg(region.tiles) if region.tiles else ""
        if region.tiles and not picture:
            picture = f"<small>tiles: {region.tiles}</small>"
        rows = [f"| score | `{region.score}` |"]
        if region.mask:
            rows.append(f"| mask | {cell(f'`{region.mask}`')} |")
        if region.weight:
            rows.append(f"| weight | {cell(f'`{region.weight}`')} |")
        rows.append(f"| called | {region.form} |")
        parts.append(
            f"## {title}\n\n{said}\n\n```python\n{source}```\n\n| | |\n|---|---|\n"
            + "\n".join(rows)
            + f"\n\n{picture}\n\n{_support(region.spec)}\n"
        )
    return "\n".join(parts)


def _region(function):
    names = list(inspect.signature(function).parameters)[3:]
    shape = (gallery.BATCH, gallery.HEADS, gallery.LENGTH, gallery.DIM)
    arguments = [torch.zeros(shape) for _ in range(3)] + [gallery.CAPTURED[n]() for n in names]
    with torch.no_grad():
        report = explain_with(_read_only, function, arguments, {}, _REFERENCE, None)
    (region,) = report.regions
    assert region.fused, region.line()
    return region


_REFERENCE = {"kernels": "reference"}


def _read_only(gm, example_inputs, **settings):
    """The pass, and zeros in place of running what it makes."""
    rewritten(gm, example_inputs, **settings)
    return lambda *inputs: (torch.zeros(()),)


def _support(spec_text: str) -> str:
    """Which kernel family takes the form where, forward and backward."""
    spec = AttentionSpec.parse(spec_text)
    lines = ["| | " + " | ".join(DEVICES) + " |", "|---|" + "---|" * len(DEVICES)]
    for row, backward in (("forward", False), ("gradients", True)):
        cells = [_first(spec, d, c, dtype, backward) for d, c, dtype in DEVICES.values()]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _first(spec: AttentionSpec, device, capability, dtype, backward: bool) -> str:
    aux = {"bool": torch.bool, "int": torch.int64, "float": dtype}
    problem = Problem(
        spec, dtype, torch.device(device), capability, 2, 16, 16, 2048, 2048, 128, 128,
        aux_dtypes=tuple(aux[kind] for kind in spec.aux), needs_grad=backward,
        aux_needs_grad=(False,) * len(spec.aux),
    )  # fmt: skip
    for kernel in kernels():
        if kernel.name != "reference" and kernel.supports(problem) is None:
            if not backward or kernel.supports_backward(problem) is None:
                return f"`{kernel.name}`"
    return "reference" if backward else "stays with Inductor"


# ---- options ----


def options_page() -> str:
    meanings = described(options.Options.__doc__ or "")
    rows = [
        f"| `{field.name}` | `FA3_{field.name.upper()}` | {cell(takes.takes)} "
        f"| `{field.default!r}` | {cell(meanings[field.name])} |"
        for field, takes in zip(fields(options.Options), options._FIELDS.values(), strict=True)
    ]
    families = "\n".join(f"| `{k.name}` | {k.priority} | {_family(k)} |" for k in kernels())
    return f"""# Options and environment

`torch.compile(model, backend="fa3", options={{...}})`, or the environment variable; options win.
Every other name is handed to Inductor, whose `mode=` works too (`mode="max-autotune"` also means
`autotune="full"`). A name that nobody knows raises, with the nearest one that exists.

| option | variable | takes | default | meaning |
|---|---|---|---|---|
{chr(10).join(rows)}

## Other variables

| variable | meaning |
|---|---|
| `FA3_CACHE_DIR` | where kernels are kept, see [the cache](kernels.md#the-cache) |
| `TORCH_LOGS="+fa3_compile"` | a log line for every attention region and each kernel's source |

## Kernel families

The first in the list that supports an attention runs it; `options={{"kernels": ...}}` narrows the
list. `reference` is taken only when it is named.

| name | priority | |
|---|---|---|
{families}
"""


def _family(kernel) -> str:
    module = sys.modules[type(kernel).__module__]
    first = inspect.cleandoc(module.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return cell(re.sub(r"^`\w+`: ", "", first))


# ---- errors ----


@dataclass(frozen=True, order=True)
class Refusal:
    """One `Decline(...)` of the sources."""

    code: str
    said: str
    hint: str
    where: str


def errors_page() -> str:
    rows = "\n".join(
        f"| `{r.code}` | {cell(r.said)} | {cell(r.hint)} | `{r.where}` |" for r in refusals()
    )
    classes = "\n".join(
        f"| `{c.__name__}` | {cell(inspect.cleandoc(c.__doc__ or '').splitlines()[0])} |"
        for c in (errors.OptionError, errors.InternalError)
    )
    return f"""# Errors and declines

An attention that cannot be taken is no error: it stays as it was, and the report gives a code, a
sentence, and a hint where there is something to change. Parts in braces are filled in.

| code | reason | hint | decided in |
|---|---|---|---|
{rows}

## Exceptions

Each says what happened, where, and what to do. Both are subclasses of
`fa3_compile.errors.Fa3Error`.

| class | raised for |
|---|---|
{classes}
"""


def refusals() -> list[Refusal]:
    """Every decline that the package can give, read from its sources."""
    found = set()
    for file in sorted(PACKAGE.rglob("*.py")):
        where = file.relative_to(PACKAGE).as_posix()
        for call, names in _declines(ast.parse(file.read_text()).body, {}):
            found |= set(_refusals(call, names, where))
    return sorted(found)


# What names may stand for: the expressions that were assigned to each.
Names = dict[str, list[ast.expr]]


def _declines(block: list[ast.stmt], names: Names) -> Iterator[tuple[ast.Call, Names]]:
    """Every call of Decline, and the names that it may use."""
    names = dict(names)
    for statement in block:
        for child in ast.iter_child_nodes(statement):
            for call in ast.walk(child) if isinstance(child, ast.expr) else ():
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                    if call.func.id == "Decline" and call.args:
                        yield call, names
        inner = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
        for part in (*inner, *(x.body for x in getattr(statement, "handlers", ()))):
            yield from _declines(part, names)
        if isinstance(statement, ast.Assign):
            names |= dict(_assigned(statement))
        elif not isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            for node in ast.walk(statement):
                for name, values in _assigned(node):
                    names[name] = [*names.get(name, []), *values]


def _assigned(node: ast.AST) -> Iterator[tuple[str, list[ast.expr]]]:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        yield node.targets[0].id, [node.value]


def _refusals(call: ast.Call, names: Names, where: str) -> Iterator[Refusal]:
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    message = keywords.get("message")
    hints = [*_texts(call.args[2] if len(call.args) > 2 else keywords.get("hint"), names)]
    for code in _texts(call.args[0], names):
        if re.fullmatch(r"[a-z][a-z-]*", code):
            said = [*_texts(message, names)] or [code.replace("-", " ")]
            if message is not None and not [*_texts(message, names)]:
                said[0] += f": {{{ast.unparse(message)}}}"
            # Of one branch each, or one for all.
            apart = hints if len(hints) == len(said) else hints[:1] * len(said)
            for i, sentence in enumerate(said):
                yield Refusal(code, sentence, apart[i] if apart else "", where)


def _texts(node: ast.expr | None, names: Names) -> Iterator[str]:
    """The texts that an expression may be: constants, formatted ones, either branch of a choice,
    what a name was assigned."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(_piece(part, names) for part in node.values)
    elif isinstance(node, ast.IfExp):
        yield from _texts(node.body, names)
        yield from _texts(node.orelse, names)
    elif isinstance(node, ast.BinOp):
        yield "".join(_piece(part, names) for part in (node.left, node.right))
    elif isinstance(node, ast.Name):
        for value in names.get(node.id, ()):
            yield from _texts(value, {k: v for k, v in names.items() if k != node.id})


def _piece(node: ast.expr, names: Names) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    value = node.value if isinstance(node, ast.FormattedValue) else node
    texts = [*_texts(value, names)] if isinstance(value, ast.Name) else []
    return texts[0] if len(texts) == 1 else "{" + ast.unparse(value) + "}"


def main(folder: str) -> None:
    for name, text in pages().items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
