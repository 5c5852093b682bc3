"""What became of each attention region: the record, its renderings, and its collection.

The pipeline calls `record` for every region it meets, fused or declined. Each call writes one log
line (`TORCH_LOGS="+fa3_compile"`), and adds to the reports that are being collected:

    with collect() as report:
        torch.compile(model, backend="fa3")(x)
    print(report)
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch._guards import CompileContext

from fa3_compile import source
from fa3_compile.errors import Decline

if TYPE_CHECKING:
    from fa3_compile.report_tiles import TilePictures

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tiles:
    """How many tiles of a score matrix are skipped, run with the mask, and run without it.

    The counts are those of one batch element and head, or None where they cannot be known before
    the kernel runs; then `reason` says why. Counted from data, they are those of all batch elements
    and heads whose masks differ, and `reason` says so.

    `picture` has a character of KINDS (skipped, masked, full) for each tile of `block` queries by
    `block` keys, a string for each row of tiles.
    """

    KINDS: ClassVar[str] = ".+#"

    empty: int | None = None
    partial: int | None = None
    full: int | None = None
    reason: str = ""
    block: int = 0
    picture: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.empty is None or self.partial is None or self.full is None:
            return self.reason
        total = self.empty + self.partial + self.full
        said = f"{self.empty} skipped, {self.partial} masked, {self.full} full, of {total}"
        return f"{said} ({self.reason})" if self.reason else said


@dataclass(frozen=True)
class RegionReport:
    """One attention region. Texts that do not apply are "".

    index          its number among the regions of its graph, from 0
    graph          Dynamo's compile id of its graph, as in its logs: "0/0"
    fused          whether it became one fa3::attention
    where          file, line and source of the user's code
    form           the named form: "causal + softcap"; "custom" where nothing has a name
    score, mask    formulas of an element, in s (the dot product), b, h, q, kv
    weight         formula of a factor on the weights after the softmax, such as dropout
    tiles          what the mask lets the kernel skip
    kernel         the kernel family that runs it
    config         its tile config
    kernel_source  the file with its generated source, where that is known before it runs
    gradients      the kernel family that computes its gradients; "" where none is asked for
    gradients_source
                   as kernel_source, of the gradients
    other_kernels  why each other family was not taken
    stage, code, reason, hint, node, node_where
                   for a region left alone: who declined it, as an identifier and as a sentence,
                   what to change, the graph node it was decided at, and that node's line of the
                   user's code where it is another one
    spec           the canonical text of the attention, which names it in every process
    """

    index: int
    graph: str
    fused: bool
    where: str = ""
    form: str = ""
    score: str = ""
    mask: str = ""
    weight: str = ""
    tiles: Tiles | None = None
    kernel: str = ""
    config: str = ""
    kernel_source: str = ""
    gradients: str = ""
    gradients_source: str = ""
    other_kernels: dict[str, str] = field(default_factory=dict)
    stage: str = ""
    code: str = ""
    reason: str = ""
    hint: str = ""
    node: str = ""
    node_where: str = ""
    spec: str = ""

    @classmethod
    def declined(cls, index: int, graph: str, decline: Decline, **known: Any) -> RegionReport:
        """The record of a region that a stage declined; `known` is what is known of it."""
        at = source.where(decline.node) if decline.node is not None else ""
        return cls(
            index=index,
            graph=graph,
            fused=False,
            stage=decline.stage,
            code=decline.code,
            reason=decline.message,
            hint=decline.hint,
            node=str(decline.node) if decline.node is not None else "",
            node_where=at if at != known.get("where") else "",
            **known,
        )

    def line(self) -> str:
        """The region in one line, for the log."""
        if self.fused:
            said = f"fused as {self.form}" + (f" by {self.kernel}" if self.kernel else "")
        else:
            said = f"left as it was by {self.stage} ({self.code}): {self.reason}"
        return f"region {self.index} of graph {self.graph}: {said}" + (
            f"; {self.where}" if self.where else ""
        )

    def rows(self) -> list[tuple[str, str]]:
        """What there is to say of it, as (name, text)."""
        others = [f"not {name}: {why}" for name, why in self.other_kernels.items()]
        rows = [
            ("where", self.where),
            ("form", self.form),
            ("score", self.score),
            ("mask", self.mask),
            ("weight", self.weight),
            ("tiles", str(self.tiles) if self.tiles else ""),
            ("kernel", f"{self.kernel} {self.config}".strip()),
            *(("", other) for other in others),
            ("source", self.kernel_source),
            ("grads", self.gradients),
            ("source", self.gradients_source),
            ("reason", f"{self.reason} [{self.code}]" if self.code else self.reason),
            ("node", " at ".join(x for x in (self.node, self.node_where) if x)),
            ("hint", self.hint),
        ]
        return [(name, text) for name, text in rows if text]

    def alike(self, other: RegionReport) -> bool:
        """Whether it differs from `other` by nothing but its place in the graph."""
        here = dataclasses.replace(self, index=other.index, graph=other.graph, node=other.node)
        return here == other


@dataclass
class Report:
    """What `backend="fa3"` did with a model.

    regions          every attention region, in the order in which they were met
    graphs           how many graphs Dynamo made
    graph_breaks     why there is more than one
    notes            what else is worth knowing
    compile_seconds  wall-clock seconds of the first call, compilation included; None if unknown
    milliseconds     median time of a call, by how it was run; filled by `python -m fa3_compile
                     bench`
    """

    regions: list[RegionReport] = field(default_factory=list)
    graphs: int = 0
    graph_breaks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    compile_seconds: float | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)

    @property
    def fused(self) -> list[RegionReport]:
        """The regions that became a fused attention."""
        return [region for region in self.regions if region.fused]

    def __str__(self) -> str:
        return self.text()

    def kernels(self) -> str:
        """What runs the regions, each said once: "cuda_sm90, gradients reference", or the code
        of a decline."""
        said = [
            ", gradients ".join(x for x in (region.kernel, region.gradients) if x)
            if region.fused
            else f"declined: {region.code}"
            for region in self.regions
        ]
        return "; ".join(dict.fromkeys(said))

    def summary(self) -> str:
        """The whole in one line."""
        said = [
            f"{len(self.fused)} of {_counted(len(self.regions), 'attention region')} fused",
            _counted(self.graphs, "graph"),
            _counted(len(self.graph_breaks), "graph break"),
        ]
        if self.compile_seconds is not None:
            said.append(f"first call {self.compile_seconds:.1f} s")
        return "fa3_compile: " + ", ".join(said)

    def text(self) -> str:
        """One block a region; regions like an earlier one are said to be, a run of them at once."""
        blocks = [self.summary()]
        for twin, run in itertools.groupby(range(len(self.regions)), self._twin):
            indices = list(run)
            if twin in indices:
                indices.remove(twin)
                rows = [f"  {name:<7} {text}" for name, text in self.regions[twin].rows()]
                blocks.append("\n".join([self._heads([twin]), *rows]))
            if indices:
                blocks.append(f"{self._heads(indices)}, like region {twin}")
        for title, lines in (("graph break", self.graph_breaks), ("note", self.notes)):
            blocks.extend(f"{title}: {line}" for line in lines)
        return "\n\n".join(blocks)

    def _twin(self, index: int) -> int:
        """The first region that this one is like: itself, if there is no earlier one."""
        region = self.regions[index]
        return next(i for i, other in enumerate(self.regions) if other.alike(region))

    def _heads(self, indices: list[int]) -> str:
        """What became of regions that are alike, in a line."""
        region = self.regions[indices[0]]
        verdict = "fused" if region.fused else f"left as it was by {region.stage}"
        graphs = {self.regions[i].graph for i in indices}
        which = f"graph {region.graph}" if len(graphs) == 1 else f"{len(graphs)} graphs"
        many = f"regions {indices[0]} to {indices[-1]}"
        return f"{many if len(indices) > 1 else f'region {indices[0]}'} ({which}): {verdict}"

    def json(self) -> str:
        """All fields, as a JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)

    def markdown(self) -> str:
        """A table, one row a region, for an issue or a pull request."""
        titles = ("region", "fused", "form", "score", "mask", "tiles", "kernel or reason", "where")
        lines = [self.summary(), "", _table_row(titles), _table_row(["---"] * len(titles))]
        for i, region in enumerate(self.regions):
            became = f"{region.kernel} {region.config}".strip()
            if not region.fused:
                became = ". ".join(said for said in (region.reason, region.hint) if said)
            cells = (
                f"{region.graph} #{i}",
                "yes" if region.fused else "no",
                region.form,
                _code(region.score),
                _code(region.mask),
                str(region.tiles or ""),
                became,
                _code(region.where),
            )
            lines.append(_table_row(cells))
        lines.extend(f"\nGraph break: {line}" for line in self.graph_breaks)
        lines.extend(f"\nNote: {line}" for line in self.notes)
        return "\n".join(lines)

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        return self.markdown()

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """One page, without scripts and without anything from elsewhere; also written to `path`."""
        from fa3_compile.report_html import page

        text = page(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def plot_tiles(self) -> TilePictures:
        """What each mask lets the kernel skip: `print` it, `.save("tiles.svg")`, or show it in a
        notebook."""
        from fa3_compile.report_tiles import TilePictures

        return TilePictures.of(self.regions)


@contextmanager
def collect() -> Iterator[Report]:
    """Collect a report of every region that is compiled inside the `with` block.

        with fa3_compile.collect() as report:
            compiled(x)
        print(report)

    Blocks may be nested, and several threads may each have their own. What a thread without a
    block compiles, such as autograd's backward threads, goes to all.
    """
    report = Report()
    entry = (threading.get_ident(), report)
    with _lock:
        _open.append(entry)
    try:
        yield report
    finally:
        with _lock:
            _open[:] = [other for other in _open if other is not entry]


def enter_graph() -> str:
    """Count the graph being compiled; returns Dynamo's id of it, for `RegionReport.graph`."""
    compile_id = CompileContext.current_compile_id()
    for report in _reports():
        report.graphs += 1
    return str(compile_id) if compile_id is not None else "0/0"


def leave_graph(graph: str) -> None:
    """Take back what was reported of a graph that Dynamo will compile anew."""
    for report in _reports():
        report.graphs -= 1
        report.regions[:] = [region for region in report.regions if region.graph != graph]


def record(region: RegionReport) -> None:
    """Log what became of a region, and add it to the reports being collected."""
    log.info("%s", region.line())
    for report in _reports():
        report.regions.append(region)


def update(spec: str, **changes: Any) -> None:
    """Change fields of the recorded regions that have this spec text.

    For what is known only when the graph is lowered: the kernel, its config, a failed build.
    """
    for report in _reports():
        report.regions[:] = [
            dataclasses.replace(region, **changes) if region.spec == spec else region
            for region in report.regions
        ]


def update_region(region: RegionReport, **changes: Any) -> None:
    """Change fields of one recorded region."""
    place = (region.graph, region.index, region.spec)
    for report in _reports():
        report.regions[:] = [
            dataclasses.replace(x, **changes) if (x.graph, x.index, x.spec) == place else x
            for x in report.regions
        ]


def is_collected() -> bool:
    """Whether there is a report that hears what is said now."""
    return bool(_reports())


def note(text: str) -> None:
    """Log a remark that belongs to no region, and add it to the reports being collected."""
    log.info("%s", text)
    for report in _reports():
        if text not in report.notes:
            report.notes.append(text)


_lock = threading.Lock()
_open: list[tuple[int, Report]] = []


def _reports() -> list[Report]:
    with _lock:
        mine = [report for thread, report in _open if thread == threading.get_ident()]
        return mine or [report for _, report in _open]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _table_row(cells: Any) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
