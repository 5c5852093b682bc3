"""What holds for all tests: no cached graphs, a fresh Dynamo, GPU tests only where there is one."""

import os
import sys

# On a hit in these caches nothing is lowered, and a test of that would test an earlier run.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")
# A worker a core: threads of several would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
from torch._inductor import config as inductor_config

# Inductor's C++ for all but attention: scalar and unoptimised it takes the compiler 2/3 of the
# time, for a model of several layers 1/3.
inductor_config.cpp.simdlen = 1
inductor_config.aot_inductor.debug_compile = True

hypothesis.settings.register_profile("fa3", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("fa3")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
