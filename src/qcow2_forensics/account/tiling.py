"""Byte ranges as arrays, and how claims on a file are made to tile it.

::

    claims   |header|   |L1......|      |data.......|
    places   [ header cluster    ][ free ][ cluster   ]
    tile     |header|hs|L1......|ls|fr  ..|data.....|
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..census.arrays import I64, U64, Mask, Places, distinct, run_starts, weighted_segments

_END = 1 << 62  # offsets beyond are past the end of every file


class Tile(NamedTuple):
    """Rising runs [start, stop) without gaps: what each is (a label's number), and how many claims cover it.

    ``nonzero`` counts the bytes that are not zero in remainders that were read; -1 elsewhere.
    """

    start: I64
    stop: I64
    label: I64
    claims: I64
    nonzero: I64


class LabelledRanges:
    """Gathers ranges [start, stop), each with a label."""

    def __init__(self) -> None:
        self._parts: list[I64] = []
        self._single: list[tuple[int, int, int]] = []

    def add(self, label: int, start: int, stop: int) -> None:
        """Take in one range; an empty one is none."""
        if start < stop and start < _END:
            self._single.append((start, min(stop, _END), label))

    def add_many(self, label: int, starts: U64 | I64, stops: U64 | I64) -> None:
        """Take in ranges as arrays; empty ones are none."""
        if len(starts) < 2:
            for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
                self.add(label, start, stop)
            return
        rows = np.empty((len(starts), 3), np.int64)
        rows[:, 0], rows[:, 1], rows[:, 2] = _signed(starts), _signed(stops), label
        self._parts.append(rows[rows[:, 1] > rows[:, 0]])

    def rows(self, end: int) -> I64:
        """Return all of them by rising start, of equals the label met first, cut at ``end``: ``(ranges, 3)``."""
        rows = np.concatenate([*self._parts, np.asarray(self._single, np.int64).reshape(-1, 3)])
        rows = rows[rows[:, 0] < end]
        rows = rows[np.lexsort((rows[:, 2], rows[:, 0]))]
        rows[:, 1] = np.minimum(rows[:, 1], end)
        return rows


def _signed(offsets: U64 | I64) -> I64:
    return np.minimum(offsets, np.uint64(_END) if offsets.dtype == np.uint64 else np.int64(_END)).astype(np.int64)


class Windowed:
    """Hands out rising rows window by window, cut to each."""

    def __init__(self, rows: I64) -> None:
        self._rows = rows
        self._at = 0
        self._open = rows[:0]

    def part(self, start: int, stop: int) -> I64:
        """Return what lies in the next window."""
        last = int(self._rows[:, 0].searchsorted(stop))
        rows = np.concatenate((self._open, self._rows[self._at : last]))
        self._at = last
        self._open = rows[rows[:, 1] > stop]
        cut = rows.copy()
        cut[:, 0] = np.maximum(cut[:, 0], start)
        cut[:, 1] = np.minimum(cut[:, 1], stop)
        kept: I64 = cut[cut[:, 1] > cut[:, 0]]
        return kept


def runs_of(values: npt.NDArray[np.unsignedinteger], start: int, unit: int) -> tuple[I64, I64, I64]:
    """Return starts, stops and values of the runs of equal values, each of ``unit`` bytes, from ``start`` on."""
    firsts = run_starts(values)
    stops = np.append(firsts[1:], len(values))
    return start + firsts * unit, start + stops * unit, values[firsts].astype(np.int64)


def tile(start: int, stop: int, claims: I64, hints: I64, places: I64) -> Tile:
    """Return what each byte of a window is: the claim on it; else its place, a hint before the tiling ``places``."""
    claimed, hinted = weighted_segments(claims), weighted_segments(hints)
    bounds = distinct(
        np.concatenate(
            ([start, stop], claimed.start, claimed.end, hinted.start, hinted.end, places[:, 0], places[:, 1])
        )
    )
    left = bounds[:-1]
    at_claim, is_claimed = _covering(claimed.start, claimed.end, left)
    at_hint, is_hinted = _covering(hinted.start, hinted.end, left)
    label = places[places[:, 0].searchsorted(left, side="right") - 1, 2]
    label[is_hinted] = hinted.owner[at_hint[is_hinted]]
    label[is_claimed] = claimed.owner[at_claim[is_claimed]]
    covers = np.zeros(len(left), np.int64)
    covers[is_claimed] = claimed.weight[at_claim[is_claimed]]
    return joined(Tile(left, bounds[1:], label, covers, np.full(len(left), -1)))


def _covering(starts: I64, ends: I64, places: I64) -> tuple[Places, Mask]:
    """Return which disjoint range each place may lie in, and whether it does."""
    if not len(starts):
        return np.zeros(len(places), np.intp), np.zeros(len(places), np.bool_)
    at = starts.searchsorted(places, side="right") - 1
    return at, (at >= 0) & (places < ends[at])


def joined(rows: Tile) -> Tile:
    """Return the same with neighbours joined that are alike, zeros and other bytes apart."""
    firsts = run_starts(rows.label, rows.claims, np.sign(rows.nonzero))
    lasts = np.append(firsts[1:] - 1, len(rows.start) - 1)
    sums = np.add.reduceat(np.maximum(rows.nonzero, 0), firsts)
    return Tile(
        rows.start[firsts],
        rows.stop[lasts],
        rows.label[firsts],
        rows.claims[firsts],
        np.where(rows.nonzero[firsts] < 0, -1, sums),
    )
