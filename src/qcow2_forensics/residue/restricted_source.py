"""A source that refuses ranges: bytes of a deleted snapshot that belong to something else by now."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from typing import Any

import numpy as np
import numpy.typing as npt

from ..census.arrays import U64
from ..errors import ReadError
from ..format.source import Source

Offsets = U64

LOST_TABLE, REUSED, PUNCHED = range(3)
_REASONS = (
    "this L2 table of the deleted snapshot is gone: its cluster was reused or punched",
    "this cluster of the deleted snapshot has been reused by something else",
    "this cluster of the deleted snapshot is a hole in the file now",
)
_UNSORTED = 1 << 18  # clusters gathered before duplicates are removed: crafted tables name the same ones over and over


class Refusals:
    """Gathers clusters that must not be read, an array at a time; of one that is added twice the first reason is kept."""

    def __init__(self, cluster_size: int) -> None:
        self._cluster_size = cluster_size
        self._clusters = [np.empty(0, np.uint64)]  # the first array is sorted and holds each once
        self._codes = [np.empty(0, np.uint8)]
        self._unsorted = 0

    def add_clusters(self, reason: int, offsets: Offsets) -> None:
        """Refuse every read that touches one of these clusters."""
        self._clusters.append(offsets)
        self._codes.append(np.full(len(offsets), reason, np.uint8))
        self._unsorted += len(offsets)
        if self._unsorted > max(_UNSORTED, len(self._clusters[0])):
            self._sort()

    def _sort(self) -> None:
        clusters, first = np.unique(np.concatenate(self._clusters), return_index=True)
        self._clusters, self._codes, self._unsorted = [clusters], [np.concatenate(self._codes)[first]], 0

    def clusters(self) -> tuple[Offsets, Offsets, npt.NDArray[np.uint8]]:
        """Return where the refused ranges start, rising, and stop, and their reasons; neighbours are one range."""
        self._sort()
        starts, codes = self._clusters[0], self._codes[0]
        new = np.ones(len(starts), np.bool_)
        new[1:] = (np.diff(starts) != self._cluster_size) | (codes[1:] != codes[:-1])
        return starts[new], starts[np.roll(new, -1)] + np.uint64(self._cluster_size), codes[new]


class GuardedSource:
    """``source`` with ranges whose reading raises :class:`ReadError` with the reason.

    ``may_be_newer`` are guest ranges (offset, length) that are read and may be newer than the state that is shown.
    Everything else about the source (its path, its identity, how it is closed) shows through.
    """

    def __init__(self, source: Source, refusals: Refusals, may_be_newer: tuple[tuple[int, int], ...] = ()) -> None:
        self._source = source
        self.may_be_newer = may_be_newer
        starts, stops, codes = refusals.clusters()
        self._starts, self._stops, self._codes = _packed(starts), _packed(stops), codes.tobytes()

    @property
    def size(self) -> int:
        return self._source.size

    def read(self, offset: int, length: int, /) -> bytes:
        """Return bytes as the source does; raises when the range touches a guarded one."""
        at = bisect_right(self._starts, offset + length - 1) - 1
        if length > 0 and at >= 0 and self._stops[at] > offset:
            raise ReadError(_REASONS[self._codes[at]], offset=max(self._starts[at], offset), length=length)
        return self._source.read(offset, length)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def _packed(values: Offsets) -> array[int]:
    return array("Q", values.astype(np.uint64).tobytes())
