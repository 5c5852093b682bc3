"""`python -m fa3_compile env | explain | bench | repro | cache`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import fa3_compile
from fa3_compile.errors import Fa3Error

DESCRIPTION = "What torch.compile(model, backend='fa3') makes of the attention in a model."


def main(arguments: list[str] | None = None) -> int:
    parsed = _parser().parse_args(arguments)
    try:
        status = parsed.run(parsed)
        sys.stdout.flush()
        return status
    except Fa3Error as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Who reads it, `head` or a pager, has seen enough. Python flushes once more as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fa3_compile", description=DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    env = commands.add_parser("env", help="print versions, devices, options and paths")
    env.set_defaults(run=_env)

    explain = commands.add_parser("explain", help="compile a model once and print the report")
    _add_model(explain)
    shape = explain.add_mutually_exclusive_group()
    shape.add_argument(
        "--json", action="store_const", dest="form", const="json", help="print it as JSON"
    )
    shape.add_argument(
        "--markdown", action="store_const", dest="form", const="markdown", help="or as Markdown"
    )
    explain.set_defaults(run=_explain, form="text")

    bench = commands.add_parser(
        "bench", help="time a model in eager mode, through Inductor, and through fa3"
    )
    _add_model(bench)
    for command in (explain, bench):
        command.add_argument(
            "--html", type=_new_file, metavar="FILE", help="also write the report as a page"
        )
    bench.set_defaults(run=_bench)

    repro = commands.add_parser(
        "repro", help="write one attention of a model as a script, for a bug report"
    )
    _add_model(repro)
    repro.add_argument(
        "--region",
        type=int,
        metavar="NUMBER",
        help="as explain numbers them; default: the first that is not fused",
    )
    repro.add_argument(
        "--out", default="repro.py", type=_new_file, metavar="FILE", help="default: repro.py"
    )
    repro.set_defaults(run=_repro)

    cache = commands.add_parser("cache", help="print where kernels are cached and how many")
    cache.add_argument("--clear", action="store_true", help="remove them")
    cache.set_defaults(run=_cache)
    return parser


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "factory",
        metavar="MODULE:FUNCTION",
        help="a function without arguments that returns (model, arguments), or "
        "(model, arguments, keyword arguments); MODULE may be a file, model.py",
    )
    mode = command.add_mutually_exclusive_group()
    mode.add_argument("--training", action="store_true", default=None, help="run a backward too")
    mode.add_argument(
        "--inference", action="store_false", dest="training", help="without gradients"
    )


def _env(_: argparse.Namespace) -> int:
    import torch

    from fa3_compile import options, resources
    from fa3_compile.lower.binaries import cache

    rows: list[tuple[str, Any]] = [
        ("fa3_compile", fa3_compile.__version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", torch.__version__),
        ("triton", _version_of("triton")),
        ("cuda", torch.version.cuda or "not in this build of torch"),
    ]
    if torch.cuda.is_available():
        rows.append(("driver", _driver()))
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
    model, arguments, keywords = _made(parsed.factory)
    report = fa3_compile.explain(model, *arguments, training=parsed.training, kwargs=keywords)
    if parsed.html:
        report.to_html(parsed.html)
    print(getattr(report, parsed.form)())
    return 0


def _bench(parsed: argparse.Namespace) -> int:
    from fa3_compile.bench import bench, table

    model, arguments, keywords = _made(parsed.factory)
    report, results = bench(model, arguments, keywords, training=parsed.training)
    if parsed.html:
        report.to_html(parsed.html)
    print(f"{report}\n\n{table(results)}")
    return 0


def _repro(parsed: argparse.Namespace) -> int:
    from fa3_compile.repro import repro

    model, arguments, keywords = _made(parsed.factory)
    made = repro(model, arguments, keywords, region=parsed.region, training=parsed.training)
    with open(parsed.out, "w", encoding="utf-8") as file:
        file.write(made.script)
    print(made.region.line())
    print(f"written to {parsed.out}; run it with: python {parsed.out}")
    if not made.faithful:
        print("On its own the region is taken otherwise than in the model: say so in the report.")
    return 0


def _cache(parsed: argparse.Namespace) -> int:
    from fa3_compile.lower.binaries import cache

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


def _made(place: str) -> tuple[Any, Sequence[Any], Mapping[str, Any]]:
    from fa3_compile import options

    options.split()  # a wrong variable is said now, not from within torch.compile
    factory = _load(place)
    try:
        inspect.signature(factory).bind()
    except (TypeError, ValueError) as error:
        raise _wrong_factory(f"{place} cannot be called without arguments: {error}") from error
    made = factory()
    if not isinstance(made, (tuple, list)) or len(made) not in (2, 3):
        raise _wrong_factory(f"{place} returned {_kind(made)}, not (model, arguments)")
    model, arguments, *keywords = made
    if not callable(model):
        raise _wrong_factory(f"{place} returned {_kind(model)} in the place of a model")
    if not isinstance(arguments, (tuple, list)):
        raise _wrong_factory(f"{place} returned {_kind(arguments)} in the place of the arguments")
    if not all(isinstance(x, Mapping) for x in keywords):
        raise _wrong_factory(f"{place} returned {_kind(*keywords)} in the place of the keywords")
    return model, arguments, keywords[0] if keywords else {}


def _wrong_factory(message: str) -> Fa3Error:
    return Fa3Error(
        message,
        where="python -m fa3_compile",
        todo="return (model, (x, y)), or (model, (x, y), {'name': z}); a single argument is (x,)",
    )


def _kind(value: Any) -> str:
    length = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return f"{type(value).__name__}{length}"


def _new_file(text: str) -> str:
    """A path that can be written to, asked before a model is compiled for minutes."""
    folder = Path(text).resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {folder} is no folder for it")
    return text


def _load(place: str) -> Callable[[], Any]:
    module, _, name = place.partition(":")
    file = Path(module)
    try:
        if not name:
            raise ValueError("no function is named")
        return getattr(_file(file) if file.suffix == ".py" else _module(module), name)
    except (ImportError, OSError, AttributeError, ValueError) as error:
        raise Fa3Error(
            f"cannot load {place!r}: {error}",
            where="python -m fa3_compile",
            todo="name a function as package.module:function, importable from the current folder, "
            "or as path/to/file.py:function",
        ) from error


def _module(name: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)


def _file(path: Path) -> ModuleType:
    """The file itself, whatever else has a module of its name; its neighbours can be imported."""
    sys.path.insert(0, str(path.parent.resolve()))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where pickle and dataclasses look for it
    spec.loader.exec_module(module)
    return module


def _driver() -> str:
    """The newest CUDA that the driver can run, such as 13.0."""
    from fa3_compile.lower.launch.launch_cuda import checked, driver

    try:
        version = checked(driver().cuDriverGetVersion())
    except (ImportError, RuntimeError) as error:
        return f"unknown: {error}"
    return f"CUDA {version // 1000}.{version % 1000 // 10}"


def _version_of(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
