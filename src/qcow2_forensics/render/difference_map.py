"""Where two states differ, as a picture of the guest's disk: what :func:`.allocation_map.draw_map` takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..format.header import SECTOR

_CELLS = 1024  # squares at most

# The classes of colours that the map of the host file has.
_COLOURS = {
    "changed": "residue",
    "written": "active",
    "zeroed": "refcounts",
    "added": "compressed",
    "removed": "leaked",
    "marked": "bitmaps",
    "unreadable": "header",
}


def difference_map(disk_size: int, ranges: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the picture of rising guest ranges: per square, how many of its sectors have which change."""
    sectors = -(-disk_size // SECTOR)
    per_cell = 1
    while per_cell * _CELLS < sectors:
        per_cell *= 2
    number = -(-sectors // per_cell)
    cells: list[dict[str, int]] = [{} for _ in range(number)]
    totals = dict.fromkeys(_COLOURS, 0)
    for item in ranges:
        change = item["change"]
        at, end = item["offset"] // SECTOR, min(-(-(item["offset"] + item["length"]) // SECTOR), sectors)
        totals[change] += max(0, end - at)
        while at < end:
            cell = at // per_cell
            stop = min(end, (cell + 1) * per_cell)
            cells[cell][change] = cells[cell].get(change, 0) + stop - at
            at = stop
    places = {change: place for place, change in enumerate(_COLOURS, 1)}
    shown = []
    for index, cell in enumerate(cells):
        equal = min(per_cell, sectors - index * per_cell) - sum(cell.values())
        shares = [[places[change], count] for change, count in cell.items()]
        shown.append([*shares, [0, equal]] if equal > 0 or not shares else shares)
    return {
        "cluster_size": SECTOR,
        "per_cell": per_cell,
        "owners": [["free", "equal"], *([colour, change] for change, colour in _COLOURS.items())],
        "counts": [sectors - sum(totals.values()), *totals.values()],
        "cells": shown,
        "unit": "sector",
        "of": "guest's disk",
    }
