"""The wheel, the sdist and the editable install: what is in them, and that a model compiles there.

The installs go into environments that see this one's packages through a .pth file, so nothing is
downloaded; ours is hidden from them by its own install standing first on the path.
"""

import ast
import configparser
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import fa3_compile

ROOT = Path(__file__).parents[2]
DATA = ("templates", "kernels")
PROBE = {"templates/cuda/probe.cu.jinja": "// templates", "kernels/include/probe.cuh": "// kernels"}

pytestmark = pytest.mark.xdist_group("packaging")

COMPILE_A_MODEL = """
import importlib.metadata
import torch
from pathlib import Path

def attend(q, k, v):
    scores = q @ k.transpose(-2, -1) / 4
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1) @ v

import fa3_compile
from fa3_compile import resources
from fa3_compile.report import collect

inputs = [torch.randn(2, 3, 40, 16) for _ in range(3)]
# ATen's kernel alone: nothing that C++ has to be compiled for.
compiled = torch.compile(attend, backend="fa3", options={"kernels": "cpu", "strict": True})
with collect() as report:
    torch.testing.assert_close(compiled(*inputs), attend(*inputs))
assert [region.fused for region in report.regions] == [True], report
for found in (Path(fa3_compile.__file__), resources.templates(), resources.kernels()):
    print(found)
print(importlib.metadata.version("fa3_compile"))
"""


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of this checkout with a file more in each data folder."""
    copy = tmp_path_factory.mktemp("checkout") / "fa3_compile_copy"
    skip = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "dist", "results")
    shutil.copytree(ROOT, copy, ignore=skip)
    for path, text in PROBE.items():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_text(text)
    return copy


@pytest.fixture(scope="module")
def distributions(checkout, tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that was built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, checkout, cwd=out)
    return out


@pytest.fixture
def environment(tmp_path) -> Path:
    """A fresh environment whose only packages are those of this one."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", where, cwd=tmp_path).strip())
    site.joinpath("parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, *what: object) -> None:
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index")
    run(*pip, "--no-deps", "--no-build-isolation", "--ignore-installed", *what, cwd=python.parent)


def one(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def imported_packages() -> set[str]:
    """What the package imports, at the top or inside a function; not the compiler of the CUDA
    kernels and its bindings, which come with PyTorch's CUDA wheels."""
    found: set[str] = set()
    for file in (ROOT / "fa3_compile").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {"fa3_compile", "cuda"}


def data_files(root: Path) -> set[str]:
    files = (file for name in DATA for file in (root / name).rglob("*") if file.is_file())
    return {file.relative_to(root).as_posix() for file in files}


def test_wheel_contents(checkout, distributions):
    wheel = one(distributions, "*.whl")
    assert wheel.name == f"fa3_compile-{fa3_compile.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 2**20
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"fa3_compile-{fa3_compile.__version__}.dist-info"
        metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(f"{info}/entry_points.txt").decode())

    assert {name.split("/")[0] for name in names} == {"fa3_compile", info}
    code = {f.relative_to(checkout).as_posix() for f in checkout.glob("fa3_compile/**/*.py")}
    code.add("fa3_compile/py.typed")  # PEP 561: the annotations are for users' checkers too
    data = {f"fa3_compile/{name}" for name in data_files(checkout)}
    assert {f"fa3_compile/{name}" for name in PROBE} < data
    assert {name for name in names if name.startswith("fa3_compile/")} == code | data
    assert f"{info}/licenses/LICENSE" in names

    assert dict(entry_points["torch_dynamo_backends"]) == {"fa3": "fa3_compile.backend:fa3"}
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata["Requires-Python"] == "<3.14,>=3.10"
    needed = {line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert {line.split(">")[0] for line in needed} == imported_packages()


def test_sdist_contents(checkout, distributions):
    sdist = one(distributions, "*.tar.gz")
    assert sdist.stat().st_size < 3 * 2**19
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert data_files(checkout) <= names
    assert {"pyproject.toml", "LICENSE", "README.md", "Makefile", "constraints.txt"} <= names
    assert "fa3_compile/__init__.py" in names and "tests/packaging/test_distributions.py" in names
    assert not any(name.startswith((".venv", ".git/", "dist")) for name in names)


@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_a_model_compiles_from_an_install(pattern, distributions, environment, tmp_path):
    install(environment, one(distributions, pattern))
    printed = run(environment, "-c", COMPILE_A_MODEL, cwd=tmp_path).splitlines()
    package = tmp_path.resolve() / "venv" / "lib"
    assert all(Path(path).is_relative_to(package) for path in printed[:3]), printed
    assert printed[3] == fa3_compile.__version__


def test_the_readme_leads_to_a_fused_model_in_two_commands(checkout, environment, tmp_path):
    """`pip install .`, and the command after it, in an environment that has PyTorch alone."""
    readme = (checkout / "README.md").read_text()
    (first, second) = re.findall(r"^\$ (.*)$", readme, re.MULTILINE)[:2]
    assert (first, second.split()[:3]) == ("pip install .", ["python", "-m", "fa3_compile"])
    install(environment, checkout)
    words = [str(checkout / w) if "/" in w else w for w in second.split()[1:]]
    printed = run(environment, *words, cwd=tmp_path)
    assert "1 of 1 attention region fused" in printed and "ALiBi + causal" in printed


def test_a_model_compiles_from_an_editable_install(checkout, environment, tmp_path):
    install(environment, "--editable", checkout)
    printed = run(environment, "-c", COMPILE_A_MODEL, cwd=tmp_path).splitlines()
    assert [Path(path) for path in printed[:3]] == [
        checkout / "fa3_compile" / "__init__.py",
        checkout / "templates",
        checkout / "kernels",
    ]
