"""Reads what nothing accounts for and says which of it is zeros; holes of the file are not read."""

from __future__ import annotations

import numpy as np

from ..census.arrays import I64, Mask, distinct, stretches
from ..format.source import Source
from ..limits import KiB, MiB
from ..reader.host_holes import host_runs
from .tiling import Tile

BLOCK = 4 * KiB  # zeros and other bytes of a remainder are separated by blocks of the file
_READ = 1 * MiB  # bytes read at once
_GAP = 64 * KiB  # bytes between two remainders that are read over


def looked_at(source: Source, rows: Tile, remainder: Mask) -> Tile:
    """Return the rows with remainders cut where zeros end or begin, and their bytes that are not zero counted."""
    places = np.flatnonzero(remainder)
    if not len(places):
        return rows
    starts, stops, counts = _counted(source, rows.start[places], rows.stop[places])
    bounds = distinct(np.concatenate((rows.start, starts, stops)))
    bounds = bounds[bounds < int(rows.stop[-1])]
    at = np.searchsorted(rows.start, bounds, side="right") - 1
    piece = np.searchsorted(starts, bounds, side="right") - 1
    known = remainder[at]
    nonzero = np.where(known, 0, -1)
    inside = known & (piece >= 0)
    inside[inside] &= bounds[inside] < stops[piece[inside]]
    nonzero[inside] = counts[piece[inside]]
    return Tile(bounds, np.append(bounds[1:], rows.stop[-1]), rows.label[at], rows.claims[at], nonzero)


def _counted(source: Source, starts: I64, stops: I64) -> tuple[I64, I64, I64]:
    """Return the pieces of ranges that are not all zeros, and how many of their bytes are not."""
    found: list[I64] = []
    for first, last in stretches(len(starts), starts[1:] - stops[:-1] > _GAP):
        begin, end = int(starts[first]), int(stops[last - 1])
        for run in host_runs(source, begin, end - begin):
            if run.is_hole:
                continue
            for at in range(run.offset, run.offset + run.length, _READ):
                size = min(_READ, run.offset + run.length - at)
                low = first + int(np.searchsorted(stops[first:last], at, side="right"))
                high = first + int(np.searchsorted(starts[first:last], at + size, side="left"))
                if low < high:
                    found.append(_pieces(source, at, size, starts[low:high], stops[low:high]))
    rows = np.concatenate([*found, np.empty((0, 3), np.int64)])
    return rows[:, 0], rows[:, 1], rows[:, 2]


def _pieces(source: Source, at: int, size: int, starts: I64, stops: I64) -> I64:
    """Return the pieces that are not zeros of the ranges in one stretch of the file: rows (start, stop, bytes)."""
    first, last = max(at, int(starts[0])), min(at + size, int(stops[-1]))
    data = np.frombuffer(source.read(first, last - first), np.uint8)
    if not data.any():
        return np.empty((0, 3), np.int64)
    starts, stops = np.maximum(starts, first), np.minimum(stops, last)
    blocks = np.arange(-(-first // BLOCK) * BLOCK, last, BLOCK)
    bounds = distinct(np.concatenate((starts, stops, blocks)))
    which = np.searchsorted(starts, bounds[:-1], side="right") - 1
    inside = (which >= 0) & (bounds[:-1] < stops[which])
    counts = np.add.reduceat((data != 0).astype(np.int64), bounds[:-1] - first)
    kept = inside & (counts != 0)
    rows: I64 = np.column_stack((bounds[:-1], bounds[1:], counts))[kept]
    return rows
