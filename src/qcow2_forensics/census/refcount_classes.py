"""The class of each refcount on disk, in two bits a cluster: 0, 1, more, or unreadable."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .arrays import U64, Mask, windows
from .index_map import IndexMap
from .refcounts import StoredRefcounts

Bytes = npt.NDArray[np.uint8]

ZERO, ONE, MORE, UNREADABLE = range(4)
_CHUNK = 1 << 20  # clusters looked up together, a multiple of four
_ALL_ONE = 0b01010101  # the class 1 four times; also the lower bit of any
_SHIFTS = np.arange(0, 8, 2, dtype=np.uint8)
# The four classes in each value of a byte, as the four bytes of one number.
_UNPACKED = ((np.arange(256, dtype=np.uint8)[:, None] >> _SHIFTS) & np.uint8(3)).view(np.uint32).reshape(-1)


@functools.lru_cache(maxsize=8)
def _bits_that_count(width: int) -> Bytes:
    """Return which bits of packed classes :meth:`RefcountClasses.copied_fits` looks at: of a run of ``width`` clusters.

    By whether the run is copied, and where in its first byte it starts.
    """
    count, run = -(-width // 4) + 1, (1 << 2 * width) - 1
    inside = np.stack([np.frombuffer((run << 2 * at).to_bytes(count, "little"), np.uint8) for at in range(4)])
    return np.stack([inside & np.uint8(_ALL_ONE), inside])


class RefcountClasses:
    """The refcount classes of the clusters that the index map knows; those of others are looked up."""

    def __init__(self, refcounts: StoredRefcounts, index_map: IndexMap) -> None:
        self._refcounts = refcounts
        self._index_map = index_map
        self._packed = np.zeros(-(-index_map.length // 4), dtype=np.uint8)  # four classes a byte, the lowest bits first
        if index_map.compact:
            self._pack(index_map.elsewhere, self._looked_up)
        else:
            self._pack(index_map.clusters, self._window)

    def _pack(self, count: int, classes: Callable[[int, int], Bytes]) -> None:
        for first in range(0, count, _CHUNK):
            last = min(first + _CHUNK, count)
            part = classes(first, last)
            if len(part) % 4:
                part = np.append(part, np.zeros(-len(part) % 4, dtype=np.uint8))
            quads = part.view("<u4")  # four classes in each, in the lowest bits of its bytes
            quads = quads | quads >> np.uint32(6)
            packed = (quads | quads >> np.uint32(12)).astype(np.uint8)
            self._packed[first // 4 : first // 4 + len(packed)] = packed

    def _looked_up(self, first: int, last: int) -> Bytes:
        values, readable = self._refcounts.lookup(self._index_map.clusters_at(first, last))
        classes = np.where(readable, np.minimum(values, np.uint64(MORE)), np.uint64(UNREADABLE))
        return classes.astype(np.uint8)

    def of(self, first: int, last: int) -> Bytes:
        """Return the classes by index, from ``first`` to ``last``."""
        classes = _UNPACKED[self._packed[first // 4 : -(-last // 4)]].view(np.uint8)
        return classes[first % 4 : first % 4 + last - first]

    def copied_fits(self, starts: U64, width: int, copied: Mask) -> Mask:
        """Return which runs of ``width`` clusters, each with its index, have refcounts for one and the same copied flag.

        Copied clusters all have the refcount 1, others none; where a refcount cannot be read the answer is no::

            class       0    1   more unreadable
            bits        00   01   10   11
            copied           ok                     bits ^ 01 is 0 for each cluster
            not copied  ok        ok                bits & 01 is 0 for each cluster
        """
        bits = _bits_that_count(width)
        packed = windows(self._packed, bits.shape[2])[starts >> np.uint64(2)]
        packed ^= (copied * np.uint8(_ALL_ONE))[:, None]
        packed &= bits[copied.astype(np.intp), starts & np.uint64(3)]
        fits: Mask = ~packed.any(axis=1)
        return fits

    def _of_clusters(self, clusters: U64) -> Bytes:
        indices = self._index_map.of(clusters)
        shifts = (indices.astype(np.uint8) & np.uint8(3)) << np.uint8(1)
        classes: Bytes = (self._packed[indices >> np.uint64(2)] >> shifts) & np.uint8(3)
        return classes

    def _window(self, start: int, stop: int) -> Bytes:
        classes = np.zeros(stop - start, dtype=np.uint8)
        for first, last, values, readable in self._refcounts.windows(stop, start):
            part = classes[first - start : last - start]
            if not readable:
                part[:] = UNREADABLE
            elif values is not None:
                # 0, 1, and MORE for the rest.
                np.add((values != 0).view(np.uint8), (values > 1).view(np.uint8), out=part)
        return classes

    def part(self, start: int, stop: int) -> Bytes:
        """Return the classes of the clusters of the file from ``start`` to ``stop``, known to the map or not."""
        return self._window(start, stop) if self._index_map.compact else self.of(start, stop)

    def single(self, clusters: U64) -> tuple[Mask, Mask]:
        """Return which clusters, anywhere, have the refcount 1, and for which it can be read."""
        inside = clusters < np.uint64(self._index_map.clusters)
        if inside.all():
            classes = self._of_clusters(clusters)
            return classes == ONE, classes != UNREADABLE
        one = np.zeros(len(clusters), dtype=np.bool_)
        readable = np.ones(len(clusters), dtype=np.bool_)
        classes = self._of_clusters(clusters[inside])
        one[inside], readable[inside] = classes == ONE, classes != UNREADABLE
        values, known = self._refcounts.lookup(clusters[~inside])
        one[~inside], readable[~inside] = values == 1, known
        return one, readable
