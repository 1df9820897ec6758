"""The class of each refcount on disk, in one byte a cluster: 0, 1, more, or unreadable."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .columns import U64, Mask
from .index_map import IndexMap
from .refcounts import StoredRefcounts

Bytes = npt.NDArray[np.uint8]

ZERO, ONE, MORE, UNREADABLE = range(4)
_CHUNK = 1 << 20  # clusters looked up together


class RefcountClasses:
    """The refcount classes of the clusters that the index map knows; those of others are looked up."""

    def __init__(self, refcounts: StoredRefcounts, index_map: IndexMap) -> None:
        self._refcounts = refcounts
        self._index_map = index_map
        if index_map.compact:
            self.of = np.zeros(index_map.length, dtype=np.uint8)  # class by index
            for first in range(0, index_map.elsewhere, _CHUNK):
                last = min(first + _CHUNK, index_map.elsewhere)
                values, readable = refcounts.lookup(index_map.clusters_at(first, last))
                self.of[first:last] = np.where(readable, np.minimum(values, np.uint64(MORE)), np.uint64(UNREADABLE))
        else:
            self.of = self._window(0, index_map.clusters)

    def _window(self, start: int, stop: int) -> Bytes:
        classes = np.zeros(stop - start, dtype=np.uint8)
        for first, last, values, readable in self._refcounts.windows(stop, start):
            part = classes[first - start : last - start]
            if not readable:
                part[:] = UNREADABLE
            elif values is not None:
                np.minimum(values, values.dtype.type(MORE), out=part, casting="unsafe")
        return classes

    def part(self, start: int, stop: int) -> Bytes:
        """Return the classes of the clusters of the file from ``start`` to ``stop``, known to the map or not."""
        return self._window(start, stop) if self._index_map.compact else self.of[start:stop]

    def single(self, clusters: U64) -> tuple[Mask, Mask]:
        """Return which clusters, anywhere, have the refcount 1, and for which it can be read."""
        inside = clusters < np.uint64(self._index_map.clusters)
        if inside.all():
            classes = self.of[self._index_map.of(clusters)]
            return classes == ONE, classes != UNREADABLE
        one = np.zeros(len(clusters), dtype=np.bool_)
        readable = np.ones(len(clusters), dtype=np.bool_)
        classes = self.of[self._index_map.of(clusters[inside])]
        one[inside], readable[inside] = classes == ONE, classes != UNREADABLE
        values, known = self._refcounts.lookup(clusters[~inside])
        one[~inside], readable[~inside] = values == 1, known
        return one, readable
