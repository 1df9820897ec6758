"""A 32-bit tag for each of very many clusters, where most tags rise by one with the clusters.

Clusters are looked at in chunks. Of a chunk whose tags rise by one only the first tag is held; the tags of
any other chunk are stored one by one::

    chunk     0           1           2
    tags      7 8 9 ...   - - 3 4 -   5 9 2 ...
    held as   base 7      base 1, 2-4 a row of tags
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .columns import U64, Mask

_BITS = 8
_CHUNK = 1 << _BITS  # clusters
_TOGETHER = 1 << 12  # chunks whose tags are written out at once
_RUN = 1 << 10  # clusters: where runs are this long on average, each is handled as one

U32 = npt.NDArray[np.uint32]


class GuestTags:
    """The tags of ``length`` clusters, by their index; 0 is none, and what all begin with."""

    def __init__(self, length: int) -> None:
        chunks = -(-length // _CHUNK)
        # A chunk that has no row of tags: its elements from ``first`` to ``stop`` have the tag ``base`` + element.
        self._base = np.zeros(chunks, dtype=np.uint32)
        self._first = np.zeros(chunks, dtype=np.uint16)
        self._stop = np.zeros(chunks, dtype=np.uint16)
        self._row = np.zeros(chunks, dtype=np.int32)  # 0 is no row
        self._rows: U32 = np.zeros((1, _CHUNK), dtype=np.uint32)
        self._used = 1

    def set_run(self, start: int, count: int, tag: int) -> bool:
        """Give ``count`` elements from ``start`` the tags from ``tag`` on.

        False, and nothing changed, when one of them has another tag.
        """
        window = slice(start >> _BITS, ((start + count - 1) >> _BITS) + 1)
        chunks = np.arange(window.start, window.stop)
        starts = chunks << _BITS
        begin, end = np.zeros_like(chunks), np.full_like(chunks, _CHUNK)
        begin[0], end[-1] = start - starts[0], start + count - starts[-1]
        base = ((tag - start + starts) & 0xFFFF_FFFF).astype(np.uint32)
        first, stop, unstored = self._first[window], self._stop[window], self._row[window] == 0
        empty = unstored & (stop == 0)
        touching = unstored & ~empty & (self._base[chunks] == base) & (begin <= stop) & (end >= first)
        plain = empty | touching
        if not plain.all():
            other = ~plain
            self._store(chunks[other])
            rows = self._row[chunks[other]]
            places = np.arange(_CHUNK, dtype=np.uint32)
            tags, known = base[other][:, None] + places, self._rows[rows]
            inside = (places >= begin[other][:, None]) & (places < end[other][:, None])
            if bool((inside & (known != 0) & (known != tags)).any()):
                return False
            self._rows[rows] = np.where(inside, tags, known)
            chunks, begin, end, base = chunks[plain], begin[plain], end[plain], base[plain]
            first, stop, empty = first[plain], stop[plain], empty[plain]
        self._base[chunks] = base
        self._first[chunks] = np.where(empty, begin, np.minimum(first, begin))
        self._stop[chunks] = np.maximum(stop, end)
        return True

    def exchange(self, indices: U64, tags: U32) -> Mask:
        """Give elements their tags; return which of them had another tag, or were given two of these."""
        if not len(indices):
            return np.zeros(0, dtype=np.bool_)
        edges = np.flatnonzero((np.diff(indices) != 1) | (np.diff(tags) != 1)) + 1
        bounds = np.concatenate(([0], edges, [len(indices)]))
        if len(indices) < _RUN * (len(bounds) - 1) or not _disjoint(indices, bounds):
            return self._exchange(indices, tags)
        clash = np.zeros(len(indices), dtype=np.bool_)
        for first, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            if not self.set_run(int(indices[first]), stop - first, int(tags[first])):
                clash[first:stop] = self._exchange(indices[first:stop], tags[first:stop])
        return clash

    def _exchange(self, indices: U64, tags: U32) -> Mask:
        chunks = (indices >> np.uint64(_BITS)).astype(np.intp)
        missing = chunks[self._row[chunks] == 0]
        if len(missing):
            self._store(np.unique(missing))
        places = (self._row[chunks].astype(np.intp) << _BITS) | (indices & np.uint64(_CHUNK - 1)).astype(np.intp)
        stored = self._rows.reshape(-1)
        known = stored[places]
        stored[places] = tags
        # The second test sees pairs within these: the last writer won.
        clash: Mask = ((known != 0) & (known != tags)) | (stored[places] != tags)
        return clash

    def _store(self, chunks: npt.NDArray[np.int64]) -> None:
        """Write out the tags of some different chunks that have no row yet."""
        chunks = chunks[self._row[chunks] == 0]
        needed = self._used + len(chunks)
        if needed > len(self._rows):
            self._rows.resize((max(needed, len(self._rows) + len(self._rows) // 4), _CHUNK), refcheck=False)
        places = np.arange(_CHUNK, dtype=np.uint32)
        for at in range(0, len(chunks), _TOGETHER):
            some = chunks[at : at + _TOGETHER]
            known = (places >= self._first[some][:, None]) & (places < self._stop[some][:, None])
            self._rows[self._used : self._used + len(some)] = (self._base[some][:, None] + places) * known
            self._row[some] = np.arange(self._used, self._used + len(some))
            self._used += len(some)


def _disjoint(indices: U64, bounds: npt.NDArray[np.int64]) -> bool:
    """Whether runs of elements share none."""
    starts, lasts = indices[bounds[:-1]], indices[bounds[1:] - 1]
    order = np.argsort(starts)
    return bool((starts[order][1:] > lasts[order][:-1]).all())
