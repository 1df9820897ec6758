"""From L1 tables to the L2 tables they name, each once, however often and from wherever it is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..format.entries import stored_extent
from ..format.image import Image
from ..limits import UNALIGNED_TABLES_FILE, UNALIGNED_TABLES_REPEATS, UNALIGNED_TABLES_SPARE, Budget
from .arrays import I64, U64, Mask, Places, run_starts, stretches, weighted_segments
from .columns import BATCH, Columns, big_endian, has_copied, has_reserved_l1, table_offsets, table_words
from .index_map import IndexMap
from .issues import Item
from .state_ends import StateEnds

_L1_CHUNK = 1 << 19  # bytes of an L1 table handled at once: temporaries stay in the cache
_L1_GAP = 1 << 16  # bytes between two tables that are read over
_MERGE_ROWS = 1 << 20


@dataclass(frozen=True)
class L1Chunk:
    """Non-zero entries of one piece of L1 tables: positions in the file and values.

    ``weight`` is how many trees hold each; ``tree`` is the one named as its owner, ``index`` the slot there.
    """

    positions: U64
    entries: U64
    index: U64
    weight: U64
    tree: I64
    tables: U64  # the host offsets the entries name: of L2 tables, or of a bitmap's clusters

    @property
    def copied(self) -> Mask:
        """Which entries have the copied flag."""
        return has_copied(self.entries)

    @property
    def reserved(self) -> Mask:
        """Which entries of an L1 table have reserved bits set."""
        return has_reserved_l1(self.entries)


def l1_chunks(
    image: Image, offsets: U64 | list[int], counts: U64 | list[int], trees: U64 | I64 | list[int]
) -> Iterator[L1Chunk]:
    """Yield the non-zero entries of L1 tables, each of some entries and of a tree, at multiples of 8 bytes.

    Every byte is read once, also where tables repeat or overlap; past the end of the file entries
    are zero.
    """
    end_of_file = -(-image.file_size // 8) * 8
    start = np.asarray(offsets, dtype=np.uint64)
    inside = start < np.uint64(end_of_file)
    start = start[inside].astype(np.int64)
    end = np.minimum(start + np.asarray(counts, dtype=np.int64)[inside] * 8, end_of_file)
    segments = weighted_segments(np.column_stack((start, end, np.asarray(trees, dtype=np.int64)[inside])))
    far = segments.start[1:] - segments.end[:-1] > _L1_GAP
    for first, last in stretches(len(segments.start), far):
        stop = int(segments.end[last - 1])
        for at in range(int(segments.start[first]), stop, _L1_CHUNK):
            size = min(_L1_CHUNK, stop - at)
            entries = big_endian(image.read(at, size).ljust(size, b"\0"))
            places = np.flatnonzero(entries)
            positions = places * 8 + at
            which = np.searchsorted(segments.start[first:last], positions, side="right") + (first - 1)
            inside = positions < segments.end[which]
            if not inside.all():
                places, positions, which = places[inside], positions[inside], which[inside]
            if len(places):
                yield L1Chunk(
                    positions.astype(np.uint64),
                    entries[places],
                    ((positions - segments.origin[which]) // 8).astype(np.uint64),
                    segments.weight[which].astype(np.uint64),
                    segments.owner[which],
                    table_offsets(entries[places], image.header),
                )


@dataclass(frozen=True)
class L2Tables:
    """The L2 tables that L1 tables name, by rising offset, each once.

    ``low`` and ``high`` are the least and greatest L1 slot that names a table, ``index`` the least
    one in the L1 table of ``tree``, whose owner is reported. ``shown`` is how much of what a table maps any
    state shows, in the columns of :mod:`.state_ends`.
    """

    offsets: U64
    active: U64
    snapshots: U64
    low: U64
    high: U64
    index: U64
    tree: I64
    shown: U64  # (tables, 3) bytes

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def arrays(self) -> tuple[npt.NDArray[Any], ...]:
        """All arrays, in the order above."""
        return self.offsets, self.active, self.snapshots, self.low, self.high, self.index, self.tree, self.shown

    @classmethod
    def nothing(cls) -> L2Tables:
        empty = np.zeros(0, dtype=np.uint64)
        return cls(empty, empty, empty, empty, empty, empty, np.zeros(0, dtype=np.int64), empty.reshape(0, 3))

    @classmethod
    def of_chunk(cls, chunk: L1Chunk, *, active: bool, ends: StateEnds | None = None) -> L2Tables:
        """Return the tables one piece of an L1 table names; without ``ends`` nothing of them counts as shown."""
        none = np.zeros(len(chunk.entries), dtype=np.uint64)
        targets = chunk.tables
        on, off = (chunk.weight, none) if active else (none, chunk.weight)
        shown = np.zeros((len(none), 3), np.uint64) if ends is None else ends.shown(chunk.index, chunk.tree)
        return cls(targets, on, off, chunk.index, chunk.index, chunk.index, chunk.tree, shown).merged()

    @classmethod
    def joined(cls, parts: list[L2Tables]) -> L2Tables:
        """Return several as one, still with duplicates."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(np.concatenate(column) for column in zip(*(part.arrays for part in parts), strict=True)))

    def merged(self) -> L2Tables:
        """Return the same with every table once, by rising offset."""
        if len(self.offsets) < 2:
            return self
        # The active state, tree -1, comes first among equals and so is the owner that is reported.
        order = np.lexsort((self.index, self.tree, self.offsets))
        offsets = self.offsets[order]
        starts = run_starts(offsets)
        return L2Tables(
            offsets[starts],
            np.add.reduceat(self.active[order], starts),
            np.add.reduceat(self.snapshots[order], starts),
            np.minimum.reduceat(self.low[order], starts),
            np.maximum.reduceat(self.high[order], starts),
            self.index[order][starts],
            self.tree[order][starts],
            np.maximum.reduceat(self.shown[order], starts, axis=0),
        )

    def part(self, chosen: slice | Mask) -> L2Tables:
        """Return some of the tables."""
        return L2Tables(*(array[chosen] for array in self.arrays))


