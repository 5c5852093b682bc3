"""Tiles of masks that depend on data: counted from the inputs of a graph's first call.

`explain` has real inputs. Of a graph that it compiles, the part that computes the tensors that a
mask reads is kept, and run before the graph's first call; the report then has figures where it
could only say that they depend on data.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fa3_compile import report
from fa3_compile.frontend.dynamo.graph import opaque_target, target_name
from fa3_compile.frontend.dynamo.mutations import is_mutation
from fa3_compile.frontend.dynamo.seeds import PRODUCTS
from fa3_compile.frontend.lift.captured import Captured
from fa3_compile.frontend.region import Region
from fa3_compile.lower.printers.elements import Shape, elements
from fa3_compile.report import RegionReport
from fa3_compile.selection import tiles_of_masks
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.expr import B, H, load

log = logging.getLogger(__name__)

# Most heads of all batch elements whose masks are looked at, and most elements of one.
MOST_HEADS, MOST_ELEMENTS = 32, 1 << 24


@dataclass(frozen=True)
class MaskTensors:
    """One region's mask, and the part of its graph that computes what the mask reads.

    program  the inputs of the graph -> the captured tensors in the order of the spec, None for
             those that the mask does not read
    """

    region: RegionReport
    spec: AttentionSpec
    shape: Shape
    program: fx.GraphModule

    def count(self, inputs: Sequence[Any]) -> None:
        """Writes the tiles for these inputs into the reports that are being collected."""
        with torch.no_grad():
            aux: list[Tensor] = [*self.program(*inputs)]
        symbols = self.spec.mask.free_symbols
        heads = [
            (b, h)
            for b in range(self.shape.batch if B in symbols else 1)
            for h in range(self.shape.heads if H in symbols else 1)
        ][:MOST_HEADS]
        found = [(head, self._values(aux, *head)) for head in heads]
        tiles = tiles_of_masks(self.spec, self.shape.q_len, self.shape.kv_len, found)
        report.update_region(self.region, tiles=tiles)

    def _values(self, aux: list[Tensor], b: int, h: int) -> Callable:
        def values(x):
            device = aux[x.tensor].device
            [found] = elements([x], self.spec, self.shape, None, aux, (), torch.float64, device)
            lengths = self.shape.lengths
            return found.expand(*lengths[:2], *found.shape[-2:])[b, h].double().cpu().numpy()

        return values


_asked: ContextVar[tuple[fx.GraphModule, list[MaskTensors]] | None]
_asked = ContextVar("asked", default=None)


@contextmanager
def asked(gm: fx.GraphModule) -> Iterator[list[MaskTensors]]:
    """Keeps the mask tensors of the regions of `gm` that are rewritten inside the `with` block;
    not those of its checkpoints' bodies, whose inputs are not the graph's."""
    found: list[MaskTensors] = []
    token = _asked.set((gm, found))
    try:
        yield found
    finally:
        _asked.reset(token)


def keep(gm: fx.GraphModule, region: Region, entry: RegionReport) -> None:
    """Keeps what the mask of a rewritten region reads, if anyone asked and it can be kept."""
    asked_of, found = _asked.get() or (None, [])
    if asked_of is not gm or not region.spec.mask.has(load) or region.sizes:
        return
    layout = region.layout
    sizes = (layout.batch, [*layout.kv_heads, *layout.group], layout.query)
    lengths = [*map(layout.total, sizes), region.key_length]
    if not all(x.is_Integer for x in lengths) or lengths[2] * lengths[3] > MOST_ELEMENTS:
        return
    read = {x.tensor for x in region.spec.mask.atoms(load)}
    wanted = [
        x.source if i in read and isinstance(x, Captured) else None
        for i, x in enumerate(region.loads)
    ]
    if (program := _program(gm, wanted)) is not None:
        found.append(MaskTensors(entry, region.spec, Shape(*map(int, lengths)), program))


def _program(gm: fx.GraphModule, wanted: Sequence[fx.Node | None]) -> fx.GraphModule | None:
    """The part of the graph that leads to some nodes; None where it writes, draws or is dear."""
    needed: set[fx.Node] = set()
    stack = [x for x in wanted if x is not None]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        dear = opaque_target(node) or target_name(node) in PRODUCTS
        if node.op == "call_module" or is_mutation(node) or dear:
            return None
        stack += node.all_input_nodes
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([None if x is None else copies[x] for x in wanted])
    return fx.GraphModule(gm, graph)


def counting(compiled: Callable[..., Any], kept: list[MaskTensors]) -> Callable[..., Any]:
    """The compiled graph, which counts tiles before its first call."""
    if not kept:
        return compiled
    waiting = [*kept]

    def run(*inputs: Any) -> Any:
        while waiting:
            mask = waiting.pop()
            try:
                mask.count(inputs)
            except Exception:
                log.debug("tiles of %s are not counted", mask.region.spec, exc_info=True)
        return compiled(*inputs)

    return run
