"""Which bytes of data clusters any state shows: whole clusters as a byte each, the others as ranges.

A cluster in the middle of a disk is shown as a whole; the last one of a disk or of a VM state in part, and those
after it not at all::

    guest      | cluster | cluster | clus:ter | cluster |
    shown      [ whole   | whole   | par]:tail| past the end
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..census import IndexMap, Tables
from ..census.arrays import I64, U64, DistinctValues, Mask, distinct, distinct_rows, is_among, run_starts
from ..census.columns import Columns
from ..format.entries import SUBCLUSTERS
from ..format.image import Image

ACTIVE, SNAPSHOT, MEMORY = 1, 2, 4  # flags of a cluster: the states that show it
Flags = npt.NDArray[np.uint8]
_FLAGS: Flags = np.asarray([ACTIVE, SNAPSHOT, MEMORY], np.uint8)  # of the columns of what a table shows


class ShownBytes:
    """What the states show of the host clusters; arrays are by index of the index map.

    ``flags`` are the states that show a cluster as a whole, ``subclusters`` the subclusters that they show, and
    ``streams`` the compressed entries that are shown as a whole.
    """

    def __init__(self, image: Image, clusters: IndexMap) -> None:
        header = image.header
        self._clusters = clusters
        self._size = header.cluster_size
        self._end = image.file_size
        self._external = header.external_data
        self.extended = header.extended_l2
        self.flags: Flags = np.zeros(clusters.length, np.uint8)
        self.subclusters = np.zeros(clusters.length if self.extended else 0, np.uint32)
        self.streams = DistinctValues()
        self._parts: list[I64] = []
        self._past: list[I64] = []
        self._past_streams: list[U64] = []
        self._cut: list[U64] = []

    def tables(self, batch: Tables) -> None:
        """Take in a batch of tables."""
        if self._external:
            return
        span = self._size * batch.entries.shape[1]
        is_shown: Mask = np.count_nonzero(batch.shown, axis=1) != 0
        whole = ((batch.shown == 0) | (batch.shown == np.uint64(span))).all(axis=1) & is_shown
        bits = (batch.shown != 0) @ _FLAGS
        columns = batch.columns
        hosts = columns.data_hosts
        for flag in distinct(bits[whole]).tolist():
            rows = np.flatnonzero(whole & (bits == flag))
            chosen = hosts if len(rows) == len(hosts) else hosts[rows]
            here = self._placed(chosen)
            allocated = columns.allocated_bits[rows][here] if self.extended else None
            self._show(chosen[here], flag, allocated)
            if columns.has_compressed:
                self.streams.add(columns.entries[rows][columns.compressed[rows]])
        if not is_shown.all():
            self._unshown(columns.rows(~is_shown))
        for row in np.flatnonzero(is_shown & ~whole).tolist():  # one or two for each state
            self._cut_table(batch, row)

    def _placed(self, hosts: U64) -> Mask:
        placed: Mask = (hosts != 0) & ((hosts & np.uint64(self._size - 1)) == 0) & (hosts < np.uint64(self._end))
        return placed

    def _show(self, hosts: U64, flag: int, allocated: U64 | None) -> None:
        indices = self._clusters.of(hosts // np.uint64(self._size))
        self.flags[indices] |= np.uint8(flag)
        if allocated is not None:
            np.bitwise_or.at(self.subclusters, indices, allocated.astype(np.uint32))

    def _unshown(self, columns: Columns) -> None:
        """Take in tables of which no state shows anything."""
        hosts = columns.hosts[self._placed(columns.hosts)].astype(np.int64)
        self._past.append(np.column_stack((hosts, hosts + self._size)))
        self._past_streams.append(columns.entries[columns.compressed])

    def _cut_table(self, batch: Tables, row: int) -> None:
        """Take in a table of which a part is shown."""
        size, width = self._size, batch.entries.shape[1]
        columns = batch.columns
        starts = np.arange(width, dtype=np.int64) * size
        shown = np.clip(batch.shown[row].astype(np.int64)[None, :] - starts[:, None], 0, size)  # (entries, states)
        most = shown.max(axis=1)
        flags = (shown != 0) @ _FLAGS
        hosts = columns.data_hosts[row]
        placed = self._placed(hosts)
        for flag in distinct(flags[placed & (most == size)]).tolist():
            here = placed & (most == size) & (flags == flag)
            self._show(hosts[here], flag, columns.allocated_bits[row][here] if self.extended else None)
        for place in np.flatnonzero(placed & (most > 0) & (most < size)).tolist():
            self._part(int(hosts[place]), int(most[place]), int(flags[place]), int(columns.allocated_bits[row][place]))
        stored = columns.hosts[row]
        behind = self._placed(stored) & (most < size)
        if behind.any():
            first = stored[behind].astype(np.int64)
            self._past.append(np.column_stack((first + most[behind], first + size)))
        packed = columns.compressed[row]
        if packed.any():
            entries = columns.entries[row]
            self.streams.add(entries[packed & (most == size)])
            cut = packed & (most > 0) & (most < size)
            self._cut.append(np.column_stack((entries[cut], most[cut].astype(np.uint64))))
            self._past_streams.append(entries[packed & (most == 0)])

    def _part(self, host: int, shown: int, flag: int, allocated: int) -> None:
        """Take in one cluster that is shown up to some byte."""
        unit = self._size // SUBCLUSTERS if self.extended else self._size
        for number in range(-(-shown // unit)):
            if not self.extended or allocated >> number & 1:
                stop = min(shown, (number + 1) * unit)
                self._parts.append(np.asarray([[host + number * unit, host + stop, flag]], np.int64))

    # --- what came of it -------------------------------------------------------------------------

    def parts(self) -> I64:
        """Return the ranges shown of clusters that no state shows as a whole: rows (start, stop, flags)."""
        rows = np.concatenate([*self._parts, np.empty((0, 3), np.int64)])
        if len(rows):
            indices = self._clusters.of((rows[:, 0] // self._size).astype(np.uint64))
            known = self.flags[indices] != 0
            if self.extended:
                unit = self._size // SUBCLUSTERS
                known &= (self.subclusters[indices] >> (rows[:, 0] % self._size // unit).astype(np.uint32)) & 1 != 0
            rows = rows[~known]
        if len(rows):
            rows = rows[np.argsort(rows[:, 0], kind="stable")]
            first = run_starts(rows[:, 0])
            stops, flags = np.maximum.reduceat(rows[:, 1], first), np.bitwise_or.reduceat(rows[:, 2], first)
            rows = np.column_stack((rows[first, 0], stops, flags))
        return rows

    def past(self) -> I64:
        """Return the ranges of clusters that are mapped past the end of a state: rows (start, stop)."""
        return distinct_rows(np.concatenate([*self._past, np.empty((0, 2), np.int64)]))

    def past_streams(self) -> U64:
        """Return the compressed entries that no state shows."""
        past = distinct(np.concatenate([*self._past_streams, np.empty(0, np.uint64)]))
        cut = distinct(np.concatenate([*self._cut, np.empty((0, 2), np.uint64)])[:, 0])
        return past[~is_among(past, self.streams.result()) & ~is_among(past, cut)]

    def cut_streams(self) -> list[tuple[int, int]]:
        """Return compressed entries of which only the first bytes are shown, and how many."""
        cut = np.concatenate([*self._cut, np.empty((0, 2), np.uint64)])
        most: dict[int, int] = {}
        for entry, shown in cut[~is_among(cut[:, 0], self.streams.result())].tolist():
            most[entry] = max(shown, most.get(entry, 0))
        return [*most.items()]
