"""What each refcount on disk is, in one byte a cluster: 0, 1, more, or unreadable."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .index_map import Seats
from .owners import U64, Mask
from .refcounts import StoredRefcounts

Bytes = npt.NDArray[np.uint8]

ZERO, ONE, MORE, UNREADABLE = range(4)
_CHUNK = 1 << 20  # seats graded together


class Grades:
    """The refcounts of the clusters that have a seat, graded; the others are looked up."""

    def __init__(self, refcounts: StoredRefcounts, seats: Seats) -> None:
        self._refcounts = refcounts
        self._seats = seats
        if seats.compact:
            self.of = np.zeros(seats.length, dtype=np.uint8)  # grade by seat
            for first in range(0, seats.nobody, _CHUNK):
                last = min(first + _CHUNK, seats.nobody)
                values, readable = refcounts.lookup(seats.taken(first, last))
                self.of[first:last] = np.where(readable, np.minimum(values, np.uint64(MORE)), np.uint64(UNREADABLE))
        else:
            self.of = self._window(0, seats.clusters)

    def _window(self, start: int, stop: int) -> Bytes:
        grades = np.zeros(stop - start, dtype=np.uint8)
        for first, last, values, readable in self._refcounts.windows(stop, start):
            part = grades[first - start : last - start]
            if not readable:
                part[:] = UNREADABLE
            elif values is not None:
                np.minimum(values, values.dtype.type(MORE), out=part, casting="unsafe")
        return grades

    def part(self, start: int, stop: int) -> Bytes:
        """Return the grades of the clusters of the file from ``start`` to ``stop``, seated or not."""
        return self._window(start, stop) if self._seats.compact else self.of[start:stop]

    def single(self, clusters: U64) -> tuple[Mask, Mask]:
        """Return which clusters, anywhere, have the refcount 1, and for which it can be read."""
        inside = clusters < np.uint64(self._seats.clusters)
        if inside.all():
            grades = self.of[self._seats.of(clusters)]
            return grades == ONE, grades != UNREADABLE
        one = np.zeros(len(clusters), dtype=np.bool_)
        readable = np.ones(len(clusters), dtype=np.bool_)
        grades = self.of[self._seats.of(clusters[inside])]
        one[inside], readable[inside] = grades == ONE, grades != UNREADABLE
        values, known = self._refcounts.lookup(clusters[~inside])
        one[~inside], readable[~inside] = values == 1, known
        return one, readable
