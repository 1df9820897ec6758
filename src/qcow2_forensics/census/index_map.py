"""Where in the arrays of a census a host cluster has its element."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .arrays import U64

Values = npt.NDArray[np.unsignedinteger]


class IndexMap:
    """Gives every host cluster its index in arrays that are no longer than necessary.

    Mostly that is the cluster's own number. Of a file that is huge and nearly all hole only the
    clusters that something may claim get one, given as runs; all others share the last one,
    ``elsewhere``, for which nothing is ever counted::

        runs    [0, 3)  [1000, 1002)
        index    0 1 2     3    4      and 5 for any other cluster

    ``clusters`` is how many the file has. The one just past its end has an index too, because
    the last claim may reach into it.
    """

    def __init__(self, clusters: int, runs: tuple[U64, U64] | None = None) -> None:
        self.clusters = clusters
        self._starts, self._stops = runs if runs is not None else _whole(clusters)
        lengths = self._stops - self._starts
        self._bases = np.cumsum(lengths) - lengths
        self.compact = runs is not None
        self.elsewhere = int(lengths.sum())
        self.length = self.elsewhere + self.compact

    def of(self, clusters: U64) -> U64:
        """Return the indices of clusters, of which none is further than one past the end."""
        if not self.compact:
            return clusters
        run = np.searchsorted(self._starts, clusters, side="right") - 1
        indices: U64 = clusters - self._starts[run] + self._bases[run]
        indices[(clusters >= self._stops[run]) | (run < 0)] = self.elsewhere
        return indices

    def at(self, cluster: int) -> int:
        """Return the index of one cluster, as :meth:`of` does."""
        if not self.compact:
            return cluster
        return int(self.of(np.asarray([cluster], dtype=np.uint64))[0])

    def cluster(self, index: int) -> int:
        """Return the cluster with an index; ``elsewhere`` has none."""
        run = int(np.searchsorted(self._bases, index, side="right")) - 1
        return int(self._starts[run]) + index - int(self._bases[run])

    def blank(self, start: int, stop: int) -> bool:
        """Whether no cluster from ``start`` to ``stop`` has an index."""
        first, last = self._between(start, stop)
        return first == last

    def part(self, values: Values, start: int, stop: int) -> Values:
        """Return the values, kept by index, of the clusters from ``start`` to ``stop``; 0 for those without one."""
        if not self.compact:
            return values[start:stop]
        first, last = self._between(start, stop)
        window = np.zeros(stop - start, dtype=values.dtype)
        if first < last:
            starts = np.maximum(self._starts[first:last], np.uint64(start))
            indices = self._bases[first:last] + starts - self._starts[first:last]
            lengths = np.minimum(self._stops[first:last], np.uint64(stop)) - starts
            begin, count = int(indices[0]), int(lengths.sum())
            shift = np.repeat(starts - indices, lengths.astype(np.intp)) - np.uint64(start)
            window[shift + np.arange(begin, begin + count, dtype=np.uint64)] = values[begin : begin + count]
        return window

    def clusters_at(self, first: int, last: int) -> U64:
        """Return the clusters that have the indices from ``first`` to ``last``."""
        indices = np.arange(first, last, dtype=np.uint64)
        run = np.searchsorted(self._bases, indices, side="right") - 1
        clusters: U64 = self._starts[run] + indices - self._bases[run]
        return clusters

    def _between(self, start: int, stop: int) -> tuple[int, int]:
        """Return the first run that reaches past ``start``, and the first one that begins at ``stop`` or later."""
        first = np.searchsorted(self._stops, np.uint64(start), side="right")
        return int(first), int(np.searchsorted(self._starts, np.uint64(stop), side="left"))


def _whole(clusters: int) -> tuple[U64, U64]:
    return np.zeros(1, dtype=np.uint64), np.asarray([clusters + 1], dtype=np.uint64)
