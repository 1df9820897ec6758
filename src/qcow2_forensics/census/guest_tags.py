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

from .arrays import I64, U64, Mask, distinct, ranges

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

    def set_runs(self, starts: I64, counts: I64, tags: I64) -> Mask:
        """Give ``counts`` elements from each of ``starts`` the tags from each of ``tags`` on; return for which runs.

        Runs rise and share no element. Of a run with an element that has another tag nothing is changed.
        """
        run, chunks = ranges(starts >> _BITS, ((starts + counts - 1) >> _BITS) + 1)
        origin = chunks << _BITS
        begin, end = np.maximum(starts[run] - origin, 0), np.minimum((starts + counts)[run] - origin, _CHUNK)
        base = (((tags - starts)[run] + origin) & 0xFFFF_FFFF).astype(np.uint32)
        first, stop = self._first[chunks], self._stop[chunks]
        empty = stop == 0
        touching = (self._base[chunks] == base) & (begin <= stop) & (end >= first)
        plain = (self._row[chunks] == 0) & (empty | touching)
        both = chunks[1:] == chunks[:-1]  # one run ends in the chunk, and another begins
        plain[1:] &= ~both
        plain[:-1] &= ~both
        done = np.ones(len(starts), dtype=np.bool_)
        other = np.flatnonzero(~plain)
        if len(other):
            self._store(distinct(chunks[other]))
            piece, place = ranges(begin[other], end[other])
            piece = other[piece]
            places = (self._row[chunks[piece]].astype(np.int64) << _BITS) | place
            given, stored = base[piece] + place.astype(np.uint32), self._rows.reshape(-1)
            known = stored[places]
            wrong = (known != 0) & (known != given)
            if wrong.any():
                done[run[piece[wrong]]] = False
                kept = done[run[piece]]
                places, given = places[kept], given[kept]
                plain &= done[run]
            stored[places] = given
        chunks, empty = chunks[plain], empty[plain]
        self._base[chunks] = base[plain]
        self._first[chunks] = np.where(empty, begin[plain], np.minimum(first[plain], begin[plain]))
        self._stop[chunks] = np.maximum(stop[plain], end[plain])
        return done

    def exchange(self, indices: U64, tags: U32) -> Mask:
        """Give elements their tags; return which of them had another tag, or were given two of these."""
        if not len(indices):
            return np.zeros(0, dtype=np.bool_)
        edges = np.flatnonzero((np.diff(indices) != 1) | (np.diff(tags) != 1)) + 1
        if len(indices) < _RUN * (len(edges) + 1):
            return self._exchange(indices, tags)
        begins, ends = np.append(0, edges), np.append(edges, len(indices))
        order = np.argsort(indices[begins])
        begins, ends = begins[order], ends[order]
        starts, counts = indices[begins].astype(np.int64), ends - begins
        if (starts[1:] < (starts + counts)[:-1]).any():
            return self._exchange(indices, tags)
        given = self.set_runs(starts, counts, tags[begins].astype(np.int64))
        clash = np.zeros(len(indices), dtype=np.bool_)
        for begin, end in zip(begins[~given].tolist(), ends[~given].tolist(), strict=True):
            clash[begin:end] = self._exchange(indices[begin:end], tags[begin:end])
        return clash

    def _exchange(self, indices: U64, tags: U32) -> Mask:
        chunks = (indices >> np.uint64(_BITS)).astype(np.intp)
        missing = chunks[self._row[chunks] == 0]
        if len(missing):
            self._store(distinct(missing))
        places = (self._row[chunks].astype(np.intp) << _BITS) | (indices & np.uint64(_CHUNK - 1)).astype(np.intp)
        stored = self._rows.reshape(-1)
        known = stored[places]
        stored[places] = tags
        # The second test sees pairs within these: the last writer won.
        clash: Mask = ((known != 0) & (known != tags)) | (stored[places] != tags)
        return clash

    def _store(self, chunks: I64) -> None:
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
