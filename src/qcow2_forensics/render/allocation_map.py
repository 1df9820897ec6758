"""A file or a disk as a picture: one square per group of clusters, coloured by who owns them.

Takes the ``map`` entry of a report's details::

    {"cluster_size": 65536, "per_cell": 1, "owners": [["header", "Header"], ...],
     "counts": [1, 12, ...],                       # clusters per owner, in the order of owners
     "cells": [[[owner index, clusters], ...], ...],
     "unit": "cluster", "of": "host file",         # in words; these are the defaults
     "byte_owners": [...], "byte_counts": [...], "byte_cells": [...]}    # the same in bytes, of a deep audit

A square that several owners share is split among them; a share is never thinner than an eighth,
so that one leaked cluster among a thousand stays visible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..text import hexadecimal, markup, size

CELLS_PER_ROW = 64
_SIDE = 14  # user units per square
_GAP = 1
_SMALLEST_SHARE = 1 / 8
_LAST = {"leaked": 1, "residue": 2, "unaccounted": 3, "zeros": 4, "free": 5}  # at the end of the legend
_LEFT = 110  # room for the row's file offset


def colour_class(key: str) -> str:
    """Return the CSS class of an owner; snapshots take turns through eight colours."""
    kind, _, index = key.partition(":")
    if kind == "snapshot":
        return f"o-snap{int(index) % 8}" if index.isdecimal() else "o-snap0"
    return f"o-{kind}" if kind.replace("-", "").isalnum() else "o-other"


def draw_map(data: Mapping[str, Any], links: Mapping[int, str] | None = None) -> str:
    """Return the figure: an SVG of the host file and a legend with numbers.

    ``links`` are the anchors that single cells lead to; every square has the anchor ``c`` and its first cell.
    """
    by_bytes = "byte_cells" in data
    owners = [(str(key), str(label)) for key, label in data["byte_owners" if by_bytes else "owners"]]
    cells = cells_of(data)
    per_cell = int(data["per_cell"])
    step = per_cell * int(data["cluster_size"])
    rows = -(-len(cells) // CELLS_PER_ROW)
    width = _LEFT + CELLS_PER_ROW * _SIDE
    height = max(rows, 1) * _SIDE
    unit, of = data.get("unit", "cluster"), data.get("of", "host file")
    parts = [
        f'<div class="wide"><svg class="map" viewBox="0 0 {width} {height}" role="img" aria-label="Map of the {of}">',
        *_row_labels(rows, step),
        *_squares(cells, owners, step, links or {}, "byte" if by_bytes else unit),
        "</svg></div>",
    ]
    covers = f"one {unit}" if per_cell == 1 else f"{per_cell} {unit}s"
    offsets = "file offsets" if of == "host file" else f"offsets in the {of}"
    caption = f"<p class='quiet'>Each square is {covers} ({size(step)}); rows are labelled with {offsets}.</p>"
    counts, size_of_one = (data["byte_counts"], 1) if by_bytes else (data["counts"], int(data["cluster_size"]))
    return "\n".join(parts) + _legend(owners, counts, size_of_one) + caption


def _row_labels(rows: int, step: int) -> Iterator[str]:
    every = max(rows // 32, 1)
    for row in range(0, rows, every):
        at = hexadecimal(row * CELLS_PER_ROW * step)
        yield f'<text x="{_LEFT - 8}" y="{row * _SIDE + _SIDE - 3}" text-anchor="end">{at}</text>'


def cells_of(data: Mapping[str, Any]) -> Sequence[Sequence[Sequence[int]]]:
    """Return the cells of a picture, in bytes where it has them."""
    cells: Sequence[Sequence[Sequence[int]]] = data.get("byte_cells") or data.get("cells", ())
    return cells


def starts_of_squares(cells: Sequence[Sequence[Sequence[int]]], links: Mapping[int, str]) -> list[int]:
    """Return the first cell of every square.

    Neighbours of one and the same single owner, that lead to the same place, become one: small pages, same picture.
    """
    starts = []
    for index, cell in enumerate(cells):
        same = (
            index % CELLS_PER_ROW
            and len(cell) == len(cells[index - 1]) == 1
            and cell[0][0] == cells[index - 1][0][0]
            and links.get(index) == links.get(index - 1)
        )
        if not same:
            starts.append(index)
    return starts


def _squares(
    cells: Sequence[Sequence[Sequence[int]]],
    owners: list[tuple[str, str]],
    step: int,
    links: Mapping[int, str],
    unit: str,
) -> Iterator[str]:
    starts = starts_of_squares(cells, links)
    for index, stop in zip(starts, [*starts[1:], len(cells)], strict=True):
        x = _LEFT + index % CELLS_PER_ROW * _SIDE
        y = index // CELLS_PER_ROW * _SIDE
        width, length = (stop - index) * _SIDE - _GAP, (stop - index) * step
        shares = _square(cells[index], owners, x, y, width, index * step, length, unit)
        target = links.get(index)
        opening, closing = (f'<a href="#{target}">', "</a>") if target else ("", "")
        yield f'<g id="c{index}">{opening}{"".join(shares)}{closing}</g>'


def _square(
    shares: Sequence[Sequence[int]],
    owners: list[tuple[str, str]],
    x: int,
    y: int,
    width: int,
    offset: int,
    length: int,
    unit: str,
) -> Iterator[str]:
    total = sum(count for _, count in shares) or 1
    weights = [max(count / total, _SMALLEST_SHARE) for _, count in shares]
    scale = (_SIDE - _GAP) / sum(weights)
    top = float(y)
    for (owner, count), weight in zip(shares, weights, strict=True):
        key, label = owners[owner]
        title = f"{label}, {hexadecimal(offset)} + {size(length)}" + (f": {count} {unit}s" if len(shares) > 1 else "")
        yield (
            f'<rect class="{colour_class(key)}" x="{x}" y="{top:.2f}" width="{width}" height="{weight * scale:.2f}">'
            f"<title>{markup(title)}</title></rect>"
        )
        top += weight * scale


def _legend(owners: list[tuple[str, str]], counts: Sequence[int], size_of_one: int) -> str:
    known = [*zip(owners, counts, strict=True)]
    known.sort(key=lambda item: _LAST.get(item[0][0], 0))
    items = [
        f'<li><svg viewBox="0 0 10 10"><rect class="{colour_class(key)}" width="10" height="10"/></svg>'
        f"{markup(label, 80)} <span class='quiet'>{'' if size_of_one == 1 else f'{count} · '}{size(count * size_of_one)}</span></li>"
        for (key, label), count in known
        if count
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'
