"""Exact reference counts for every host cluster in as few bytes as they need."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .arrays import I64, U64, sum_by, windows

_WIDTHS = (np.uint8, np.uint16, np.uint32, np.uint64)
_MOST = {np.dtype(width).itemsize: int(np.iinfo(width).max) for width in _WIDTHS}


class Counters:
    """One count per host cluster, by its index.

    Starts with 8 bits each, and widens as a whole when a crafted image counts further: sharing a
    table a million times makes numbers large, not arrays long. Untouched parts cost no memory.
    """

    def __init__(self, length: int) -> None:
        self._counts: npt.NDArray[np.unsignedinteger] = np.zeros(length, dtype=_WIDTHS[0])

    def add_range(self, first: int, count: int, weight: int) -> None:
        """Add ``weight`` to ``count`` clusters from ``first``."""
        if count <= 0 or weight <= 0:
            return
        part = self._counts[first : first + count]
        self._make_room(int(part.max()) + weight)
        self._counts[first : first + count] += np.asarray(weight).astype(self._counts.dtype)

    def add_runs(self, starts: U64, width: int, weights: U64) -> None:
        """Add to ``width`` clusters from each start its weight; no two of these runs share a cluster."""
        if len(starts):
            part = windows(self._counts, width)[starts]
            self._make_room(int((part.max(axis=1) + weights).max()))
            windows(self._counts, width)[starts] = part + weights.astype(self._counts.dtype)[:, None]

    def add(self, clusters: U64, weights: U64 | int) -> None:
        """Add to each cluster its weight; clusters may repeat and come in any order."""
        if not len(clusters):
            return
        if isinstance(weights, int):
            first, last = int(clusters[0]), int(clusters[-1])
            rising = len(clusters) == 1 or bool((clusters[1:] > clusters[:-1]).all())
            if rising and last - first + 1 == len(clusters):
                self.add_range(first, len(clusters), weights)
                return
            if rising:
                self._add_unique(clusters, np.uint64(weights))
                return
            weights = np.full(len(clusters), weights, dtype=np.uint64)
        self._add_unique(*sum_by(clusters, weights))

    def _add_unique(self, clusters: U64, weights: U64 | np.uint64) -> None:
        sums = self._counts[clusters].astype(np.uint64) + weights
        self._make_room(int(sums.max()))
        self._counts[clusters] = sums.astype(self._counts.dtype)

    def _make_room(self, value: int) -> None:
        if value > _MOST[self._counts.itemsize]:
            width = next(width for width in _WIDTHS if value <= np.iinfo(width).max)
            self._counts = self._counts.astype(width)

    @property
    def all(self) -> npt.NDArray[np.unsignedinteger]:
        """Every count, a view."""
        return self._counts

    def at(self, clusters: U64 | I64) -> U64:
        """Return the counts of some clusters."""
        return self._counts[clusters].astype(np.uint64)

    def __getitem__(self, cluster: int) -> int:
        return int(self._counts[cluster])

    def excess(self, most: int) -> int:
        """Return by how much all counts together exceed ``most`` each."""
        if most >= _MOST[self._counts.itemsize]:
            return 0
        total = 0
        for start in range(0, len(self._counts), 1 << 22):
            part = self._counts[start : start + (1 << 22)]
            over = part[part > most].astype(np.uint64)
            total += int((over - np.uint64(most)).sum()) if len(over) else 0
        return total

    def over(self, most: int, limit: int = 100) -> list[int]:
        """Return the first clusters counted more often than ``most``."""
        found: list[int] = []
        if most >= _MOST[self._counts.itemsize]:
            return found
        for start in range(0, len(self._counts), 1 << 22):
            hits = np.flatnonzero(self._counts[start : start + (1 << 22)] > most)
            found += (hits[: limit - len(found)] + start).tolist()
            if len(found) >= limit:
                break
        return found
