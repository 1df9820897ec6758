"""What the tables hold: entries that mean something, as far as the disk or the file they are about goes."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from ..census import Census, Owner
from ..census.arrays import I64, U64, distinct_rows, is_among, merged, run_starts
from ..census.owner_codes import by_owners
from ..census.state_ends import StateEnds
from ..census.walk import L2Tables, batches, l1_chunks, walkable
from ..format.bitmap_directory import BITMAP_ENTRY_LENGTH
from ..format.entries import ALL_SUBCLUSTERS_ZERO, ZERO
from ..format.header import padded
from ..format.image import Image
from ..format.snapshot_table import SNAPSHOT_ENTRY_LENGTH, SNAPSHOT_KNOWN_EXTRA
from .labels import ByteKind, Place
from .marks import Marks


class TableClaims:
    """Claims the tables of one image that could be walked."""

    def __init__(self, census: Census, marks: Marks) -> None:
        self.image: Image = census.image
        self.census = census
        self.marks = marks
        self.size = census.cluster_size

    def all(self) -> None:
        """Claim all tables."""
        self._l1_tables()
        self._l2_tables()
        self._refcounts()
        self._snapshot_table()
        self._bitmaps()

    # --- L1 and L2 -------------------------------------------------------------------------------

    def _l1_tables(self) -> None:
        """Claim the entries for the disk, those for the VM state after it, and others that name an L2 table."""
        header, snapshots = self.image.header, self.image.snapshots
        offsets = np.asarray([header.l1_table_offset] + [entry.l1_table_offset for entry in snapshots], np.uint64)
        counts = np.asarray([header.l1_size] + [entry.l1_size for entry in snapshots], np.int64)
        sound = (offsets < np.uint64(self.image.file_size)) & (offsets % np.uint64(self.size) == 0)
        starts = np.where(sound, offsets, 0).astype(np.int64)
        meant = starts + np.minimum(counts, StateEnds(self.image, snapshots).entries()) * 8
        stops = starts + counts * 8
        for owner, chosen in (("active state", slice(0, 1)), ("snapshots", slice(1, None))):
            kept = sound[chosen]
            label = self.marks.label(ByteKind.L1, owner)
            rows = np.column_stack((starts[chosen], meant[chosen], stops[chosen]))[kept]
            if len(rows):
                rows = distinct_rows(rows)  # a table that several entries name is one
                self.marks.add_many(label, rows[:, 0], rows[:, 1])
                self._past_end(label, rows[:, 1], np.minimum(rows[:, 2], self.image.file_size), owner)

    def _past_end(self, label: int, starts: I64, stops: I64, owner: str) -> None:
        """Claim those L1 entries that no state needs and that name an L2 table; each is read once."""
        kept = stops - starts >= 8
        if not kept.any():
            return
        starts, stops = (
            column.astype(np.int64) for column in merged(starts[kept].astype(np.uint64), stops[kept].astype(np.uint64))
        )
        self.marks.add_many(self.marks.label(Place.ENTRIES_PAST_END, f"L1 table, {owner}"), starts, stops)
        trees = np.zeros(len(starts), np.int64)
        for chunk in l1_chunks(self.image, starts.astype(np.uint64), ((stops - starts) // 8).astype(np.uint64), trees):
            clean = (chunk.tables != 0) & ~chunk.reserved
            clean &= is_among(chunk.tables, self.census.named.offsets)
            if clean.any():
                self.marks.add_many(label, *merged(chunk.positions[clean], chunk.positions[clean] + np.uint64(8)))

    def _l2_tables(self) -> None:
        named, header = self.census.named, self.image.header
        inside = named.offsets < np.uint64(self.image.file_size)
        starts = named.offsets[inside].astype(np.int64)
        shown = named.shown[inside].max(axis=1).astype(np.int64)
        stops = starts + -(-shown // self.size) * header.l2_entry_size
        active = named.active[inside] != 0
        past_disk = active & (shown == 0)
        if self._left_by_savevm(named.part(inside).part(past_disk)):
            stops[past_disk] = starts[past_disk] + self.size
        for owner, chosen in (("active state", active), ("snapshots", ~active)):
            self.marks.add_many(self.marks.label(ByteKind.L2, owner), starts[chosen], stops[chosen])
            past = self.marks.label(Place.ENTRIES_PAST_END, f"L2 tables, {owner}")
            self.marks.add_many(past, stops[chosen], starts[chosen] + self.size)

    def _left_by_savevm(self, tables: L2Tables) -> bool:
        """Whether the active state's tables past its disk hold what QEMU leaves there when it saves a VM state.

        That is an entry that reads as zeros for each cluster of the VM state of some snapshot, and nothing else.
        """
        live = {-(-entry.vm_state_size // self.size) for entry in self.image.snapshots if entry.vm_state_size}
        tables, complete = walkable(self.image, tables)
        zeros = 0
        for batch in batches(self.image, tables) if live and complete else ():
            marks, zero = batch.entries, ZERO
            if batch.bitmaps is not None:
                if marks.any():
                    return False
                marks, zero = batch.bitmaps, ALL_SUBCLUSTERS_ZERO
            zeros += int(np.count_nonzero(marks))
            if ((marks != 0) & (marks != np.uint64(zero))).any():
                return False
        return zeros in live

    # --- refcounts -------------------------------------------------------------------------------

    def _refcounts(self) -> None:
        stored = self.census.refcounts
        start = self.image.header.refcount_table_offset
        self.marks.add(self.marks.label(ByteKind.REFCOUNT_TABLE), start, start + len(stored.table) * 8)
        slots = np.flatnonzero((stored.offsets != 0) & ~stored.unreadable)
        blocks = stored.offsets[slots].astype(np.int64)
        counted = np.clip(self.census.clusters - slots * stored.per_block, 0, stored.per_block)
        stops = blocks + -(-counted * stored.bits // 8)
        blocks, first = np.unique(blocks, return_index=True)  # by rising slot: the first counts most
        self.marks.add_many(self.marks.label(ByteKind.REFCOUNT_BLOCK), blocks, stops[first])
        self.marks.add_many(self.marks.label(Place.REFCOUNTS_PAST_END), stops[first], blocks + self.size)

    # --- snapshots and bitmaps -------------------------------------------------------------------

    def _snapshot_table(self) -> None:
        label, names = self.marks.label(ByteKind.SNAPSHOT_TABLE), "snapshot table"
        padding = self.marks.label(Place.TABLE_PADDING, names)
        extra = self.marks.label(Place.UNKNOWN_EXTRA, names)
        unused = self.marks.label(Place.UNUSED_FIELD, "vm_state_size")
        for entry in self.image.snapshots:
            at = entry.offset + SNAPSHOT_ENTRY_LENGTH
            known = min(entry.extra_length, SNAPSHOT_KNOWN_EXTRA)
            # The 32-bit size of a VM state is read where the extra data has no 64-bit one.
            if known >= 8 and entry.vm_state_size32 not in (0, entry.vm_state_size):
                place, length = entry.place_of("vm_state_size32")
                self.marks.add(label, entry.offset, place)
                self.marks.add(unused, place, place + length)
                self.marks.add(label, place + length, at + known)
            else:
                self.marks.add(label, entry.offset, at + known)
            self.marks.add(extra, at + known, at + entry.extra_length)
            at += entry.extra_length
            for name in (entry.id_bytes, entry.name_bytes):
                self.marks.add_name(label, names, name, at)
                at += len(name)
            if entry is not self.image.snapshots[-1]:
                self.marks.add(padding, at, padded(at))

    def _bitmaps(self) -> None:
        layout, image = self.census.layout, self.image
        if layout.bitmap_directory is None:
            return
        directory, names = self.marks.label(ByteKind.BITMAP_DIRECTORY), "bitmap directory"
        tables = self.marks.label(ByteKind.BITMAP_TABLE)
        past = self.marks.label(Place.ENTRIES_PAST_END, "bitmap tables")
        wanted: list[tuple[int, int, int]] = []  # offset of the table, entries that mean something, bytes of bits
        for entry in image.bitmaps:
            at = entry.offset + BITMAP_ENTRY_LENGTH
            self.marks.add(directory, entry.offset, at)
            self.marks.add(self.marks.label(Place.UNKNOWN_EXTRA, names), at, at + len(entry.extra))
            at += len(entry.extra)
            self.marks.add_name(directory, names, entry.name_bytes, at)
            self.marks.add(
                self.marks.label(Place.TABLE_PADDING, names),
                entry.offset + entry.length,
                padded(at + len(entry.name_bytes)),
            )
            bits = -(-image.disk_size // (1 << min(entry.granularity_bits, 63)))
            needed = -(-bits // 8)
            entries = min(entry.table_size, -(-needed // self.size))
            if entry.table_offset % self.size == 0:
                self.marks.add(tables, entry.table_offset, entry.table_offset + entries * 8)
                self.marks.add(past, entry.table_offset + entries * 8, entry.table_offset + entry.table_size * 8)
                wanted.append((entry.table_offset, entries, needed))
        self._bits(wanted)

    def _bits(self, wanted: list[tuple[int, int, int]]) -> None:
        """Claim the bits of bitmaps that have a place on the disk."""
        label, past = self.marks.label(ByteKind.BITMAP_DATA), self.marks.label(Place.BITS_PAST_END)
        offsets, counts = [one[0] for one in wanted], [one[1] for one in wanted]
        needed = np.asarray([one[2] for one in wanted], np.int64)
        found: list[U64] = []
        for chunk in l1_chunks(self.image, offsets, counts, list(range(len(wanted)))):
            sound = (chunk.tables != 0) & (chunk.tables % np.uint64(self.size) == 0)
            left = np.clip(needed[chunk.tree] - chunk.index.astype(np.int64) * self.size, 0, self.size)
            found.append(np.column_stack((chunk.tables[sound], left[sound].astype(np.uint64))))
        rows = np.concatenate([*found, np.empty((0, 2), np.uint64)]).astype(np.int64)
        rows = rows[np.lexsort((-rows[:, 1], rows[:, 0]))]
        rows = rows[run_starts(rows[:, 0])]
        self.marks.add_many(label, rows[:, 0], rows[:, 0] + rows[:, 1])
        self.marks.add_many(past, rows[:, 0] + rows[:, 1], rows[:, 0] + self.size)


_PLACES = (
    (Owner.DATA | Owner.SNAPSHOT_DATA, Place.ZERO_FLAGGED),
    (Owner.COMPRESSED, Place.COMPRESSED_SLACK),
    (Owner.CRYPTO, Place.LUKS_GAP),
    (Owner.SNAPSHOT_TABLE | Owner.REFCOUNT_TABLE, Place.TABLE_SLACK),
    (Owner.BITMAP_DIRECTORY | Owner.BITMAP_TABLE | Owner.BITMAP_DATA, Place.TABLE_SLACK),
    (Owner.REFCOUNT_BLOCK, Place.REFCOUNTS_PAST_END),
    (Owner.L2 | Owner.SNAPSHOT_L2, Place.ENTRIES_PAST_END),
    (Owner.L1 | Owner.SNAPSHOT_L1, Place.L1_SLACK),
    (Owner.HEADER, Place.HEADER_SLACK),
)


class OwnerPlaces:
    """The label of unaccounted bytes by the owners of their cluster."""

    def __init__(self, marks: Marks, *, extended: bool) -> None:
        places = [Place.FREE, *(place for _, place in _PLACES)]
        if extended:
            places = [Place.SUBCLUSTER if place is Place.ZERO_FLAGGED else place for place in places]
        self._labels = np.asarray([marks.label(place) for place in places], np.int64)

    def of(self, owners: npt.NDArray[np.unsignedinteger]) -> I64:
        """Return the labels for some combinations of owners."""
        found: I64 = self._labels[_place_numbers()[owners]]
        return found


@functools.cache
def _place_numbers() -> npt.NDArray[np.uint8]:
    """Return which row of the places above counts for every combination of owners, from 1; later ones win."""
    return by_owners(*((owner, number) for number, (owner, _) in enumerate(_PLACES, 1)))