@dataclass(frozen=True)
class Tables(L2Tables):
    """A batch of L2 tables, read: ``columns`` has a row for each.

    ``tree`` is the state that is reported as the owner: -1 the active one, else a snapshot's index. ``active`` is how
    many slots of the active L1 table name the table, ``snapshots`` how many of snapshots'.
    """

    columns: Columns

    @classmethod
    def read(cls, named: L2Tables, columns: Columns) -> Tables:
        """Return tables with their columns."""
        places = named.offsets, named.active, named.snapshots, named.low, named.high, named.index
        return cls(*places, named.tree, named.shown, columns)

    @cached_property
    def shared(self) -> Mask:
        """Which tables are named by slots with other numbers too."""
        shared: Mask = self.low != self.high
        return shared

    @property
    def cluster_bits(self) -> int:
        return self.columns.entry_format.cluster_bits

    @property
    def entries(self) -> U64:
        """The first word of every entry: ``(tables, entries)``."""
        return self.columns.entries

    @property
    def bitmaps(self) -> U64 | None:
        """The second word of extended entries, in the same shape; else None."""
        return self.columns.bitmaps

    def without(self, rows: Places) -> Tables:
        """Return the batch without some of its tables."""
        kept = np.ones(len(self), dtype=np.bool_)
        kept[rows] = False
        return Tables.read(self.part(kept), self.columns.rows(kept))

    def entry_offset(self, row: int, column: int) -> int:
        """Return the file offset of an entry."""
        return int(self.offsets[row]) + column * (8 if self.bitmaps is None else 16)

    def guest_offset(self, row: int, column: int) -> int:
        """Return the guest offset an entry maps."""
        return (int(self.index[row]) * int(self.entries.shape[1]) + column) << self.cluster_bits

    def item(self, row: int, column: int, host: int | None = None) -> Item:
        """Return an entry as an item of evidence; ``host`` is the offset concerned, where that is not what it names."""
        entry = int(self.entries[row, column])
        if host is None:
            host, _ = stored_extent(entry, self.cluster_bits)
        where, guest = self.entry_offset(row, column), self.guest_offset(row, column)
        return Item("L2", where, entry, host, guest, int(self.tree[row]))

    def guest_clusters(self, places: Places) -> U64:
        """Return the guest cluster numbers of flat places in ``entries``."""
        width = self.entries.shape[1]
        guests: U64 = self.index[places // width] * np.uint64(width) + (places % width).astype(np.uint64)
        return guests

    def where(self, mask: Mask) -> Iterator[tuple[int, int]]:
        """Yield (row, column) of the set places of a mask shaped like ``entries``."""
        rows, columns = np.nonzero(mask)
        yield from zip(rows.tolist(), columns.tolist(), strict=True)


class Subscriber(Protocol):
    """A fact that is gathered while L2 tables are walked: made before the walk, and given each batch once.

    Batches come by rising host offset, every table in one of them. ``clusters`` says where the facts about a
    host cluster have their place in an array.
    """

    def __init__(self, image: Image, clusters: IndexMap, /) -> None: ...

    def tables(self, batch: Tables) -> None:
        """Take in a batch of tables."""
        ...


class L2TableCollector:
    """Collects the L2 tables that pieces of L1 tables name; memory grows with the number of different ones."""

    def __init__(self) -> None:
        self._parts: list[L2Tables] = []
        self._rows = 0

    def add(self, named: L2Tables) -> None:
        """Take in the tables of one piece."""
        self._parts.append(named)
        self._rows += len(named)
        if self._rows > _MERGE_ROWS and len(self._parts) > 1:
            before = self._rows
            self._parts = [L2Tables.joined(self._parts).merged()]
            # What merging cannot shrink is not tried again until it has doubled.
            self._rows = 0 if len(self._parts[0]) * 2 > before else len(self._parts[0])

    def result(self) -> L2Tables:
        """Return every table once."""
        if len(self._parts) == 1:  # what one piece names is merged already
            return self._parts[0]
        return L2Tables.joined(self._parts).merged() if self._parts else L2Tables.nothing()


def walkable(image: Image, named: L2Tables) -> tuple[L2Tables, bool]:
    """Return the L2 tables to be read, and whether these are all that have content.

    Those past the end of the file hold zeros. Unaligned ones may overlap, so that few bytes could
    be many tables; when they add up to more than the file has, they are left out.
    """
    size = image.header.cluster_size
    named = named.part(named.offsets < np.uint64(image.file_size))
    unaligned = (named.offsets & np.uint64(size - 1)) != 0
    limits = image.limits._replace(work_repeats=UNALIGNED_TABLES_REPEATS, work_spare=UNALIGNED_TABLES_SPARE)
    budget = Budget("bytes of unaligned L2 tables", min(image.file_size, UNALIGNED_TABLES_FILE), limits)
    if int(unaligned.sum()) * size > budget.left:
        return named.part(~unaligned), False
    return named, True


def batches(image: Image, named: L2Tables) -> Iterator[Tables]:
    """Yield L2 tables that are :func:`walkable` in batches, reading each once."""
    header = image.header
    size = header.cluster_size
    rows = max(1, BATCH // size)
    for first in range(0, len(named), rows):
        part = named.part(slice(first, first + rows))
        yield Tables.read(part, Columns.of(table_words(image, part.offsets, size), header))
