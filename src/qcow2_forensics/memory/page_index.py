"""Makes a run index of segments: for every page of a block, its last record in the stream."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..census.arrays import distinct, is_among
from .page_codecs import DELTA, MISSING, Deltas

Int64s = npt.NDArray[np.int64]


class PageRun(NamedTuple):
    """Pages ``first`` to ``first + pages`` of a block: ``value`` as in :mod:`.pages`, or MISSING.

    A page that has to be decoded is a run of its own.
    """

    first: int
    pages: int
    value: int


class RunIndex:
    """The runs of one block: sorted, not overlapping, nothing for pages that were never recorded.

    Page ``first + i`` of a data run lies at stream offset ``value + i * stride``. The columns are
    ``array('q')``, so that looking one page up makes no numpy scalar.
    """

    def __init__(
        self, first: array[int], pages: array[int], value: array[int], stride: int, deltas: Deltas | None = None
    ) -> None:
        self.deltas: Deltas = deltas or {}
        self.first = first
        self.pages = pages
        self.value = value
        self.stride = stride

    def __len__(self) -> int:
        return len(self.first)

    def recorded(self) -> int:
        """Return the number of pages that the stream has records of."""
        return sum(self.pages)

    def find(self, page: int) -> int:
        """Return the value of one page, MISSING when the stream has no record of it."""
        number = bisect_right(self.first, page) - 1
        if number < 0:
            return MISSING
        into = page - self.first[number]
        if into >= self.pages[number]:
            return MISSING
        value = self.value[number]
        return value if value < 0 else value + into * self.stride

    def runs(self, page: int, pages: int) -> Iterator[PageRun]:
        """Yield runs that tile the asked range exactly, MISSING ones included."""
        end = page + pages
        number = max(0, bisect_right(self.first, page) - 1)
        while page < end:
            if number >= len(self.first):
                yield PageRun(page, end - page, MISSING)
                return
            first, value = self.first[number], self.value[number]
            if page < first:
                stop = min(first, end)
                yield PageRun(page, stop - page, MISSING)
                page = stop
                continue
            stop = min(first + self.pages[number], end)
            if page < stop:
                if value >= 0:
                    value += (page - first) * self.stride
                yield PageRun(page, stop - page, value)
                page = stop
            number += 1


def build(segments: array[int], blocks: int, stride: int) -> list[RunIndex]:
    """Return one index per block from segments in the order of the stream; the last one wins."""
    table = np.frombuffer(segments, dtype=np.int64).reshape(-1, 4) if segments else np.empty((0, 4), np.int64)
    order = np.argsort(table[:, 0], kind="stable")
    table = table[order]
    bounds = np.searchsorted(table[:, 0], np.arange(blocks + 1))
    return [_one(table[bounds[n] : bounds[n + 1], 1:], stride) for n in range(blocks)]


def _histories(table: Int64s, final: Int64s, stride: int) -> dict[int, tuple[int, ...]]:
    """Return for each page that ends in differences the value it began as and the offsets of the differences.

    ``table`` (segments, 3) is in the order of the stream; ``final`` are the values that count in the end.
    """
    is_delta = (table[:, 2] >= DELTA) & (table[:, 2] < MISSING)
    wanted = distinct(table[is_delta & is_among(table[:, 2], distinct(final)), 0])
    found: dict[int, tuple[int, ...]] = {}
    low = np.searchsorted(wanted, table[:, 0])
    high = np.searchsorted(wanted, table[:, 0] + table[:, 1])
    for number in np.flatnonzero(low < high).tolist():
        first, _, value = table[number].tolist()
        for page in wanted[low[number] : high[number]].tolist():
            if is_delta[number]:
                found[page] = (*found.get(page, (MISSING,)), value - DELTA)
            else:
                found[page] = (value + (page - first) * stride if value >= 0 else value,)
    return found


def _one(table: Int64s, stride: int) -> RunIndex:
    first, pages, value = table[:, 0], table[:, 1], table[:, 2]
    order = np.argsort(first, kind="stable")
    ends = first + pages
    if len(table) > 1 and bool((first[order][1:] < ends[order][:-1]).any()):
        first, pages, value = _last_wins(first, ends, value, stride)
    else:
        first, pages, value = first[order], pages[order], value[order]
    first, pages, value = _join(first, pages, value, stride)
    deltas = _histories(table, value, stride) if bool((table[:, 2] < MISSING).any()) else None
    return RunIndex(column(first), column(pages), column(value), stride, deltas)


def _last_wins(first: Int64s, ends: Int64s, value: Int64s, stride: int) -> tuple[Int64s, Int64s, Int64s]:
    """Paint the segments in order over the cells between all their edges.

    A segment covers at most as many cells as it has pages, and each page cost the stream a record, so
    the work is bounded by the length of the stream whatever it says.
    """
    edges = distinct(np.concatenate((first, ends)))
    owner = np.full(len(edges) - 1, -1, dtype=np.int64)
    low = np.searchsorted(edges, first).tolist()
    high = np.searchsorted(edges, ends).tolist()
    for number, (begin, end) in enumerate(zip(low, high, strict=True)):
        owner[begin:end] = number
    cells = np.flatnonzero(owner >= 0)
    owner = owner[cells]
    begin_page = edges[cells]
    into = (begin_page - first[owner]) * stride
    values = np.where(value[owner] >= 0, value[owner] + into, value[owner])
    return begin_page, edges[cells + 1] - begin_page, values


def _join(first: Int64s, pages: Int64s, value: Int64s, stride: int) -> tuple[Int64s, Int64s, Int64s]:
    """Join neighbours that continue one another."""
    if len(first) < 2:
        return first, pages, value
    adjacent = first[1:] == first[:-1] + pages[:-1]
    expected = np.where(value[:-1] >= 0, value[:-1] + pages[:-1] * stride, value[:-1])
    starts = np.flatnonzero(np.concatenate(([True], ~(adjacent & (value[1:] == expected)))))
    return first[starts], np.add.reduceat(pages, starts), value[starts]


def column(values: Int64s) -> array[int]:
    """Return numbers as an array of the standard library, of which looking one up makes no numpy scalar."""
    return array("q", values.tobytes())
