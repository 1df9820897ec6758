"""Recognises QCOW2's own structures in bytes nothing points at any more.

A former table obeys the same rules as a live one: its offsets are aligned and inside the file, its reserved bits are
zero. Guest data does not meet them by chance. Which offsets are possible follows from the image's :class:`Geometry`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby, islice
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ..census.arrays import U64, Mask, Places
from ..census.columns import Columns, big_endian, has_reserved_l1, table_offsets
from ..format.bitmap_directory import DIRTY_TRACKING_BITMAP, BitmapEntry, parse_bitmap_entry
from ..format.entries import ZERO
from ..format.image import Image
from ..format.snapshot_table import SNAPSHOT_ENTRY_LENGTH, SnapshotEntry, build_snapshot_entry, parse_snapshot_head
from ..limits import DEFAULT_LIMITS, FORMER_ENTRY_CANDIDATES, FORMER_REFCOUNT, L1_ENTRIES

Bytes: TypeAlias = npt.NDArray[np.uint8]
Counts: TypeAlias = npt.NDArray[np.intp]

_EXTRA_LENGTHS = frozenset({0, 8, 16, 24})  # what QEMU has written
_ID_LENGTH = 10  # decimal, QEMU counts in 32 bits
_MOST_STATES = 8  # that share most of what a former refcount block counts
BEHIND = 512  # bytes of the next cluster that are looked at too: entries continue past the border
_FIRST_WORDS = 16  # of a cluster: what cannot be a table is mostly seen from these
_FIRST_BYTES = 128


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

    @property
    def entry_words(self) -> int:
        """Words of an L2 entry: an extended one has a second, its bitmap."""
        return 2 if self.extended_l2 else 1

    @property
    def l2_span(self) -> int:
        """Guest bytes under one L2 table."""
        return self.cluster_size * (self.cluster_size // (8 * self.entry_words))

    @classmethod
    def of(cls, image: Image) -> Geometry:
        """Return the geometry of an image."""
        header = image.header
        return cls(header.version, header.cluster_bits, image.file_size, header.extended_l2, header.external_data)


class Rows(NamedTuple):
    """What clusters hold that may be tables, each a row of words."""

    sound: Mask  # rows all of whose entries can be genuine; rows of zeros too
    entries: Counts
    zero_plain: Counts
    compressed: Counts
    targets: U64  # 0 where an entry names none

    @property
    def tables(self) -> Mask:
        """Which rows are sound and have entries."""
        return self.sound & (self.entries > 0)

    @property
    def telling(self) -> Mask:
        """Which rows have several entries, or one that names a cluster; any other lone word may be anything."""
        telling: Mask = (self.entries > 1) | ((self.zero_plain == 0) & self.targets.any(axis=1))
        return telling

    def only(self, which: Mask) -> Rows:
        """Return these facts of some of the rows."""
        return Rows._make(column[which] for column in self)


Rule = Callable[[U64, Geometry], Rows]


def judged(rule: Rule, words: U64, geometry: Geometry) -> tuple[Places, Rows]:
    """Return which rows have sound first words, few of guest data and all of tables, and how a rule judges these."""
    rows = np.flatnonzero(rule(words[:, :_FIRST_WORDS], geometry).sound)
    return rows, rule(words[rows], geometry)


def l2_rows(words: U64, geometry: Geometry) -> Rows:
    """Judge rows of an even number of words as L2 tables."""
    columns = Columns.of(words, geometry)
    entries, packed, hosts = columns.entries, columns.compressed, columns.hosts
    placed = entries != 0
    flagged = geometry.version >= 3 and not geometry.extended_l2  # an entry may have the zero flag
    plain = ~columns.reserved & (flagged | ~columns.bit_zero)
    if not geometry.external_data:
        plain &= _plausible(hosts, geometry)
    # Without an offset only the bare zero flag means anything.
    bare = placed & ~packed & (hosts == 0)
    plain &= ~bare | (entries == np.uint64(ZERO)) if flagged else ~bare
    sound = ~placed | plain
    if columns.has_compressed:
        starts, _ = columns.compressed_extents()
        sound[packed] = ~columns.copied[packed] & (starts < np.uint64(geometry.file_size)) & geometry.compressed
    used = placed
    if columns.bitmaps is not None:
        allocated, used = columns.allocated_bits, placed | (columns.bitmaps != 0)
        sound &= ((allocated & columns.zero_bits) == 0) & (placed | (allocated == 0))
        sound &= ~packed | (columns.bitmaps == 0)
        bare = ~placed & (columns.bitmaps != 0)
    return Rows(
        sound.all(axis=1),
        np.count_nonzero(used, axis=1),
        np.count_nonzero(bare, axis=1),
        np.count_nonzero(packed, axis=1),
        hosts,
    )


def l1_rows(words: U64, geometry: Geometry) -> Rows:
    """Judge rows of words as (parts of) L1 tables."""
    used, offsets = words != 0, table_offsets(words, geometry)
    sound = ~has_reserved_l1(words) & _plausible(offsets, geometry)
    whole = (~used | (sound & (offsets != 0))).all(axis=1)
    ordered = np.sort(offsets[whole], axis=1)
    # QEMU never maps two ranges through one L2 table.
    whole[whole] = ~((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != 0)).any(axis=1)
    none = np.zeros(len(words), np.intp)
    return Rows(whole, np.count_nonzero(used, axis=1), none, none, offsets)


def _plausible(offsets: U64, geometry: Geometry) -> Mask:
    aligned: Mask = (offsets & np.uint64(geometry.cluster_size - 1)) == 0
    return aligned & (offsets < np.uint64(geometry.file_size))


def refcount_rows(data: Bytes, refcount_order: int) -> Mask:
    """Return which rows of bytes may be former refcount blocks: small numbers, at least half of them the same.

    That number is 1 without snapshots, and one more for each snapshot that shares the clusters. The width may be
    another than today's: changing it leaves blocks of the former width behind.
    """
    found = np.zeros(len(data), np.bool_)
    # Anything may look like refcounts of 8 bits, and even more like narrower ones: 8 bits are believed only where
    # the image has that width, and if most are 1; narrower ones never are.
    orders = (3, 4, 5, 6) if refcount_order == 3 else (4, 5, 6)
    narrow = data[:, :_FIRST_BYTES].view(f">u{1 << orders[0] - 3}")  # small numbers are small in halves too
    rows = np.flatnonzero(narrow.max(axis=1) <= FORMER_REFCOUNT)
    for order in orders:
        counts = data[rows].view(f">u{1 << order - 3}")
        used = np.count_nonzero(counts, axis=1)
        usual = range(1, 2 if order == 3 else _MOST_STATES + 1)
        most = np.max([np.count_nonzero(counts == count, axis=1) for count in usual], axis=0)
        found[rows] |= (used >= 4) & (counts.max(axis=1) <= FORMER_REFCOUNT) & (most * 2 >= used)
    return found


# --- entries of snapshots and bitmaps -----------------------------------------------------------


class Entries(NamedTuple):
    """Entries that were found, and how many places that may hold one were not looked at: there were too many."""

    snapshots: list[SnapshotEntry]
    bitmaps: list[BitmapEntry]
    left_out: int


def find_entries(data: bytes, base: int, geometry: Geometry) -> Entries:
    """Return what parses as snapshot table and as bitmap directory entries, wherever they start on 8 bytes.

    ``base`` is the file offset of ``data``. The index of such a snapshot is -1: it is in no table.
    At most 4,096 places of each kind are looked at whole.
    """
    snapshots, bitmaps, left_out = entry_places(big_endian(data).reshape(1, -1), geometry)
    return Entries(
        snapshot_entries_at(data, snapshots.get(0, ()), base, geometry),
        bitmap_entries_at(data, bitmaps.get(0, ()), base, geometry),
        left_out,
    )


def entry_places(
    words: U64, geometry: Geometry, starts: int | None = None
) -> tuple[dict[int, list[int]], dict[int, list[int]], int]:
    """Return where snapshot entries and bitmap entries may be, in bytes, by row of words: their numbers are possible ones.

    The rest of each entry is still to be checked. Entries start in the first ``starts`` words of a row. Last comes how
    many places were left out, because a row has more than the limit.
    """
    table, width = words.reshape(-1), words.shape[1]
    # The first field of both is the offset of a table, which few words can be. 0 less one is the largest number, so
    # that one comparison finds what is neither 0 nor past the end of the file.
    places = np.flatnonzero(table - np.uint64(1) < np.uint64(max(geometry.file_size, 1) - 1))
    places = places[_plausible(table[places], geometry)]
    places = places[places % width < (starts or width)]
    room = width - places % width  # words to the end of the row
    found = _snapshot_places(table, places[room >= 5]), _bitmap_places(table, places[room >= 3])
    snapshots, bitmaps = (_by_row(one, width) for one in found)
    kept = sum(map(len, (*snapshots.values(), *bitmaps.values())))
    return snapshots, bitmaps, sum(map(len, found)) - kept


def _by_row(places: Counts, width: int) -> dict[int, list[int]]:
    rows = groupby(places.tolist(), key=lambda place: place // width)
    return {row: [place % width * 8 for place in islice(found, FORMER_ENTRY_CANDIDATES)] for row, found in rows}


def _snapshot_places(table: U64, places: Counts) -> Counts:
    """Return where the numbers of a snapshot table entry are possible; only those places are looked at in full."""
    sizes, dates, extra = table[places + 1], table[places + 2], table[places + 4] & np.uint64(0xFFFF_FFFF)
    l1_sizes, ids, names = sizes >> np.uint64(32), sizes >> np.uint64(16) & np.uint64(0xFFFF), sizes & np.uint64(0xFFFF)
    sane = (l1_sizes - np.uint64(1) < L1_ENTRIES) & (ids - np.uint64(1) < _ID_LENGTH)
    sane &= (names - np.uint64(1) < DEFAULT_LIMITS.name_bytes) & (dates & np.uint64(0xFFFF_FFFF) < 1_000_000_000)
    sane &= (extra <= max(_EXTRA_LENGTHS)) & (extra % np.uint64(8) == 0)
    return places[sane]


def _bitmap_places(table: U64, places: Counts) -> Counts:
    """The same for bitmap directory entries: table size, flags, type, granularity, and no extra data."""
    sizes, kinds = table[places + 1], table[places + 2]
    sane: Mask = (sizes >> np.uint64(32) != 0) & (sizes & np.uint64(0xFFFF_FFFF) <= 7) & (kinds >> np.uint64(56) == 1)
    sane &= kinds & np.uint64(0xFFFF_FFFF) == 0
    return places[sane]


def snapshot_entries_at(data: bytes, places: Iterable[int], base: int, geometry: Geometry) -> list[SnapshotEntry]:
    """Return the snapshot table entries at some places of ``data`` all of whose fields are possible."""
    found = (snapshot_entry_at(data, at, base, geometry) for at in places)
    return [entry for entry in found if entry is not None]


def bitmap_entries_at(data: bytes, places: Iterable[int], base: int, geometry: Geometry) -> list[BitmapEntry]:
    """Return the bitmap directory entries at some places of ``data`` all of whose fields are possible."""
    found = (_bitmap_entry_at(data, at, base, geometry) for at in places)
    return [entry for entry in found if entry is not None]


def snapshot_entry_at(data: bytes, at: int, base: int, geometry: Geometry) -> SnapshotEntry | None:
    """Return the snapshot table entry at ``data[at:]`` when all of its fields are possible."""
    fixed = data[at : at + SNAPSHOT_ENTRY_LENGTH]
    if len(fixed) < SNAPSHOT_ENTRY_LENGTH:
        return None
    head = parse_snapshot_head(fixed)
    if not (
        head.l1_table_offset
        and head.l1_table_offset % geometry.cluster_size == 0
        and head.l1_table_offset < geometry.file_size
        and 1 <= head.l1_size <= L1_ENTRIES
        and 1 <= head.id_length <= _ID_LENGTH
        and 1 <= head.name_length <= DEFAULT_LIMITS.name_bytes
        and head.date_nsec < 1_000_000_000
        and head.extra_length in _EXTRA_LENGTHS
        and (geometry.version < 3 or head.extra_length >= 16)
        and at + head.total_length <= len(data)
    ):
        return None
    tail = data[at + SNAPSHOT_ENTRY_LENGTH : at + head.total_length]
    entry = build_snapshot_entry(-1, base + at, head, tail)
    return entry if entry.id_bytes.isdigit() and _sane_name(entry.name_bytes) else None


def _sane_name(name: bytes) -> bool:
    try:
        return name.decode("utf-8").isprintable()
    except UnicodeDecodeError:
        return False


def _bitmap_entry_at(data: bytes, at: int, base: int, geometry: Geometry) -> BitmapEntry | None:
    entry = parse_bitmap_entry(data, at, base + at) if geometry.version >= 3 else None
    return entry if entry is not None and _sane_bitmap(entry) else None


def _sane_bitmap(entry: BitmapEntry) -> bool:
    return (
        entry.type == DIRTY_TRACKING_BITMAP
        and entry.table_size > 0
        and not entry.flags & ~7
        and 9 <= entry.granularity_bits <= 31
        and 1 <= len(entry.name_bytes) <= DEFAULT_LIMITS.name_bytes
        and not entry.extra
        and _sane_name(entry.name_bytes)
    )
