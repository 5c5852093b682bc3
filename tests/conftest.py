"""What holds for all tests: no cached graphs, a fresh Dynamo, GPU tests only where there is one."""

import gc
import logging
import os

# On a hit in these caches nothing is lowered, and a test of that would test an earlier run.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")
# Threads would wait for each other: tensors are tiny, and there is a worker a core. On two busy
# cores a file of tests/graph takes 16 s of CPU time instead of 41.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo import guards
from torch._inductor import config as inductor_config

# Inductor's C++ for all but attention: scalar and unoptimised it takes the compiler 2/3 of the
# time, for a model of several layers 1/3.
inductor_config.cpp.simdlen = 1
inductor_config.aot_inductor.debug_compile = True

# Dynamo times the guards of each compilation, on an emptied CPU cache: 20 ms, and the other worker's
# cache as well.
guards.profile_guard_manager = lambda *_: 0.0  # pyright: ignore
# pytest listens to each logger that does not propagate; for whoever listens to this one PyTorch
# writes every graph down.
logging.getLogger("torch.__trace").propagate = True
# Nor a search for garbage after each compilation; see pytest_collection_finish.
dynamo_config.run_gc_after_compile = False

hypothesis.settings.register_profile("fa3", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("fa3")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish():
    """What is there before the first test stays: a tenth of the time went into looking through it
    for garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()
