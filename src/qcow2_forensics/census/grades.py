"""What each refcount on disk is, in one byte a cluster: 0, 1, more, or unreadable."""

from __future__ import annotations

import numpy as np

from .model import U64, Mask
from .refcounts import StoredRefcounts

ZERO, ONE, MORE, UNREADABLE = range(4)


class Grades:
    """The refcounts of the clusters of the file, graded; those past its end are looked up."""

    def __init__(self, refcounts: StoredRefcounts, clusters: int) -> None:
        self._refcounts = refcounts
        self.clusters = clusters
        self.of = np.zeros(clusters, dtype=np.uint8)  # grade of each cluster
        for start, stop, values, readable in refcounts.windows(clusters):
            if not readable:
                self.of[start:stop] = UNREADABLE
            elif values is not None:
                np.minimum(values, values.dtype.type(MORE), out=self.of[start:stop], casting="unsafe")

    def single(self, clusters: U64) -> tuple[Mask, Mask]:
        """Return which clusters, anywhere, have the refcount 1, and for which it can be read."""
        inside = clusters < np.uint64(self.clusters)
        if inside.all():
            grades = self.of[clusters]
            return grades == ONE, grades != UNREADABLE
        one = np.zeros(len(clusters), dtype=np.bool_)
        readable = np.ones(len(clusters), dtype=np.bool_)
        grades = self.of[clusters[inside]]
        one[inside], readable[inside] = grades == ONE, grades != UNREADABLE
        values, known = self._refcounts.lookup(clusters[~inside])
        one[~inside], readable[~inside] = values == 1, known
        return one, readable
