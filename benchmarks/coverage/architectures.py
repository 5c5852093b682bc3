"""What becomes of the attention of every architecture in the installed transformers, on the CPU.

    python benchmarks/coverage/architectures.py --out FILE.csv [MODEL_TYPE ...]

A tiny model of each `model_type` (tiny_config.py) takes padded inputs (tiny_inputs.py), its
attention is rewritten, and outputs and all gradients are compared with float64 eager. Each runs in
a process of its own. Rows that the file has are not run again, so that a run can go on.

Columns: model_type and class; the version of transformers; softmaxes, those that one eager forward
pass computes, routers' and SDPA's among them; fused, the attentions that the rewritten model runs
in one; left, the softmaxes that it still runs, by source line; reasons, of regions left alone;
numbers, "ok" or what differs or raised; problem, why the model could not be built or run.
"""

from __future__ import annotations

import argparse
import collections
import csv
import functools
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.coverage import tiny_settings
from benchmarks.coverage.tiny_config import tiny_fields
from benchmarks.coverage.tiny_inputs import candidates
from fa3_compile.report import collect
from fa3_compile.source import where
from fa3_compile.testing import assert_matches_eager
from tests.graph.harness import rewrite_only
from tests.models.architecture import sharpen

COLUMNS = (
    *("model_type", "class", "transformers", "softmaxes", "fused", "left", "reasons"),
    *("numbers", "problem"),
)
MOST_PARAMETERS = 60_000_000
SECONDS = 300
FORKING = threading.Lock()
# Who a row is about, and what makes it.
Task = tuple[dict[str, Any], Callable[[], dict[str, Any]]]


class Softmaxes(TorchDispatchMode):
    """Counts the softmaxes and SDPA calls that run under it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        if "backward" not in name:
            self.count += "_softmax" in name or "scaled_dot" in name
        return func(*args, **(kwargs or {}))


class Rewritten:
    """A backend: the rewritten graph as it is, counting what its calls run."""

    def __init__(self) -> None:
        self.fused = 0
        self.left: collections.Counter[str] = collections.Counter()

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        rewrite_only(gm, example_inputs)
        nodes = [n for m in gm.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes]
        fused = sum(n.target is torch.ops.fa3.attention.default for n in nodes)
        calls = [n for n in nodes if n.op in ("call_function", "call_method")]
        named = [n for n in calls if "softmax" in str(n.target) or "scaled_dot" in str(n.target)]
        left = [where(n).split("transformers/models/")[-1] for n in named]

        def run(*args):
            self.fused += fused
            self.left.update(left)
            return gm(*args)

        return run


def model_types() -> list[str]:
    """One for each class that AutoModel knows."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    first: dict[Any, str] = {}
    for name, made in MODEL_MAPPING_NAMES.items():
        first.setdefault(made[0] if isinstance(made, (tuple, list)) else made, name)
    return sorted(first.values())


def build(name: str, implementation: str) -> nn.Module:
    """The tiny model, in eval mode, with weights under which attention matters."""
    kind = transformers.AutoConfig.for_model(name).__class__
    config = kind(**tiny_fields(kind, tiny_settings.FIELDS.get(name, {})))
    config.use_cache = False
    _batched_experts(config)
    torch.manual_seed(0)
    if name in tiny_settings.CLASSES:
        made = getattr(transformers, tiny_settings.CLASSES[name])
        model = made._from_config(config, attn_implementation=implementation)
    else:
        model = transformers.AutoModel.from_config(config, attn_implementation=implementation)
    count = sum(x.numel() for x in model.parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count / 1e6:.0f} million parameters")
    return sharpen(model, tiny_settings.GAINS.get(name, 1.5)).eval()


def _batched_experts(config: Any) -> None:
    """Experts by a product that float64 has."""
    config._experts_implementation = "batched_mm"
    for name in getattr(config, "sub_configs", None) or {}:
        if getattr(config, name, None) is not None:
            _batched_experts(getattr(config, name))


def inputs_of(name: str, model: nn.Module) -> tuple[dict[str, Any], int]:
    """(the first inputs that the model takes, the softmaxes it then computes)."""
    torch.manual_seed(1)
    given = tiny_settings.INPUTS.get(name)
    refused: Exception | None = None
    for inputs in [given(model)] if given else candidates(model):
        try:
            with torch.no_grad(), Softmaxes() as softmaxes:
                model(**inputs)
            return inputs, softmaxes.count
        except Exception as error:
            refused = refused or error
    raise refused or ValueError("no inputs")


def row_of(name: str, implementation: str) -> dict[str, Any]:
    row: dict[str, Any] = {"model_type": name, "transformers": transformers.__version__}
    try:
        model = build(name, implementation)
        row["class"] = type(model).__name__
        inputs, row["softmaxes"] = inputs_of(name, model)
    except Exception as error:
        return row | {"problem": line(error)}
    backend = Rewritten()
    with collect() as report:
        try:
            assert_matches_eager(model, backend=backend, training=True, **inputs)
            row["numbers"] = "ok"
        except Exception as error:
            row["numbers"] = line(error)
    row["fused"] = backend.fused
    row["left"] = "; ".join(f"{n}x {line}" for line, n in backend.left.items())
    reasons = {f"{x.code}: {x.reason}" for x in report.regions if not x.fused}
    return row | {"reasons": "; ".join(sorted(reasons))}


def line(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def in_a_process(known: dict[str, Any], row: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `row` answers in a fork; `known` and a problem where that crashes or takes too long."""
    with FORKING:  # or another child would hold this one's pipe open
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            signal.alarm(SECONDS)
            try:
                with os.fdopen(writing, "w") as pipe:
                    json.dump(row(), pipe)
            finally:
                os._exit(0)
        os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if not text:
        return known | {"problem": f"crashed, or more than {SECONDS} s"}
    return json.loads(text)


def write_rows(out: Path, columns: Sequence[str], tasks: Iterable[Task], processes: int) -> int:
    """Adds the rows that the file does not have; how many of them have wrong numbers."""
    there: list[dict[str, str]] = []
    if out.exists():
        with out.open(newline="") as file:
            there = list(csv.DictReader(file))
    left = [x for x in tasks if not any(x[0].items() <= row.items() for row in there)]
    wrong = 0
    with out.open("a", newline="") as file, ThreadPoolExecutor(processes) as threads:
        writer = csv.DictWriter(file, columns)
        if not there:
            writer.writeheader()
        made = [threads.submit(in_a_process, *task) for task in left]
        for row in (x.result() for x in as_completed(made)):
            wrong += (row.get("numbers") or "ok") != "ok"
            writer.writerow(row)
            file.flush()
            print(row, flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--implementation", choices=("eager", "sdpa"), default="eager")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    quiet()
    tasks: list[Task] = [
        ({"model_type": name}, functools.partial(row_of, name, options.implementation))
        for name in options.names or model_types()
    ]
    return 1 if write_rows(options.out, COLUMNS, tasks, options.processes) else 0


def quiet() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
