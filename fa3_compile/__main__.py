"""`python -m fa3_compile env | explain module:factory | cache`."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import fa3_compile
from fa3_compile.errors import Fa3Error


def main(arguments: list[str] | None = None) -> int:
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except Fa3Error as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fa3_compile", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    env = commands.add_parser("env", help="print versions, devices, options and paths")
    env.set_defaults(run=_env)

    explain = commands.add_parser("explain", help="compile a model once and print the report")
    explain.add_argument(
        "factory",
        metavar="MODULE:FUNCTION",
        help="a function without arguments that returns (model, arguments), or "
        "(model, arguments, keyword arguments)",
    )
    shape = explain.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_const", dest="form", const="json")
    shape.add_argument("--markdown", action="store_const", dest="form", const="markdown")
    mode = explain.add_mutually_exclusive_group()
    mode.add_argument("--training", action="store_true", default=None, help="run a backward too")
    mode.add_argument(
        "--inference", action="store_false", dest="training", help="without gradients"
    )
    explain.set_defaults(run=_explain, form="text")

    cache = commands.add_parser("cache", help="print where kernels are cached and how many")
    cache.add_argument("--clear", action="store_true", help="remove them")
    cache.set_defaults(run=_cache)
    return parser


def _env(_: argparse.Namespace) -> int:
    import torch

    from fa3_compile import options, resources
    from fa3_compile.lower import cache

    rows: list[tuple[str, Any]] = [
        ("fa3_compile", fa3_compile.__version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", torch.__version__),
        ("triton", _version_of("triton")),
        ("cuda", torch.version.cuda or "not in this build of torch"),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            rows.append(
                (f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}")
            )
    else:
        rows.append(("device", "no CUDA device"))
    rows += [
        ("kernels", ", ".join(fa3_compile.list_kernels())),
        ("sources", f"{resources.templates()}, {resources.kernels()}"),
        ("cache", cache.root()),
        ("options", options.split()[0]),
        *((name, text) for name, text in os.environ.items() if name.startswith("FA3_")),
    ]
    for name, value in rows:
        print(f"{name:<12} {value}")
    return 0


def _explain(parsed: argparse.Namespace) -> int:
    factory = _load(parsed.factory)
    model, arguments, *keywords = factory()
    report = fa3_compile.explain(
        model, *arguments, training=parsed.training, **(keywords[0] if keywords else {})
    )
    print(getattr(report, parsed.form)())
    return 0


def _cache(parsed: argparse.Namespace) -> int:
    from fa3_compile.lower import cache

    # Only what is an entry is counted and removed: FA3_CACHE_DIR may be a folder with other things.
    entries = [manifest.parent for manifest in cache.root().glob(f"*/*/{cache.MANIFEST}")]
    size = sum(file.stat().st_size for entry in entries for file in entry.iterdir())
    kinds = Counter(entry.parent.name for entry in entries)
    print(f"{cache.root()}: {size / 2**20:.1f} MiB, entries: {len(entries)}")
    for kind, number in sorted(kinds.items()):
        print(f"  {kind:<10} {number}")
    if parsed.clear:
        for entry in entries:
            shutil.rmtree(entry)
        print(f"entries removed: {len(entries)}")
    return 0


def _load(place: str) -> Callable[[], Any]:
    module, _, name = place.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise Fa3Error(
            f"cannot load {place!r}: {error}",
            where="python -m fa3_compile explain",
            todo="name a function as package.module:function, importable from the current folder",
        ) from error


def _version_of(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
