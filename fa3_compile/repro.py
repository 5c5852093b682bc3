"""`python -m fa3_compile repro`: one attention region cut out of a model, as a script.

The script holds the operations that lead to the region, from the last projection, norm or input
before it; parameters and activations are replaced by random tensors of the same shape, strides
and dtype. It prints the report and compares with eager.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fa3_compile import __version__, pipeline
from fa3_compile.backend import rewritten
from fa3_compile.errors import Fa3Error
from fa3_compile.explaining import explain_with
from fa3_compile.frontend.detect import skeletons
from fa3_compile.frontend.dynamo.graph import example_value, opaque_target, storage_of
from fa3_compile.frontend.dynamo.mutations import is_mutation, mutated_nodes
from fa3_compile.lower.choose import TYPICAL_LENGTH
from fa3_compile.report import RegionReport, Report

WHERE = "python -m fa3_compile repro"
UNSEEN = "its scores are made, or V is weighed, by a call that is not looked into"


@dataclass(frozen=True)
class Repro:
    """A script, the region of the model that it is of, and whether it says the same of it."""

    script: str
    region: RegionReport
    faithful: bool


def repro(
    model_or_fn: nn.Module | Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    region: int | None = None,
    training: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> Repro:
    """The script of a region: number `region` of the report, or the first that is not fused.

    Raises Fa3Error where there is no such region, or where it cannot be written as a script.
    """
    cuts: list[str | Fa3Error] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], **settings: Any) -> Any:
        sources, outputs = _sources(gm), []
        made = rewritten(gm, example_inputs, outputs=outputs, **settings)
        cuts.extend(sources[x] if x is not None else _unwritten(UNSEEN) for x in outputs)
        return made

    report = explain_with(backend, model_or_fn, args, kwargs or {}, options, training)
    number = _chosen(report, region)
    cut = cuts[number]
    if isinstance(cut, Fa3Error):
        raise cut
    script = _script(cut, report.regions[number], training, options)
    return Repro(script, report.regions[number], _says_the_same(script, report.regions[number]))


def _chosen(report: Report, wanted: int | None) -> int:
    if wanted is None:
        left = (i for i, region in enumerate(report.regions) if not region.fused)
        wanted = next(left, None)
        if wanted is None:
            raise Fa3Error(
                f"nothing was left as it was: {report.summary()}",
                where=WHERE,
                todo="name a fused region with --region NUMBER"
                if report.regions
                else "; ".join(report.notes),
            )
    if not 0 <= wanted < len(report.regions):
        raise Fa3Error(
            f"there is no region {wanted}: {report.summary()}",
            where=WHERE,
            todo="python -m fa3_compile explain numbers them",
        )
    return wanted


def _sources(gm: fx.GraphModule) -> dict[fx.Node, str | Fa3Error]:
    """The source of the function that computes each output that attention may have."""
    found: dict[fx.Node, str | Fa3Error] = {}
    for module in pipeline.graphs(gm):
        pipeline.expand(module)
        shadow = pipeline.traced(module)
        for skeleton in skeletons.skeletons(shadow) if shadow is not None else ():
            try:
                found[skeleton.output] = _function(module.graph, skeleton.output)
            except Fa3Error as error:
                found[skeleton.output] = error
    return found


def _unwritten(why: str) -> Fa3Error:
    return Fa3Error(
        f"the region cannot be written as a script: {why}",
        where=WHERE,
        todo="report it with the text of python -m fa3_compile explain instead",
    )


def _function(graph: fx.Graph, output: fx.Node) -> str:
    """`def attention(...)` and `def inputs()`, of what leads to the output and is made on the
    way there and used elsewhere."""
    inside = _inside(graph, output)
    new, copies, made = fx.Graph(), {}, []
    for node in graph.nodes:
        if node in inside:
            for argument in node.all_input_nodes:
                if argument not in copies:
                    value = example_value(argument)
                    if not isinstance(value, (Tensor, int, float, torch.SymInt)):
                        raise _unwritten(f"{argument} is a {type(value).__name__}")
                    copies[argument] = new.placeholder(argument.name)
                    made.append(_value(value))
            copies[node] = new.node_copy(node, lambda x: copies[x])
    leaving = [n for n in inside if n is not output and any(u not in inside for u in n.users)]
    returned = [output, *(n for n in leaving if isinstance(example_value(n), Tensor))]
    # Placeholders were made where they are first used; a function has them at its head.
    for node in reversed([n for n in new.nodes if n.op == "placeholder"]):
        new._root.append(node)
    new.output(tuple(copies[n] for n in returned))
    code = new.python_code("self")
    source = re.sub(r"def forward\(self,? ?", "def attention(", code.src, count=1)
    source = re.sub(r";  (?:\w+ = )+None.*$", "", source, flags=re.MULTILINE).strip()
    used = {n: x for n, x in code.globals.items() if re.search(rf"\b{n}\b", source)}
    imports = "\n".join(sorted({"import torch", *(_import(n, x) for n, x in used.items())}))
    body = "\n".join(f"        {line}," for line in made)
    return f"{imports}\n\n{source}\n\ndef inputs():\n    return (\n{body}\n    )\n"


def _inside(graph: fx.Graph, output: fx.Node) -> dict[fx.Node, None]:
    """The nodes between the region's inputs and its output, writes to them included."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    inside: set[fx.Node] = set()
    stack = [output]
    while stack:
        while stack:
            node = stack.pop()
            if node in inside or node.op in ("placeholder", "get_attr") or opaque_target(node):
                continue
            inside.add(node)
            stack += node.all_input_nodes
        read = inside.union(*(node.all_input_nodes for node in inside))
        memory = {storage_of(node) for node in read} - {None}
        stack += [
            node
            for node in graph.nodes
            if node not in inside
            and order[node] < order[output]
            and is_mutation(node)
            and any(storage_of(n) in memory for n in mutated_nodes(node))
        ]
    return {node: None for node in graph.nodes if node in inside}


