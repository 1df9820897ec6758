"""Says which of many clusters are former tables, and what is left of what they name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..census import Census
from ..census.columns import big_endian
from ..format.bitmap_directory import BitmapEntry
from ..format.entries import COPIED
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from . import structure_detection
from .former_clusters import HOLDS_BYTES, IS_L2, IS_REFCOUNTS, Targets
from .structure_detection import Bytes, Counts, Geometry, Mask, Words

# What a cluster may look like, rising: the last of several that apply is told.
LOOKS = ("data", "refcounts", "l2", "l1", "refcount-table", "bitmap-directory", "snapshot-table")
_REFCOUNTS, _L2, _L1, _REFCOUNT_TABLE, _BITMAPS, _SNAPSHOTS = range(1, len(LOOKS))

_TARGETS = 64  # of a former table, read to see whether they still hold bytes
_L1_TARGETS = 8  # of what may be an L1 table, read to see whether they are L2 tables
_ENTRIES = 65_536  # places of one file looked at for snapshot or bitmap entries, as many as QEMU accepts; then one of each cluster


class Clusters(NamedTuple):
    """Clusters of a file, a row each; what is missing of a cut one is zeros."""

    offsets: Counts
    data: Bytes
    words: Words  # the same bytes


class Seen(NamedTuple):
    """What each of some clusters looks like."""

    looks: npt.NDArray[np.int8]  # among LOOKS
    entries: Counts  # of a table
    intact: Counts  # of its first targets: nothing live uses them and they hold bytes
    zero_only: Mask  # an L2 table of zero flags alone
    snapshots: Mapping[int, list[SnapshotEntry]]
    bitmaps: Mapping[int, list[BitmapEntry]]


class Recogniser:
    """Knows the tables of one image."""

    def __init__(self, image: Image, census: Census) -> None:
        self._image = image
        self._census = census
        self._geometry = Geometry.of(image)
        self.targets = Targets(image)
        self._entries = _ENTRIES

    def look(self, clusters: Clusters) -> Seen:
        """Return what clusters look like."""
        count, words = len(clusters.offsets), clusters.words
        zeros = np.zeros(count, np.intp)
        seen = Seen(np.zeros(count, np.int8), zeros, zeros.copy(), np.zeros(count, np.bool_), {}, {})
        seen.looks[structure_detection.refcount_rows(clusters.data, self._image.header.refcount_order)] = _REFCOUNTS
        rows = structure_detection.likely(structure_detection.l2_rows, words, self._geometry)
        found = structure_detection.l2_rows(words[rows], self._geometry)
        self._note(seen, rows, found, found.tables & found.telling, np.full(len(rows), _L2))
        if self._geometry.external_data:
            seen.intact[:] = 0  # what they name is in another file
        rows = structure_detection.likely(structure_detection.l1_rows, words, self._geometry)
        found = structure_detection.l1_rows(words[rows], self._geometry)
        rows, found = rows[found.tables], found.only(found.tables)
        looks = self._level1(words[rows], found)
        self._note(seen, rows, found, looks != 0, looks)
        return self._with_entries(seen, clusters)

    def l1_tables(self, words: Words) -> Mask:
        """Return which rows are L1 tables: the clusters they name look like L2 tables."""
        found = structure_detection.l1_rows(words, self._geometry)
        rows = np.flatnonzero(found.tables)
        which = np.zeros(len(words), np.bool_)
        which[rows[self._level1(words[rows], found.only(found.tables)) == _L1]] = True
        return which

    def _note(self, seen: Seen, rows: Counts, found: structure_detection.Rows, which: Mask, looks: Counts) -> None:
        rows, found = rows[which], found.only(which)
        seen.looks[rows] = looks[which]
        seen.entries[rows] = found.entries
        seen.zero_only[rows] = found.zero_plain == found.entries
        seen.intact[rows] = self._intact(found.targets)

    def _level1(self, words: Words, found: structure_detection.Rows) -> Counts:
        """Return what rows that hold only sound L1 entries look like, judged by what these name; 0 for nothing."""
        looks = np.zeros(len(words), np.intp)
        if not len(words):
            return looks
        places = np.flatnonzero(found.targets)
        places = places[_nth(places // words.shape[1]) < _L1_TARGETS]
        seen = self.targets.look(self._numbers(found.targets.reshape(-1)[places]))
        firsts = np.flatnonzero(_nth(places // words.shape[1]) == 0)  # each row has one
        looks[np.logical_and.reduceat((seen & IS_L2) != 0, firsts)] = _L1
        flagged = (words.reshape(-1)[places[firsts]] & np.uint64(COPIED)) != 0
        looks[~flagged & ((seen[firsts] & IS_REFCOUNTS) != 0)] = _REFCOUNT_TABLE  # which has no flags
        return looks

    def _intact(self, targets: Words) -> Counts:
        """Return how many targets nothing live uses and that still hold bytes; a sample's worth of each row."""
        places = np.flatnonzero(targets)
        rows, numbers = places // targets.shape[1], self._numbers(targets.reshape(-1)[places])
        inside = numbers < self._census.clusters
        rows, numbers = rows[inside], numbers[inside]
        free = ~self._census.is_claimed(numbers)
        rows, numbers = rows[free], numbers[free]
        sample = _nth(rows) < _TARGETS
        holds = (self.targets.look(numbers[sample]) & HOLDS_BYTES) != 0
        return np.bincount(rows[sample][holds], minlength=len(targets))

    def _numbers(self, offsets: Words) -> Counts:
        return (offsets >> np.uint64(self._geometry.cluster_bits)).astype(np.intp)

    def _with_entries(self, seen: Seen, clusters: Clusters) -> Seen:
        behind = self._behind(clusters)
        words = np.concatenate((clusters.words, big_endian(behind.tobytes()).reshape(len(behind), -1)), axis=1)
        places = structure_detection.entry_places(words, self._geometry, clusters.words.shape[1])
        snapshots: dict[int, list[SnapshotEntry]] = {}
        bitmaps: dict[int, list[BitmapEntry]] = {}
        for row in sorted({*places[0], *places[1]}):
            base = int(clusters.offsets[row])
            here = [found.get(row, [])[: max(1, self._entries)] for found in places]
            self._entries -= len(here[0]) + len(here[1])
            data = (clusters.data[row].tobytes() + behind[row].tobytes())[: self._image.file_size - base]
            snapshots[row] = structure_detection.snapshot_entries_at(data, here[0], base, self._geometry)
            bitmaps[row] = structure_detection.bitmap_entries_at(data, here[1], base, self._geometry)
            if snapshots[row] or bitmaps[row]:
                seen.looks[row] = _SNAPSHOTS if snapshots[row] else _BITMAPS
                seen.entries[row] = len(snapshots[row]) + len(bitmaps[row])
                seen.intact[row], seen.zero_only[row] = 0, False
        return seen._replace(snapshots=snapshots, bitmaps=bitmaps)

    def _behind(self, clusters: Clusters) -> Bytes:
        """Return the first bytes behind each cluster, zeros where something else stands there."""
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
    """Return how many of the same number stand before each of some rising ones."""
    return np.arange(len(rows)) - np.searchsorted(rows, rows)
