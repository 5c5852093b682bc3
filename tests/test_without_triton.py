"""Where there is no Triton, no CUDA, and no Unix: the package imports, reports and computes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BLOCK = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (absent in this test)", name=name)

for name in list(sys.modules):
    if name.split(".")[0] in {absent}:
        del sys.modules[name]
sys.meta_path.insert(0, Absent())
"""
COMPILE = """
import torch
import fa3_compile

def attend(q, k, v):
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return (q @ k.mT).masked_fill(hidden, float("-inf")).softmax(-1) @ v

inputs = [torch.randn(1, 2, 16, 8) for _ in range(3)]
out = torch.compile(attend, backend="fa3", options={"strict": True})(*inputs)
torch.testing.assert_close(out, attend(*inputs))
report = fa3_compile.explain(attend, *inputs, training=False)
print(report.regions[0].kernel, report.regions[0].other_kernels["triton"])
assert not {"triton", "cuda"} & set(sys.modules), sorted(sys.modules)
"""
CACHE = """
import os, pathlib
del os.getuid
from fa3_compile.lower.binaries import cache
cache.write("triton", "key", {"kernel.py": "pass"})
print(cache.read("triton", "key"))
"""


def run(code: str, absent: set[str], home: Path) -> str:

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FA3_CACHE_DIR": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", BLOCK.format(absent=absent) + code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=home.parent,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_model_compiles_without_triton_and_cuda(tmp_path):
    absent = {"triton", "cuda", "nvidia", "pynvml"}
    assert run(COMPILE, absent, tmp_path / "fa3").startswith("cpu ")


def test_the_command_line_works_without_them(tmp_path):
    code = "from fa3_compile.__main__ import main\nmain(['env'])"
    said = run(code, {"triton", "cuda"}, tmp_path / "fa3")
    assert "no CUDA device" in said and "cuda_sm90, cpu" in said


@pytest.mark.skipif(sys.platform == "win32", reason="it is the real thing there")
def test_the_cache_works_without_unix(tmp_path):
    said = run(CACHE, {"fcntl", "resource", "pwd", "grp"}, tmp_path / "fa3")
    assert said == "{'kernel.py': b'pass'}"
