"""A second process finds the first one's compiled graph, unless our sources have changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
import torch
from torch._dynamo.utils import counters
from fa3_compile import backend, selection
from fa3_compile.report import collect

def attention(q, k, v):
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    return (q @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ v

def run():
    torch._dynamo.reset()
    counters.clear()
    q, k, v = (torch.full((1, 2, 16, 8), float(n), requires_grad=True) for n in (1, 2, 3))
    # ATen's kernels alone: nothing that C++ has to be compiled for.
    options = {"kernels": "cpu"}
    with collect() as report:
        call = torch.compile(attention, backend=backend.fa3, options=options)
        call(q, k, v).sum().backward()
    caches = {
        "autograd": counters["aot_autograd"]["autograd_cache_hit"],
        "missed": counters["aot_autograd"]["autograd_cache_miss"],
    }
    return {"fused": len(report.fused), "gradient": v.grad.sum().item(), **caches}

found = [run()]
if "edited" in sys.argv:
    selection.source_hash = lambda: "0123456789abcdef"
    found.append(run())
print(json.dumps(found))
"""


def run(cache: Path, *args: str) -> list[dict]:
    """What the program counts in a process of its own."""
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *args], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_second_process(tmp_path):
    [first] = run(tmp_path)
    assert first == {"fused": 1, "gradient": 256.0, "autograd": 0, "missed": 1}
    second, edited = run(tmp_path, "edited")
    # The pass runs in every process, and reports; what it leads to is not compiled again.
    assert second == first | {"autograd": 1, "missed": 0}
    assert edited == first
