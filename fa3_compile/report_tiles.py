"""Pictures of what a mask leaves of the score matrix: one square a tile, as SVG and as text."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from fa3_compile.report import RegionReport, Tiles

# Of a tile, by its character in Tiles.picture: what it is called, and its colour.
SAID = dict(zip(Tiles.KINDS, ("skipped", "masked", "full")))
COLOURS = dict(zip(Tiles.KINDS, ("#e8e8e8", "#f0a35e", "#3465a4")))
SIDE = 192  # of a picture, in pixels
GAP = 24


def svg(tiles: Tiles) -> str:
    """A self-contained picture, queries downwards and keys to the right; "" where none is known."""
    if not tiles.picture:
        return ""
    rows, columns = len(tiles.picture), len(tiles.picture[0])
    size = SIDE / max(rows, columns)
    paths = []
    for kind, colour in COLOURS.items():
        runs = [
            f"M{x * size:.2f} {y * size:.2f}h{length * size:.2f}v{size:.2f}H{x * size:.2f}z"
            for y, line in enumerate(tiles.picture)
            for x, length in _runs(line, kind)
        ]
        if runs:
            paths.append(f'<path fill="{colour}" d="{"".join(runs)}"/>')
    width, height = columns * size, rows * size
    title = f"{tiles}; one square is {tiles.block} queries (down) by {tiles.block} keys (across)"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.2f} {height:.2f}" role="img" shape-rendering="crispEdges">'
        f"<title>{escape(title)}</title>{''.join(paths)}</svg>"
    )


def _runs(line: str, kind: str) -> Iterable[tuple[int, int]]:
    """(start, length) of each stretch of one character."""
    start = 0
    while (start := line.find(kind, start)) >= 0:
        stop = start
        while stop < len(line) and line[stop] == kind:
            stop += 1
        yield start, stop - start
        start = stop


@dataclass(frozen=True)
class TilePictures:
    """The pictures of a report, one for each mask that is known before it runs.

    `print` shows them as text, a notebook as SVG.
    """

    masks: tuple[tuple[str, Tiles], ...]

    @classmethod
    def of(cls, regions: Iterable[RegionReport]) -> TilePictures:
        """Of the regions whose tiles are known, alike ones once; named by their form."""
        found = {(r.form, r.tiles): None for r in regions if r.tiles and r.tiles.picture}
        return cls(tuple((form, tiles) for form, tiles in found if tiles is not None))

    def __str__(self) -> str:
        blocks = [
            "\n".join([f"{form}: {tiles}, {tiles.block} x {tiles.block} each", *tiles.picture])
            for form, tiles in self.masks
        ]
        return "\n\n".join(blocks) or "no mask is known before it runs"

    def svg(self) -> str:
        """All pictures side by side, in one SVG document."""
        drawn, x = [], 0
        for form, tiles in self.masks:
            drawn.append(
                f'<g transform="translate({x} 0)"><text x="0" y="14">{escape(form)}</text>'
                f'<g transform="translate(0 22)">{svg(tiles)}</g></g>'
            )
            x += SIDE + GAP
        legend = "".join(
            f'<g transform="translate({90 * i} {SIDE + 32})"><rect width="10" height="10" '
            f'fill="{COLOURS[kind]}"/><text x="14" y="9">{said}</text></g>'
            for i, (kind, said) in enumerate(SAID.items())
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(x, 280)}" height="{SIDE + 46}" '
            f'font-family="sans-serif" font-size="12">{"".join(drawn)}{legend}</svg>'
        )

    def _repr_svg_(self) -> str:
        return self.svg()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the SVG."""
        Path(path).write_text(self.svg(), encoding="utf-8")
