"""What becomes of attention as public packages write it: timm, diffusers, x-transformers and more.

    PYTHONPATH=SITE python benchmarks/coverage/packages.py --out FILE.csv [--only WORD] [TABLE ...]

Each module of the tables package_*.py beside it gets weights under which attention matters, its
attention is rewritten, and outputs and all gradients are compared with float64 eager. Each runs in
a process of its own. Packages that are not installed are skipped, and so are rows that the file
has, so that a run can go on. SITE holds the packages; torchvision is stood in for.

Columns: package, its version, case; softmaxes, those that one eager forward pass computes, SDPA's
among them (empty where flex_attention is called); fused, the attentions that the rewritten module
runs in one; left, the softmaxes that it still runs, by source line; reasons, of regions left alone;
error, the worst distance from float64 as a share of eager's own (and a rounding); numbers, "ok" or
what differs or raised; problem, why the module could not be built or run.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import importlib
import importlib.util
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import flex_attention as flex

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.coverage.architectures import Rewritten, Softmaxes, in_a_process, line
from benchmarks.coverage.package_case import Case
from benchmarks.coverage.torchvision_stand_in import torchvision_stand_in
from fa3_compile import testing
from fa3_compile.report import collect
from tests.models.architecture import sharpen

COLUMNS = (
    *("package", "version", "case", "softmaxes", "fused", "left", "reasons", "error"),
    *("numbers", "problem"),
)
# Those that import torchvision.
PICTURES = ("timm", "vit_pytorch")
TABLES = ("timm", "diffusers", "x_transformers", "vit_pytorch", "attn_gym", "more")
# Where the names of a package and of what is installed differ.
INSTALLED_AS = {"esm": "fair-esm"}


def stand_in(package: str) -> contextlib.AbstractContextManager[None]:
    """What the package needs to be imported."""
    return torchvision_stand_in() if package in PICTURES else contextlib.nullcontext()


def row_of(package: str, name: str, case: Case) -> dict[str, Any]:
    """The row of one case, in a process of its own."""
    # PyTorch refuses flex_attention's gradients on a CPU only for want of a kernel.
    flex._validate_device = lambda *_: None
    row: dict[str, Any] = {"package": package, "case": name}
    row["version"] = version(INSTALLED_AS.get(package, package))
    torch.manual_seed(0)
    try:
        with stand_in(package):
            subject, args, kwargs = case()
        if isinstance(subject, torch.nn.Module):
            sharpen(subject, 1.0).eval()
        with torch.no_grad():
            subject(*args, **kwargs)
    except Exception as error:
        return row | {"problem": line(error)}
    # flex_attention, which compiles itself, does not run under such a mode.
    with contextlib.suppress(RuntimeError, NotImplementedError), torch.no_grad():
        with Softmaxes() as softmaxes:
            subject(*args, **kwargs)
        row["softmaxes"] = softmaxes.count
    torch._dynamo.reset()
    backend = Rewritten()
    errors: list[float] = []
    close = testing.assert_close_to_oracle

    def measured(ours, eager, oracle):
        errors.append(_worst(ours, eager, oracle))
        close(ours, eager, oracle)

    with collect() as report, mock.patch.object(testing, "assert_close_to_oracle", measured):
        try:
            testing.assert_matches_eager(subject, *args, backend=backend, training=True, **kwargs)
            row["numbers"] = "ok"
        except Exception as error:
            row["numbers"] = line(error)
    row["fused"] = backend.fused
    row["left"] = "; ".join(
        f"{n}x {package}/{at.split(f'/{package}/')[-1]}" for at, n in backend.left.items()
    )
    reasons = {f"{x.code}: {x.reason}" for x in report.regions if not x.fused}
    row["error"] = f"{errors[0]:.2f}" if errors else ""
    return row | {"reasons": "; ".join(sorted(reasons))}


def _worst(ours, eager, oracle) -> float:
    """The largest distance from the oracle, as a share of eager's distance and a rounding."""
    worst = 0.0
    for kind in ("outputs", "gradients"):
        mine, theirs, truth = (getattr(x, kind) for x in (ours, eager, oracle))
        for name, exact in truth.items():
            if name in mine and exact.is_floating_point():
                kept = torch.isfinite(exact) & torch.isfinite(mine[name])
                if not bool(kept.any()):
                    continue
                a, b = ((x[name].double() - exact)[kept].abs().max() for x in (mine, theirs))
                rounding = torch.finfo(theirs[name].dtype).eps * exact[kept].abs().max()
                worst = max(worst, float(a / (b + rounding)) if float(a) else 0.0)
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []])
    parser.add_argument("--only", default="", help="cases that have this word in their names")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    there: set[tuple[str, str]] = set()
    if options.out.exists():
        with options.out.open(newline="") as file:
            there = {(row["package"], row["case"]) for row in csv.DictReader(file)}
    new, wrong = not there, 0
    with options.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        for table in options.tables or TABLES:
            if table != "more" and importlib.util.find_spec(table) is None:
                print(f"{table} is not installed", flush=True)
                continue
            with stand_in(table):
                cases = importlib.import_module(f"benchmarks.coverage.package_{table}").CASES
            for case_name, case in cases.items():
                package, name = table, case_name
                if table == "more":
                    package, name = case_name.split(": ")
                    if importlib.util.find_spec(package) is None:
                        continue
                if (package, name) in there or options.only not in name:
                    continue
                known = {"package": package, "case": name}
                row = in_a_process(known, functools.partial(row_of, package, name, case))
                wrong += row.get("numbers", "ok") != "ok"
                writer.writerow(row)
                file.flush()
                print({k: v for k, v in row.items() if v != ""}, flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