def _value(value: Any) -> str:
    """An argument as an expression; sizes are those that the model was called with."""
    if not isinstance(value, Tensor):
        return f"{_number(value)!r}"
    shape, stride = tuple(map(_number, value.shape)), tuple(map(_number, value.stride()))
    flags = ", requires_grad=True" if value.requires_grad else ""
    return f"tensor({shape}, {stride}, {value.dtype}, {str(value.device)!r}{flags})"


def _number(value: Any) -> int | float:
    if not isinstance(value, torch.SymInt):
        return value
    return TYPICAL_LENGTH if value.node.hint is None else int(value.node.hint)


def _import(name: str, value: Any) -> str:
    if isinstance(value, types.ModuleType):
        return f"import {value.__name__} as {name}" if value.__name__ != name else f"import {name}"
    if isinstance(value, float):
        return f"from math import {name}"
    return f"from {value.__module__} import {value.__qualname__} as {name}"


def _script(cut: str, region: RegionReport, training: bool | None, options) -> str:
    # What the model's author wrote is shown by repr: it cannot end the string it stands in.
    said = "\n".join(f"#   {line}" for line in _lines(region))
    settings = f"training={training!r}, options={dict(options or {})!r}"
    return f"""# An attention region as fa3_compile {__version__} met it:
{said}
# Run this file: it prints the report and compares outputs and gradients with eager's.

import fa3_compile
from fa3_compile.repro import tensor
from fa3_compile.testing import assert_matches_eager

{cut}

SETTINGS = dict({settings})

if __name__ == "__main__":
    print(fa3_compile.explain(attention, *inputs(), **SETTINGS))
    SETTINGS["training"] = bool(SETTINGS["training"])
    assert_matches_eager(attention, *inputs(), **SETTINGS)
    print("as near to float64 as eager")
"""


def _lines(region: RegionReport) -> list[str]:
    lines = [region.line(), *(f"{name}: {text}" for name, text in region.rows())]
    return [ascii(line)[1:-1] for line in lines]


def _says_the_same(script: str, region: RegionReport) -> bool:
    module = types.ModuleType("fa3_compile_repro")
    # Dynamo of torch 2.11 imports a function's module by its name to read its globals.
    sys.modules[module.__name__] = module
    try:
        exec(compile(script, "repro.py", "exec"), module.__dict__)
        settings = module.SETTINGS
        report = explain_with(
            rewritten, module.attention, module.inputs(), {}, settings["options"],
            settings["training"],
        )  # fmt: skip
    finally:
        del sys.modules[module.__name__]
    return any((r.fused, r.code) == (region.fused, region.code) for r in report.regions)


def tensor(
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    device: str,
    requires_grad: bool = False,
) -> Tensor:
    """A stand-in: random numbers, zeros of an integer type, True of bool; with these strides.

    On the CPU where there is no such device.
    """
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        place = torch.device("cpu")
    # An expanded dimension holds one element.
    held = [1 if step == 0 and size > 1 else size for size, step in zip(shape, stride)]
    made = torch.empty_strided(held, list(stride), dtype=dtype, device=place)
    if dtype.is_floating_point or dtype.is_complex:
        made.normal_()
    else:
        made.fill_(dtype == torch.bool)
    return made.expand(list(shape)).requires_grad_(requires_grad)
