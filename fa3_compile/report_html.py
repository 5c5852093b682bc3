"""`Report.to_html`: the report as one page, without scripts and without anything from elsewhere.

Every text goes through `html.escape`, and the page's own policy forbids scripts and requests: what
a model names its files, lines and tensors cannot become anything but text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

from fa3_compile import __version__
from fa3_compile.report import RegionReport, Report
from fa3_compile.report_tiles import COLOURS, SAID, svg

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8882; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin-bottom: .2rem; }
h2 { font-size: 1.05rem; margin: 0 0 .5rem; }
code { font: 13px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
section { border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin: 1rem 0;
          display: flex; gap: 1.5rem; flex-wrap: wrap; }
section > div { flex: 1 1 26rem; min-width: 0; }
figure { margin: 0; flex: 0 0 auto; }
figcaption { font-size: 12px; max-width: 12rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }
dt { opacity: .65; }
dd { margin: 0; overflow-wrap: anywhere; }
.badge { border-radius: 1em; padding: .1em .7em; font-size: 12px; color: #fff; margin-left: .5em; }
.fused { background: #2c7a34; }
.left { background: #a4442a; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 .8em; }
table { border-collapse: collapse; }
td, th { padding: .2rem .9rem .2rem 0; text-align: left; border-bottom: 1px solid var(--line); }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
summary { cursor: pointer; opacity: .8; }
"""


@dataclass
class _Alike:
    """Regions that differ only in their place."""

    first: RegionReport
    places: list[str] = field(default_factory=list)


def page(report: Report) -> str:
    """The report as a whole HTML document."""
    title = escape(report.summary())
    body = [f"<h1>{title}</h1>", _environment(), _legend(report)]
    body += [_section(group) for group in _grouped(report.regions)]
    for name, lines in (("Graph breaks", report.graph_breaks), ("Notes", report.notes)):
        if lines:
            items = "".join(f"<li>{escape(line)}</li>" for line in lines)
            body.append(f"<h2>{name}</h2><ul>{items}</ul>")
    body.append(_times(report))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _environment() -> str:
    import torch

    device = "no CUDA device"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    said = f"fa3_compile {__version__}, PyTorch {torch.__version__}, {device}"
    return f"<p>{escape(said)}</p>"


def _legend(report: Report) -> str:
    if not any(region.tiles and region.tiles.picture for region in report.regions):
        return ""
    keys = "".join(
        f'<span class="key" style="background:{COLOURS[kind]}"></span>{said}'
        for kind, said in SAID.items()
    )
    return f"<p>Tiles of the score matrix, queries downwards and keys to the right:{keys}</p>"


def _grouped(regions: list[RegionReport]) -> list[_Alike]:
    groups: list[_Alike] = []
    for number, region in enumerate(regions):
        group = next((g for g in groups if region.alike(g.first)), None)
        if group is None:
            groups.append(group := _Alike(region))
        group.places.append(f"{number} (graph {region.graph})")
    return groups


def _section(group: _Alike) -> str:
    region = group.first
    badge = '<span class="badge fused">fused</span>'
    if not region.fused:
        badge = f'<span class="badge left">left as it was by {escape(region.stage)}</span>'
    name = escape(region.form or region.code or "attention")
    plural = "regions" if len(group.places) > 1 else "region"
    rows = [(plural, escape(", ".join(group.places)))]
    rows += [(row, _value(row, text)) for row, text in region.rows() if row != "form"]
    listed = "".join(f"<dt>{escape(row)}</dt><dd>{text}</dd>" for row, text in rows)
    spec = ""
    if region.spec:
        spec = f"<details><summary>spec</summary><code>{escape(region.spec)}</code></details>"
    return (
        f"<section><div><h2>{name}{badge}</h2><dl>{listed}</dl>{spec}</div>{_figure(region)}"
        "</section>"
    )


def _value(row: str, text: str) -> str:
    said = escape(text)
    return f"<code>{said}</code>" if row in ("where", "score", "mask", "weight", "node") else said


def _figure(region: RegionReport) -> str:
    tiles = region.tiles
    if tiles is None or not tiles.picture:
        return ""
    return (
        f"<figure>{svg(tiles)}<figcaption>one square is {tiles.block} x {tiles.block}"
        "</figcaption></figure>"
    )


def _times(report: Report) -> str:
    if not report.milliseconds:
        return ""
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{time:.3f}</td></tr>'
        for name, time in report.milliseconds.items()
    )
    return f"<h2>Median milliseconds of a call</h2><table>{rows}</table>"
