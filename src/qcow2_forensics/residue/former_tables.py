"""Recognises clusters that are former tables, and what is left of the clusters they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..census import Census, Owner
from ..census.arrays import U64, Mask
from ..census.columns import has_copied
from ..format.bitmap_directory import BitmapEntry
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from ..limits import FORMER_ENTRIES, FORMER_L1_TARGETS, FORMER_TABLE_TARGETS
from . import structure_detection
from .former_clusters import HOLDS_BYTES, IS_L2, IS_REFCOUNTS, Targets
from .structure_detection import Bytes, Counts, Geometry

# What a cluster may look like, rising: the last of several that apply is reported.
LOOKS = ("data", "refcounts", "l2", "l1", "refcount-table", "bitmap-directory", "snapshot-table")
_REFCOUNTS, _L2, _L1, _REFCOUNT_TABLE, _BITMAPS, _SNAPSHOTS = range(1, len(LOOKS))

_LEVEL2 = Owner.L2 | Owner.SNAPSHOT_L2
_TABLES = _LEVEL2 | Owner.REFCOUNT_BLOCK


class ClusterRows(NamedTuple):
    """Clusters of a file that are not all zeros, one to a row; one that the file cuts off is filled with zeros."""

    offsets: Counts
    data: Bytes
    kinds: Counts  # why nothing refers to each, among those of pieces of residue


class Looks(NamedTuple):
    """What clusters look like: an array for each property, an element for each cluster."""

    looks: npt.NDArray[np.int8]  # among LOOKS
    entries: Counts  # of a table
    intact: Counts  # of its first targets: nothing live uses them and they hold bytes
    zero_only: Mask  # an L2 table of zero flags alone

    @classmethod
    def data(cls, count: int) -> Looks:
        """Return the looks of clusters that are not tables."""
        zeros = np.zeros(count, np.intp)
        return cls(zeros.astype(np.int8), zeros, zeros.copy(), zeros.astype(np.bool_))

    def of(self, rows: Counts | Mask) -> Looks:
        """Return the looks of some of the clusters."""
        return Looks._make(column[rows] for column in self)


class Seen(NamedTuple):
    """What clusters look like, and by row the snapshot and bitmap entries they hold.

    ``left_out`` counts the places that may hold one and were not looked at.
    """

    looks: Looks
    snapshots: Mapping[int, list[SnapshotEntry]]
    bitmaps: Mapping[int, list[BitmapEntry]]
    left_out: int


class FormerTables:
    """The clusters of a file that nothing refers to and that look like tables, by rising offset."""

    def __init__(self, offsets: Counts, looks: Looks) -> None:
        self.offsets = offsets
        self.looks = looks

    @classmethod
    def joined(cls, parts: Sequence[FormerTables]) -> FormerTables:
        """Join several, whose offsets rise from one to the next."""
        offsets = np.concatenate([np.empty(0, np.intp), *(part.offsets for part in parts)])
        columns = zip(Looks.data(0), *(part.looks for part in parts), strict=True)
        return cls(offsets, Looks._make(map(np.concatenate, columns)))

    def at(self, offsets: Counts) -> Looks:
        """Return what the clusters at some offsets look like."""
        found = Looks.data(len(offsets))
        places = np.searchsorted(self.offsets, offsets)
        rows = np.flatnonzero(places < len(self.offsets))
        rows = rows[self.offsets[places[rows]] == offsets[rows]]
        known = self.looks.of(places[rows])
        found.looks[rows], found.entries[rows] = known.looks, known.entries
        found.intact[rows], found.zero_only[rows] = known.intact, known.zero_only
        return found

    def l1_tables(self) -> Counts:
        """Return the offsets of the clusters that look like L1 tables."""
        found: Counts = self.offsets[self.looks.looks == _L1]
        return found


class Recogniser:
    """Recognises former tables of one image."""

    def __init__(self, image: Image, census: Census) -> None:
        self._image = image
        self._census = census
        self._geometry = Geometry.of(image)
        self.targets = Targets(image)
        self._entries = FORMER_ENTRIES

    def look(self, clusters: ClusterRows) -> Seen:
        """Return what clusters look like."""
        looks, behind = Looks.data(len(clusters.offsets)), self._behind(clusters)
        width = clusters.data.shape[1] // 8
        longer = np.empty((len(behind), width + behind.shape[1] // 8), np.uint64)
        longer[:, :width], longer[:, width:] = clusters.data.view(">u8"), behind.view(">u8")
        words = longer[:, :width]
        looks.looks[structure_detection.refcount_rows(clusters.data, self._image.header.refcount_order)] = _REFCOUNTS
        rows, found = structure_detection.judged(structure_detection.l2_rows, words, self._geometry)
        self._note(looks, rows, found, found.tables & found.telling, np.full(len(rows), _L2))
        if self._geometry.external_data:
            looks.intact[:] = 0  # what they name is in another file
        rows, found = structure_detection.judged(structure_detection.l1_rows, words, self._geometry)
        rows, found = rows[found.tables], found.only(found.tables)
        level1 = self._level1(words[rows], found)
        self._note(looks, rows, found, level1 != 0, level1)
        return self._with_entries(looks, clusters, behind, longer)

    def l1_tables(self, words: U64) -> Mask:
        """Return which rows are L1 tables: the clusters they name look like L2 tables."""
        found = structure_detection.l1_rows(words, self._geometry)
        rows = np.flatnonzero(found.tables)
        which = np.zeros(len(words), np.bool_)
        which[rows[self._level1(words[rows], found.only(found.tables)) == _L1]] = True
        return which

    def _note(self, looks: Looks, rows: Counts, found: structure_detection.Rows, which: Mask, kinds: Counts) -> None:
        rows, found = rows[which], found.only(which)
        looks.looks[rows] = kinds[which]
        looks.entries[rows] = found.entries
        looks.zero_only[rows] = found.zero_plain == found.entries
        looks.intact[rows] = self._intact(found.targets)

    def _level1(self, words: U64, found: structure_detection.Rows) -> Counts:
        """Return the looks of rows that hold sound L1 entries only, judged by the clusters these name; 0 for no table."""
        looks = np.zeros(len(words), np.intp)
        if not len(words):
            return looks
        places = np.flatnonzero(found.targets)
        places = places[_nth(places // words.shape[1]) < FORMER_L1_TARGETS]
        numbers = self._numbers(found.targets.reshape(-1)[places])
        seen, owners = self.targets.look(numbers), self._census.owners(numbers)
        firsts = np.flatnonzero(_nth(places // words.shape[1]) == 0)  # each row has one
        looks[np.logical_and.reduceat((seen & IS_L2) != 0, firsts)] = _L1
        # A refcount table has no flags. A target that is something else by now says nothing.
        flagged = has_copied(words.reshape(-1)[places])
        counts = (seen & IS_REFCOUNTS) != 0
        kept = ((seen & HOLDS_BYTES) != 0) & ((owners & ~np.uint16(_TABLES)) == 0)
        blocks = counts & kept & ((owners & np.uint16(_LEVEL2)) == 0)
        counted = np.logical_or.reduceat(blocks, firsts) & ~np.logical_or.reduceat(kept & ~blocks, firsts)
        counted &= ~np.logical_or.reduceat(flagged, firsts)
        looks[counted | (counts & ~flagged)[firsts]] = _REFCOUNT_TABLE
        return looks

    def _intact(self, targets: U64) -> Counts:
        """Return how many of the first targets of each row still hold bytes and are used by nothing live."""
        places = np.flatnonzero(targets)
        rows, numbers = places // targets.shape[1], self._numbers(targets.reshape(-1)[places])
        inside = numbers < self._census.clusters
        rows, numbers = rows[inside], numbers[inside]
        free = ~self._census.is_claimed(numbers)
        rows, numbers = rows[free], numbers[free]
        sample = _nth(rows) < FORMER_TABLE_TARGETS
        holds = (self.targets.look(numbers[sample]) & HOLDS_BYTES) != 0
        return np.bincount(rows[sample][holds], minlength=len(targets))

    def _numbers(self, offsets: U64) -> Counts:
        return (offsets >> np.uint64(self._geometry.cluster_bits)).astype(np.intp)

    def _with_entries(self, looks: Looks, clusters: ClusterRows, behind: Bytes, words: U64) -> Seen:
        """Add the clusters that hold snapshot or bitmap entries; ``words`` are those of each cluster and of the bytes after it."""
        *places, left_out = structure_detection.entry_places(words, self._geometry, clusters.data.shape[1] // 8)
        snapshots: dict[int, list[SnapshotEntry]] = {}
        bitmaps: dict[int, list[BitmapEntry]] = {}
        for row in sorted({*places[0], *places[1]}):
            base = int(clusters.offsets[row])
            here = [found.get(row, [])[: max(1, self._entries)] for found in places]
            self._entries -= len(here[0]) + len(here[1])
            left_out += sum(len(found.get(row, [])) for found in places) - len(here[0]) - len(here[1])
            data = (clusters.data[row].tobytes() + behind[row].tobytes())[: self._image.file_size - base]
            snapshots[row] = structure_detection.snapshot_entries_at(data, here[0], base, self._geometry)
            bitmaps[row] = structure_detection.bitmap_entries_at(data, here[1], base, self._geometry)
            if snapshots[row] or bitmaps[row]:
                looks.looks[row] = _SNAPSHOTS if snapshots[row] else _BITMAPS
                looks.entries[row] = len(snapshots[row]) + len(bitmaps[row])
                looks.intact[row], looks.zero_only[row] = 0, False
        return Seen(looks, snapshots, bitmaps, left_out)

    def _behind(self, clusters: ClusterRows) -> Bytes:
        """Return the first bytes after each cluster; zeros where the next cluster is not one of these."""
        size = self._geometry.cluster_size
        behind = np.zeros((len(clusters.offsets), structure_detection.BEHIND), np.uint8)
        joined = np.flatnonzero(np.diff(clusters.offsets) == size)
        behind[joined] = clusters.data[joined + 1, : structure_detection.BEHIND]
        last = int(clusters.offsets[-1]) + size
        if last < self._image.file_size and not self._census.owner(last):
            data = self._image.read(last, structure_detection.BEHIND)
            behind[-1, : len(data)] = np.frombuffer(data, np.uint8)
        return behind


def _nth(rows: Counts) -> Counts:
    """Return, for each of some rising numbers, how many equal ones come before it."""
    return np.arange(len(rows)) - np.searchsorted(rows, rows)
