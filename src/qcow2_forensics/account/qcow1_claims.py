"""The account of a version 1 image: it has no refcounts, and its entries are all there is to know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..census.arrays import I64, U64, Mask, Places, distinct, is_among, merged
from ..census.columns import Columns, big_endian, compressed_extents
from ..census.issues import Issues, Item
from ..errors import LimitExceeded
from ..findings import EVIDENCE_LIMIT
from ..format.header import SECTOR
from ..format.image import Image
from ..limits import Budget
from .labels import ByteKind, Place
from .marks import Marks
from .streams import taken_by

_CHUNK = 1 << 16  # L1 entries handled at once


class _Table(NamedTuple):
    """One L2 table: its host offset, the guest offset of its first cluster, and its entries for the disk."""

    offset: int
    guest: int
    columns: Columns


class Qcow1Claims:
    """Claims the tables and clusters of a version 1 image.

    ``issues`` are the entries that cannot be followed, by kind: ``beyond-eof``, ``unaligned``, and ``undecodable``
    where streams are decoded. ``stopped`` is set where more tables or streams are named than the file has room for;
    where it was tables, ``walked`` is False and the claims are incomplete.
    """

    def __init__(self, image: Image, marks: Marks) -> None:
        self.image = image
        self.issues = Issues(image.header.cluster_bits)
        self.stopped: LimitExceeded | None = None
        self.walked = False
        self._marks = marks

    def all(self, *, decode: bool) -> None:
        """Claim everything; with ``decode`` compressed clusters claim what their streams take, else their extents."""
        data: list[I64] = []
        packed: list[I64] = []
        try:
            for table in self._tables():
                self._unaligned(table)
                data.append(self._data(table))
                packed.append(self._packed(table))
        except LimitExceeded as error:
            self.stopped = error
            return
        self.walked = True
        streams = np.concatenate([*packed, np.empty((0, 4), np.int64)])
        extents = streams[:, :2]
        if decode:
            self._marks.add_many(self._marks.label(Place.COMPRESSED_SLACK), extents[:, 0], extents[:, 1])
            taken = taken_by(self.image, extents[:, 0], extents[:, 1] - extents[:, 0])
            self._undecodable(streams, taken.failed)
            extents, self.stopped = taken.used, taken.stopped
        for label, rows in (
            (self._marks.label(ByteKind.DATA, "active state"), np.concatenate([*data, np.empty((0, 2), np.int64)])),
            (self._marks.label(ByteKind.COMPRESSED), extents),
        ):
            if len(rows):
                self._marks.add_many(label, *merged(rows[:, 0].astype(np.uint64), rows[:, 1].astype(np.uint64)))

    def _tables(self) -> Iterator[_Table]:
        """Claim the L1 table, and yield the L2 tables that begin inside the file."""
        image, header = self.image, self.image.header
        size, span, width = header.cluster_size, header.l2_span, header.l2_entries * 8
        l2_label = self._marks.label(ByteKind.L2, "active state")
        past = self._marks.label(Place.ENTRIES_PAST_END, "L2 tables")
        needed, start = -(-image.disk_size // span), header.l1_table_offset
        self._marks.add(self._marks.label(Place.HEADER_SLACK), header.header_length, start)
        self._marks.add(self._marks.label(ByteKind.L1, "active state"), start, start + needed * 8)
        l1_past = self._marks.label(Place.ENTRIES_PAST_END, "L1 table")
        self._marks.add(l1_past, start + needed * 8, start + header.l1_size * 8)
        budget = Budget("bytes of L2 tables", image.file_size, image.limits)
        for first in range(0, min(needed, max(0, image.file_size - start) // 8), _CHUNK):
            words = big_endian(image.read(start + first * 8, min(_CHUNK, needed - first) * 8))
            for slot in np.flatnonzero(words).tolist():
                offset, guest = int(words[slot]), (first + slot) * span
                meant = min(header.l2_entries, -(-(image.disk_size - guest) // size))
                if offset + meant * 8 > image.file_size:
                    self.issues.add("beyond-eof", [Item("L1", start + (first + slot) * 8, offset, offset, guest)])
                if offset >= image.file_size:
                    continue
                budget.spend(width)
                self._marks.add(l2_label, offset, offset + meant * 8)
                self._marks.add(past, offset + meant * 8, offset + width)
                yield _Table(offset, guest, Columns.of(big_endian(image.read(offset, meant * 8)), header))

    def _data(self, table: _Table) -> I64:
        """Return the host bytes that the disk shows of the clusters of one table: rows (start, stop)."""
        size = self.image.cluster_size
        places = np.flatnonzero(table.columns.hosts)
        hosts = table.columns.hosts[places]
        inside = self._inside(table, places, hosts)
        places, starts = places[inside], hosts[inside].astype(np.int64)
        stops = starts + np.minimum(size, self.image.disk_size - table.guest - places * size)
        self._marks.add_many(self._marks.label(Place.PAST_STATE_END), stops, starts + size)
        return np.column_stack((starts, stops))

    def _packed(self, table: _Table) -> I64:
        """Return the compressed clusters of one table: rows (start, stop, offset of the entry, guest offset)."""
        places = np.flatnonzero(table.columns.compressed)
        offsets, lengths = compressed_extents(table.columns.entries[places], self.image.header)
        inside = self._inside(table, places, offsets)
        places, starts = places[inside], offsets[inside].astype(np.int64)
        stops = starts + lengths[inside].astype(np.int64)
        guests = table.guest + places * self.image.cluster_size
        return np.column_stack((starts, stops, table.offset + places * 8, guests))

    # --- entries that cannot be followed ---------------------------------------------------------

    def _inside(self, table: _Table, places: Places, hosts: U64) -> Mask:
        """Return which entries of a table name a host offset inside the file; the others are an issue."""
        inside: Mask = hosts < np.uint64(self.image.file_size)
        self._note("beyond-eof", table, places[~inside], hosts[~inside])
        return inside

    def _unaligned(self, table: _Table) -> None:
        places = np.flatnonzero(table.columns.hosts % np.uint64(SECTOR))
        self._note("unaligned", table, places, table.columns.hosts[places])

    def _note(self, kind: str, table: _Table, places: Places, hosts: U64) -> None:
        if len(places):
            chosen = range(min(len(places), EVIDENCE_LIMIT))
            items = (self._item(table, int(places[at]), int(hosts[at])) for at in chosen)
            self.issues.add(kind, items, len(places))

    def _item(self, table: _Table, place: int, host: int) -> Item:
        guest = table.guest + place * self.image.cluster_size
        return Item("L2", table.offset + place * 8, int(table.columns.entries[place]), host, guest)

    def _undecodable(self, streams: I64, failed: I64) -> None:
        """Note the entries of streams that do not decode: ``streams`` as of :meth:`_packed`, ``failed`` as extents."""
        extents = {(offset, offset + length) for offset, length in failed.tolist()}
        found = [
            row
            for row in streams[is_among(streams[:, 0], distinct(failed[:, 0]))].tolist()
            if (row[0], row[1]) in extents
        ]
        if found:
            self.issues.add("undecodable", (self._stream(*row) for row in found), len(found))

    def _stream(self, start: int, _stop: int, at: int, guest: int) -> Item:
        return Item("L2", at, int.from_bytes(self.image.read(at, 8)), start, guest)
