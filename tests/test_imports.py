"""What may import what, and what importing the package costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fa3_compile"

# The part of the package a module belongs to -> the parts that it may import from.
BASE = {
    "errors",
    "options",
    "report",
    "report_html",
    "report_tiles",
    "resources",
    "source",
    "timing",
}
MAY_IMPORT = {
    "spec": {"errors"},
    "runtime": {"spec", *BASE},
    "lower": {"runtime", "spec", *BASE},
    "frontend": {"spec", *BASE},
    "selection": {"frontend", "lower", "runtime", "spec", *BASE},
    "mask_tensors": {"selection", "frontend", "lower", "runtime", "spec", *BASE},
    "pipeline": {"mask_tensors", "selection", "frontend", "lower", "runtime", "spec", *BASE},
    **dict.fromkeys(BASE, BASE),
}
# Entry points stand above the pipeline and may import anything.
TOP = {"__init__", "__main__", "backend", "bench", "explaining", "fused", "repro", "testing"}


def part_of(module: str) -> str:
    """`fa3_compile.spec.expr` -> `spec`; the package itself -> `__init__`."""
    return (module.split(".") + ["__init__"])[1]


def imported_modules(source: str, module: str) -> list[str]:
    """Every module of ours that the source imports, at the top or inside a function."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from fa3_compile import report` imports a module; `import Report` from it does not.
            found += [
                f"{origin}.{a.name}" if origin == "fa3_compile" else origin
                for a in node.names
                if a.name != "__version__"
            ]
    return [name for name in found if name.split(".")[0] == "fa3_compile"]


def violations(source: str, module: str) -> list[str]:
    part = part_of(module)
    if part in TOP:
        return []
    allowed = MAY_IMPORT.get(part, set()) | {part}
    return [
        f"{module} imports {name}"
        for name in imported_modules(source, module)
        if part_of(name) not in allowed
    ]


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)


FILES = sorted(PACKAGE.rglob("*.py"))


def test_imports_point_one_way():
    assert [
        line for file in FILES for line in violations(file.read_text(), module_name(file))
    ] == []


def test_every_module_has_a_place_in_the_order():
    parts = {part_of(module_name(file)) for file in FILES}
    assert parts <= MAY_IMPORT.keys() | TOP


@pytest.mark.parametrize(
    "module, source",
    [
        ("fa3_compile.spec.expr", "from fa3_compile.frontend.lift.lift import lift"),
        ("fa3_compile.frontend.lift.lift", "def f():\n    import fa3_compile.lower.choose"),
        ("fa3_compile.runtime.op", "from fa3_compile.lower import choose"),
        ("fa3_compile.report", "from fa3_compile import pipeline"),
        ("fa3_compile.spec.expr", "from ..pipeline import run"),
        ("fa3_compile.spec.forms.masks", "from ...lower import choose"),
        ("fa3_compile.spec.__init__", "from ..lower import choose"),
    ],
)
def test_the_check_sees_a_wrong_import(module, source):
    assert len(violations(source, module)) == 1


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return done.stdout.strip()


def test_importing_costs_nothing_and_brings_no_triton():
    seconds, modules = run_python(
        "import sys, time, torch\n"
        "start = time.perf_counter()\n"
        "import fa3_compile\n"
        "fa3_compile.explain, fa3_compile.Report, fa3_compile.list_kernels, fa3_compile.__version__\n"
        "print(time.perf_counter() - start)\n"
        "print([m for m in ('triton', 'sympy', 'torch._inductor') if m in sys.modules])\n"
    ).splitlines()
    assert float(seconds) < 0.1
    assert modules == "[]"


def test_importing_alone_does_not_import_torch():
    assert run_python("import sys, fa3_compile; print('torch' in sys.modules)") == "False"


def test_an_unknown_name_is_an_attribute_error():
    import fa3_compile

    with pytest.raises(AttributeError, match="no attribute 'explane'"):
        _ = fa3_compile.explane
    assert {"explain", "Report", "list_kernels"} <= set(dir(fa3_compile))
