"""Recognises QCOW2's own structures in bytes nothing points at any more.

Each function takes the bytes and the image's :class:`Geometry` and answers None when they cannot
be that structure. A former table keeps the exact rules of a live one: aligned offsets inside the
file and reserved bits zero, which guest data does not satisfy by chance.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .. import structures
from ..image import Image
from ..structures import BitmapEntry, SnapshotEntry

Words = npt.NDArray[np.uint64]

_EXTRA_LENGTHS = frozenset({0, 8, 16, 24})  # what QEMU has written
_MAX_L1_SIZE = 4 * 1024 * 1024  # entries QEMU accepts
_MAX_ID_LENGTH = 10  # decimal, QEMU counts in 32 bits
_MAX_NAME_LENGTH = 1023
_CANDIDATES = 4096  # places per call looked at in detail: crafted bytes must not cost more


class Geometry(NamedTuple):
    """The facts that decide whether an offset or an entry can be genuine."""

    version: int
    cluster_bits: int
    file_size: int
    extended_l2: bool = False
    external_data: bool = False
    compressed: bool = True

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @classmethod
    def of(cls, image: Image) -> Geometry:
        """Return the geometry of an image."""
        header = image.header
        return cls(header.version, header.cluster_bits, image.file_size, header.extended_l2, header.external_data)


def words_of(data: bytes) -> Words:
    """Return big-endian 64-bit words, a cut one at the end left out."""
    return np.frombuffer(data, ">u8", count=len(data) // 8).astype(np.uint64)


class TableFacts(NamedTuple):
    """What a table-like cluster holds: entries by kind and the host offsets they name."""

    entries: int  # that are not zero
    zero_plain: int
    compressed: int
    targets: Words  # host offsets of the plain entries, in table order
    indices: npt.NDArray[np.intp]  # their places in the table


def parse_l2(data: bytes, geometry: Geometry) -> TableFacts | None:
    """Return the entries of what may be an L2 table; None when one of them cannot be genuine."""
    table = words_of(data)
    if geometry.extended_l2:
        return _parse_extended(table, geometry)
    used = np.flatnonzero(table)
    if not used.size:
        return None
    return _entries(table[used], used, geometry, zero_flag=geometry.version >= 3)


def _parse_extended(table: Words, geometry: Geometry) -> TableFacts | None:
    bitmaps = table[1::2]
    entries = table[0::2][: len(bitmaps)]
    used = np.flatnonzero(entries | bitmaps)
    if not used.size:
        return None
    entries, bitmaps = entries[used], bitmaps[used]
    allocated, zeros = bitmaps & np.uint64(0xFFFF_FFFF), bitmaps >> np.uint64(32)
    if (allocated & zeros).any():
        return None
    placed = entries != 0
    if allocated[~placed].any() or bitmaps[(entries & np.uint64(structures.COMPRESSED)) != 0].any():
        return None
    facts = _entries(entries[placed], used[placed], geometry, zero_flag=False) if placed.any() else None
    if placed.any() and facts is None:
        return None
    plain_zero = int((~placed).sum())
    if facts is None:
        return TableFacts(plain_zero, plain_zero, 0, np.empty(0, np.uint64), np.empty(0, np.intp))
    return facts._replace(entries=facts.entries + plain_zero, zero_plain=plain_zero)


def _entries(
    entries: Words, indices: npt.NDArray[np.intp], geometry: Geometry, *, zero_flag: bool
) -> TableFacts | None:
    compressed = (entries & np.uint64(structures.COMPRESSED)) != 0
    if compressed.any():
        if not geometry.compressed or (entries[compressed] & np.uint64(structures.COPIED)).any():
            return None
        split = np.uint64((1 << (70 - geometry.cluster_bits)) - 1)
        if ((entries[compressed] & split) >= np.uint64(geometry.file_size)).any():
            return None
        entries, indices = entries[~compressed], indices[~compressed]
    reserved = structures.L2_RESERVED if zero_flag else structures.L2_RESERVED | structures.ZERO
    if (entries & np.uint64(reserved)).any():
        return None
    offsets = entries & np.uint64(structures.OFFSET_MASK)
    if not geometry.external_data and not _plausible(offsets, geometry):
        return None
    placed = offsets != 0
    # Without an offset only the bare zero flag means anything.
    bare = entries[~placed]
    if bare.size and ((bare != np.uint64(structures.ZERO)).any() or not zero_flag):
        return None
    return TableFacts(
        len(entries) + int(compressed.sum()), len(bare), int(compressed.sum()), offsets[placed], indices[placed]
    )


def _plausible(offsets: Words, geometry: Geometry) -> bool:
    aligned = not (offsets & np.uint64(geometry.cluster_size - 1)).any()
    return aligned and not (offsets >= np.uint64(geometry.file_size)).any()


def parse_l1(data: bytes, geometry: Geometry) -> TableFacts | None:
    """Return the entries of what may be (part of) an L1 table; its targets are still to be checked."""
    table = words_of(data)
    used = np.flatnonzero(table)
    if not used.size:
        return None
    entries = table[used]
    if (entries & np.uint64(structures.L1_RESERVED)).any():
        return None
    offsets = entries & np.uint64(structures.OFFSET_MASK)
    if (offsets == 0).any() or not _plausible(offsets, geometry):
        return None
    if len(np.unique(offsets)) != len(offsets):
        return None  # QEMU never maps two ranges through one L2 table
    return TableFacts(len(entries), 0, 0, offsets, used)


def looks_like_refcounts(data: bytes, refcount_order: int) -> bool:
    """Whether the bytes may be a former refcount block: whole small numbers, mostly ones.

    The width may be another than today's: changing it leaves blocks of the former one behind.
    """
    if len(data) % 8:
        return False
    # Counts of 8 bits look like anything, narrower ones more so; they count only where in use.
    orders = {4, 5, 6} | ({3} & {refcount_order})
    return any(_small_counts(data, 1 << order) for order in orders)


def _small_counts(data: bytes, bits: int) -> bool:
    counts = np.frombuffer(data, f">u{bits // 8}")
    used = counts[counts != 0]
    return used.size >= 4 and int(used.max()) <= 64 and int((used == 1).sum()) * 2 >= used.size


# --- entries of snapshots and bitmaps -----------------------------------------------------------


def find_entries(data: bytes, base: int, geometry: Geometry) -> tuple[list[SnapshotEntry], list[BitmapEntry]]:
    """Return what parses as snapshot table and as bitmap directory entries, wherever they start on 8 bytes.

    ``base`` is the file offset of ``data``. The index of such a snapshot is -1: it is in no table.
    At most 4,096 places of each kind are looked at whole.
    """
    table = words_of(data)
    # The first field of both is the offset of a table: rare, and found at once.
    named = (
        (table != 0) & ((table & np.uint64(geometry.cluster_size - 1)) == 0) & (table < np.uint64(geometry.file_size))
    )
    places = np.flatnonzero(named)
    if not places.size:
        return [], []
    snapshots = (snapshot_entry_at(data, at, base, geometry) for at in _snapshot_places(table, places)[:_CANDIDATES])
    bitmaps = (_bitmap_entry_at(data, at, base, geometry) for at in _bitmap_places(table, places)[:_CANDIDATES])
    return [entry for entry in snapshots if entry], [entry for entry in bitmaps if entry]


def _snapshot_places(table: Words, places: npt.NDArray[np.intp]) -> list[int]:
    """Return where the numbers of a snapshot table entry are sane: crafted bytes must not cost more than that."""
    places = places[places + 5 <= len(table)]
    sizes, dates, extra = table[places + 1], table[places + 2], table[places + 4] & np.uint64(0xFFFF_FFFF)
    l1_sizes, ids, names = sizes >> np.uint64(32), sizes >> np.uint64(16) & np.uint64(0xFFFF), sizes & np.uint64(0xFFFF)
    sane = (l1_sizes - np.uint64(1) < _MAX_L1_SIZE) & (ids - np.uint64(1) < _MAX_ID_LENGTH)
    sane &= (names - np.uint64(1) < _MAX_NAME_LENGTH) & (dates & np.uint64(0xFFFF_FFFF) < 1_000_000_000)
    sane &= (extra <= max(_EXTRA_LENGTHS)) & (extra % np.uint64(8) == 0)
    return [place * 8 for place in places[sane].tolist()]


def _bitmap_places(table: Words, places: npt.NDArray[np.intp]) -> list[int]:
    """The same for bitmap directory entries: table size, flags, type, granularity, and no extra data."""
    places = places[places + 3 <= len(table)]
    sizes, kinds = table[places + 1], table[places + 2]
    sane = (sizes >> np.uint64(32) != 0) & (sizes & np.uint64(0xFFFF_FFFF) <= 7) & (kinds >> np.uint64(56) == 1)
    sane &= kinds & np.uint64(0xFFFF_FFFF) == 0
    return [place * 8 for place in places[sane].tolist()]


def snapshot_entry_at(data: bytes, at: int, base: int, geometry: Geometry) -> SnapshotEntry | None:
    """Return the snapshot table entry at ``data[at:]`` when all of its fields are sane."""
    fixed = data[at : at + structures.SNAPSHOT_ENTRY_LENGTH]
    if len(fixed) < structures.SNAPSHOT_ENTRY_LENGTH:
        return None
    head = structures.parse_snapshot_head(fixed)
    if not (
        head.l1_table_offset
        and head.l1_table_offset % geometry.cluster_size == 0
        and head.l1_table_offset < geometry.file_size
        and 1 <= head.l1_size <= _MAX_L1_SIZE
        and 1 <= head.id_length <= _MAX_ID_LENGTH
        and 1 <= head.name_length <= _MAX_NAME_LENGTH
        and head.date_nsec < 1_000_000_000
        and head.extra_length in _EXTRA_LENGTHS
        and (geometry.version < 3 or head.extra_length >= 16)
        and at + head.total_length <= len(data)
    ):
        return None
    tail = data[at + structures.SNAPSHOT_ENTRY_LENGTH : at + head.total_length]
    entry = structures.build_snapshot_entry(-1, base + at, head, tail)
    return entry if entry.id_bytes.isdigit() and _sane_name(entry.name_bytes) else None


def _sane_name(name: bytes) -> bool:
    try:
        return name.decode("utf-8").isprintable()
    except UnicodeDecodeError:
        return False


def _bitmap_entry_at(data: bytes, at: int, base: int, geometry: Geometry) -> BitmapEntry | None:
    if geometry.version < 3:
        return None
    entry = structures.parse_bitmap_entry(data, at, base + at)
    return entry if entry is not None and _sane_bitmap(entry) else None


def _sane_bitmap(entry: BitmapEntry) -> bool:
    return (
        entry.type == 1
        and entry.table_size > 0
        and not entry.flags & ~7
        and 9 <= entry.granularity_bits <= 31
        and 1 <= len(entry.name_bytes) <= _MAX_NAME_LENGTH
        and not entry.extra
        and _sane_name(entry.name_bytes)
    )
