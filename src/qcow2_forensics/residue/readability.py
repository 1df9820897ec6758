"""Follows the tables of former snapshot entries: what of each deleted snapshot's disk is still there.

More than 400 lines because the tables of one entry are followed in one pass, and each check of it needs the facts of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..census import Census
from ..census.arrays import I64, U64, Mask, distinct, merged, ranges, run_starts
from ..census.columns import Columns, big_endian, compressed_extents, table_offsets
from ..errors import LimitExceeded
from ..format.header_rules import INT64_MAX
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from ..limits import Budget
from ..reader.host_holes import host_runs
from . import live_mappings, structure_detection
from .former_clusters import HOLDS_BYTES, read_clusters
from .former_tables import Recogniser
from .restricted_source import LOST_TABLE, PUNCHED, REUSED, GuardedSource, Refusals
from .snapshot_entries import BOGUS, DeletedSnapshot, gone, l1_rank, most_plausible
from .structure_detection import Counts, Geometry

_ENTRIES = 1 << 16  # of L2 tables looked at together
_MAPPED, _KEPT = 1, 2  # a cluster of streams: by a live state, by a snapshot older than the deleted one
_ACTIVE = np.uint64(2**64 - 1)  # no snapshot's date


def examine(
    image: Image, former: Sequence[SnapshotEntry], census: Census, *, most: int | None = None, read_data: bool = True
) -> list[DeletedSnapshot]:
    """Follow the tables of former entries and return how much of each disk is still readable.

    Of more than ``most`` entries those whose L1 tables lead somewhere are followed; the others are returned unfollowed.
    Without ``read_data`` the data clusters are not read: those that hold zeros count as intact.
    An L1 table counts as gone where a later former snapshot had its own in the same place. Raises
    :class:`LimitExceeded` where the L1 tables of the live states overlap so often that they are not read.
    """
    examiner = _Examiner(image, census, read_data)
    l1_tables = _L1Tables.of(image, former)
    found = []
    chosen = former if most is None else most_plausible(image, former, most)
    followed = {id(entry) for entry in chosen}
    for entry in former:
        if id(entry) not in followed:
            found.append(DeletedSnapshot(entry, l1_intact=False, followed=False))
            continue
        if l1_tables.overwrote(entry):
            found.append(DeletedSnapshot(entry, l1_intact=False))
            continue
        try:
            found.append(_Examination(examiner, entry).result())
        except LimitExceeded:
            found.append(DeletedSnapshot(entry, l1_intact=False, followed=False))
    return found


def guard(image: Image, entry: SnapshotEntry, census: Census, former: Sequence[SnapshotEntry]) -> None:
    """Make ``image`` refuse what a deleted snapshot no longer owns.

    After this the image answers for this one state only: it is for a disk of its own. Raises
    :class:`FormatError` when the L1 table is gone, also to a later one of the ``former`` snapshots.
    """
    # What the header names is read before the guard is in place, in case a crafted entry maps it.
    _ = image.problems, image.backing_name, image.crypto_header
    refusals = Refusals(image.cluster_size)
    examination = _Examination(_Examiner(image, census, False), entry, refusals)
    newer: list[tuple[Counts, int]] = []
    examination.newer = newer
    if _L1Tables.of(image, former).overwrote(entry) or not examination.result().l1_intact:
        raise gone(entry)
    image.source = GuardedSource(image.source, refusals, _joined(newer))


class _L1Tables(NamedTuple):
    """Where the L1 tables of former snapshots were, and their dates; those that hold something else now are left out."""

    starts: U64
    stops: U64
    dates: U64

    @classmethod
    def of(cls, image: Image, former: Sequence[SnapshotEntry]) -> _L1Tables:
        entries = [entry for entry in former if len(former) == 1 or l1_rank(image, entry) != BOGUS]
        starts = np.array([min(entry.l1_table_offset, INT64_MAX) for entry in entries], np.uint64)
        lengths = np.array([entry.l1_size * 8 for entry in entries], np.uint64)
        return cls(starts, starts + lengths, np.array([_date(entry) for entry in entries], np.uint64))

    def overwrote(self, entry: SnapshotEntry) -> bool:
        """Whether a later snapshot's L1 table was written where this one's was, after it had been freed."""
        start = min(entry.l1_table_offset, INT64_MAX)
        overlap = (self.starts < np.uint64(start + entry.l1_size * 8)) & (self.stops > np.uint64(start))
        return bool((overlap & (self.dates > _date(entry))).any())


class _Live(NamedTuple):
    """The L2 tables of states that are not deleted, each once, rising by L1 slot."""

    slots: Counts
    offsets: U64
    dates: U64  # of the oldest snapshot that holds it; _ACTIVE for none

    def at(self, places: Counts) -> _Live:
        """Return some of the tables."""
        return _Live(self.slots[places], self.offsets[places], self.dates[places])

    def of(self, slots: Counts) -> tuple[Counts, Counts]:
        """Return which of some slots, rising, and which table, for every table that is in one of them."""
        return ranges(np.searchsorted(self.slots, slots), np.searchsorted(self.slots, slots, "right"))


class _Examiner:
    """What all former entries of an image share; every free cluster is looked at once."""

    def __init__(self, image: Image, census: Census, read_data: bool) -> None:
        self.image = image
        self.census = census
        self.geometry = Geometry.of(image)
        self.recogniser = Recogniser(image, census)
        self.l1_bytes = Budget("bytes of the L1 tables of deleted snapshots", image.file_size, image.limits)
        self.l2_bytes = Budget("bytes of the L2 tables of deleted snapshots", image.file_size, image.limits)
        self.live = self._live()
        self._read_data = read_data

    def _live(self) -> _Live:
        """Return the tables of live states, as many as may be read; what only the others hold counts as not shared."""
        slots, offsets, dates = [np.empty(0, np.intp)], [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
        room = self.l2_bytes.left // self.image.cluster_size
        for state, table in live_mappings.l1_tables(self.image):
            whole = (table % np.uint64(self.image.cluster_size) == 0) & (table < np.uint64(self.image.file_size))
            used = np.flatnonzero((table != 0) & whole)[:room]
            room -= len(used)
            slots.append(used)
            offsets.append(table[used])
            dates.append(np.full(len(used), _ACTIVE if state.snapshot is None else _date(state.snapshot)))
        found = _Live(np.concatenate(slots), np.concatenate(offsets), np.concatenate(dates))
        found = found.at(np.lexsort((found.dates, found.offsets, found.slots)))
        return found.at(run_starts(found.slots, found.offsets))

    @cached_property
    def longest_l1(self) -> int:
        """The entries of the longest L1 table that is not deleted."""
        return max([self.image.header.l1_size, *(entry.l1_size for entry in self.image.snapshots)])

    def numbers(self, offsets: U64) -> Counts:
        """Return the clusters at host offsets, the last of the file for what follows it."""
        last = np.uint64(self.census.clusters - 1)
        numbers: Counts = np.minimum(offsets >> np.uint64(self.geometry.cluster_bits), last).astype(np.intp)
        return numbers

    def l2_tables(self, offsets: U64) -> U64:
        """Return the words of the L2 tables at some host offsets, a row each."""
        data = read_clusters(self.image, self.numbers(offsets))
        return big_endian(data).reshape(-1, self.image.cluster_size // 8)

    def has_hole(self, offset: int, length: int) -> bool:
        """Whether the file system stores nothing for part of the range; False where it cannot be asked."""
        return any(run.is_hole for run in host_runs(self.image.source, offset, length))

    def punched(self, numbers: Counts) -> Mask:
        """Return which host clusters the file system stores nothing for."""
        starts, stops = self._holes
        offsets = numbers * self.image.cluster_size
        places = np.searchsorted(starts, offsets, "right") - 1
        ends = np.minimum(offsets + self.image.cluster_size, self.image.file_size)
        punched: Mask = (places >= 0) & (stops[places] >= ends)
        return punched

    @cached_property
    def _holes(self) -> tuple[I64, I64]:
        holes = [
            (run.offset, run.offset + run.length)
            for run in host_runs(self.image.source, 0, self.image.file_size)
            if run.is_hole
        ]
        starts, stops = np.array(holes or [(0, 0)], np.int64).T
        return starts, stops

    def are_zeros(self, numbers: Counts) -> Mask:
        """Return which free host clusters hold zeros; none where data is not to be read."""
        if not self._read_data:
            return np.zeros(len(numbers), np.bool_)
        zeros: Mask = (self.recogniser.targets.look(numbers) & HOLDS_BYTES) == 0
        return zeros


class _Examination:
    """Follows the tables of one former entry."""

    def __init__(self, examiner: _Examiner, entry: SnapshotEntry, refusals: Refusals | None = None) -> None:
        self._examiner = examiner
        self._image = examiner.image
        self._entry = entry
        self._refusals = refusals
        self._cluster_size = self._image.cluster_size
        self._span = self._image.header.l2_span
        size = entry.disk_size if entry.disk_size is not None else self._image.disk_size
        self._size = min(size, INT64_MAX)
        self._waiting: list[Counts] = []  # L1 slots whose tables hold streams that no live state maps
        counted = ("intact", "shared", "zeroed", "punched", "reused", "compressed", "lost_tables")
        self._counts = dict.fromkeys(counted, 0)
        self._unreadable = 0
        self._rewritable = 0
        self.newer: list[tuple[Counts, int]] | None = None  # where that is: guest offsets, and bytes at each

    def result(self) -> DeletedSnapshot:
        """Return what became of the entry; raises :class:`LimitExceeded` where its tables are more than may be read."""
        l1_table = self._l1_table()
        if l1_table is None:
            return DeletedSnapshot(self._entry, l1_intact=False)
        slots = np.flatnonzero(l1_table)
        rows, _ = self._examiner.live.of(slots)
        self._examiner.l2_bytes.spend((len(slots) + len(rows)) * self._cluster_size)
        step = max(1, _ENTRIES // self._image.header.l2_entries)
        for at in range(0, len(slots), step):
            self._tables(slots[at : at + step], l1_table[slots[at : at + step]])
        if self._entry.disk_size is not None:  # what its L1 table does not cover of its disk cannot be read
            self._unreadable += max(0, self._size - self._entry.l1_size * self._span)
        waiting = np.concatenate(self._waiting)
        for at in range(0, len(waiting), step):
            self._streams_left(waiting[at : at + step], l1_table[waiting[at : at + step]])
        return DeletedSnapshot(
            self._entry,
            l1_intact=True,
            followed=True,
            disk_bytes=self._size,
            l2_tables=len(slots),
            unreadable_bytes=self._unreadable,
            rewritable_bytes=self._rewritable,
            **self._counts,
        )

    def _l1_table(self) -> U64 | None:
        """Return the host offsets in the former L1 table, None when it is not there any more."""
        examiner, first, length = self._examiner, self._entry.l1_table_offset, self._entry.l1_size * 8
        if first + length > self._image.file_size or length > self._image.limits.l1_bytes:
            return None
        stop = -(-(first + length) // self._cluster_size)
        if examiner.census.is_claimed(np.arange(first // self._cluster_size, stop)).any():
            return None
        examiner.l1_bytes.spend(length)
        data = self._image.read(first, length)
        # Zeros do not show whether the disk was empty or the table wiped: not every file system keeps
        # a discarded table as a hole, and no copy has to.
        words = big_endian(data)
        sound = structure_detection.l1_rows(words.reshape(1, -1), examiner.geometry).tables[0]
        return table_offsets(words, self._image.header) if sound and not examiner.has_hole(first, length) else None

    def _tables(self, slots: Counts, offsets: U64) -> None:
        """Count what some L2 tables hold, and those that are gone."""
        examiner, live = self._examiner, self._examiner.live
        rows, places = live.of(slots)
        same = live.offsets[places] == offsets[rows]
        shared, unchanged = np.zeros((2, len(slots)), np.bool_)
        shared[rows[same]] = True
        unchanged[rows[same]] = live.dates[places[same]] < _date(self._entry)
        words = examiner.l2_tables(offsets)
        sound = structure_detection.l2_rows(words, examiner.geometry).tables
        sound &= offsets + np.uint64(self._cluster_size) <= np.uint64(self._image.file_size)
        own = np.flatnonzero(sound & ~shared)
        sound[own] = ~examiner.census.is_claimed(examiner.numbers(offsets[own])) & ~self._are_l1_tables(words[own])
        self._counts["lost_tables"] += int((~sound).sum())
        self._refuse(LOST_TABLE, offsets[~sound], slots[~sound] * self._span, self._span)

        slots, columns = slots[sound], self._columns(words[sound])
        mapped, kept = self._mapped(slots, columns.named)
        rewritten = (shared & ~unchanged)[sound]  # the active state wrote its own entries into this very table
        self._may_be_newer(slots[rewritten] * self._span, self._span)
        guests = self._guests(slots)
        self._packed(slots, columns, mapped, kept)
        hosts = columns.data_hosts
        used = hosts != 0
        mapped |= self._image.header.external_data
        self._may_be_newer(guests[(used | columns.compressed) & mapped & ~kept & ~rewritten[:, None]])
        self._data(guests[used], hosts[used], mapped[used])

    def _columns(self, words: U64) -> Columns:
        return Columns.of(words, self._image.header)

    def _are_l1_tables(self, words: U64) -> Mask:
        """Return which tables a later snapshot's L1 table was written over, whose form is that of L2 entries."""
        if self._image.header.external_data:  # where what an L2 table names is in that file
            return np.zeros(len(words), np.bool_)
        return self._examiner.recogniser.l1_tables(words[:, : self._examiner.longest_l1])

    def _mapped(self, slots: Counts, named: U64) -> tuple[Mask, Mask]:
        """Return which entries a live state has too, and which of them a snapshot older than this one.

        QEMU writes in place what only the active state holds, and never what a snapshot does.
        """
        mapped, kept = np.zeros((2, *named.shape), np.bool_)
        live = self._examiner.live
        rows, places = live.of(slots)
        older = live.dates < _date(self._entry)
        step = max(1, _ENTRIES // named.shape[1])
        for at in range(0, len(rows), step):
            some, others = rows[at : at + step], places[at : at + step]
            theirs = self._columns(self._examiner.l2_tables(live.offsets[others])).named
            same = named[some] == theirs
            firsts = run_starts(some)
            mapped[some[firsts]] |= np.logical_or.reduceat(same, firsts)
            kept[some[firsts]] |= np.logical_or.reduceat(same & older[others][:, None], firsts)
        return mapped, kept

    def _data(self, guests: Counts, hosts: U64, mapped: Mask) -> None:
        """Count data clusters: those still mapped by a live state, reused ones, and free ones."""
        examiner, numbers = self._examiner, self._examiner.numbers(hosts)
        reused = ~mapped & examiner.census.is_claimed(numbers)
        free = np.flatnonzero(~mapped & ~reused)
        holes = examiner.punched(numbers[free])
        zeros = int(examiner.are_zeros(numbers[free[~holes]]).sum())
        self._counts["shared"] += int(mapped.sum())
        self._counts["reused"] += int(reused.sum())
        self._counts["zeroed"] += zeros + int(holes.sum())
        self._counts["punched"] += int(holes.sum())
        self._counts["intact"] += int((~holes).sum()) - zeros
        self._refuse(REUSED, hosts[reused], guests[reused])
        self._refuse(PUNCHED, hosts[free[holes]], guests[free[holes]])

    def _packed(self, slots: Counts, columns: Columns, mapped: Mask, kept: Mask) -> None:
        """Count the compressed clusters that a live state maps too; the others are counted when all such are known."""
        packed = columns.compressed
        self._counts["compressed"] += int((packed & mapped).sum())
        for which, mark in ((packed & mapped, _MAPPED), (packed & kept, _KEPT)):
            if which.any():
                for numbers in self._touched(columns.entries[which]):
                    self._held[self._indices(numbers)] |= np.uint8(mark)
        self._waiting.append(slots[(packed & ~mapped).any(axis=1)])

    def _touched(self, entries: U64) -> list[Counts]:
        """Return the host clusters that each compressed cluster lies in: the first, one between, the last."""
        offsets, lengths = compressed_extents(entries, self._image.header)
        first, last = (self._examiner.numbers(ends) for ends in (offsets, offsets + lengths - np.uint64(1)))
        return [first, (first + last) // 2, last]

    @cached_property
    def _held(self) -> npt.NDArray[np.uint8]:
        """Which host clusters, by their indices in the census, hold streams that a live state maps too."""
        return np.zeros(self._examiner.census.index_map.length, np.uint8)

    def _indices(self, numbers: Counts) -> U64:
        return self._examiner.census.index_map.of(numbers.astype(np.uint64))

    def _streams_left(self, slots: Counts, offsets: U64) -> None:
        """Count the compressed clusters no live state maps: they are whole only in host clusters that were never freed.

        QEMU writes streams one after the other, and never over one while its host cluster holds another that is in
        use, such as one that the entry and a live state share. Yet the active state may have freed all of them, and
        have written one of the same length there since.
        """
        columns = self._columns(self._examiner.l2_tables(offsets))
        left = columns.compressed & ~self._mapped(slots, columns.named)[0]
        guests, entries = self._guests(slots)[left], columns.entries[left]
        lost, newer, holes = np.zeros((3, len(entries)), np.bool_)
        for numbers in self._touched(entries):
            claimed, held = self._examiner.census.is_claimed(numbers), self._held[self._indices(numbers)]
            newer |= claimed & (held & _KEPT == 0)
            reused, punched = claimed & (held == 0), ~claimed & self._examiner.punched(numbers)
            for reason, which in ((REUSED, reused), (PUNCHED, punched)):
                hosts = distinct(numbers[which]).astype(np.uint64) << np.uint64(self._image.header.cluster_bits)
                self._refuse(reason, hosts, np.empty(0, np.intp))
            lost |= reused
            holes |= punched
        holes &= ~lost
        self._counts["reused"] += int(lost.sum())
        self._counts["zeroed"] += int(holes.sum())
        self._counts["punched"] += int(holes.sum())
        lost |= holes
        self._counts["compressed"] += int((~lost).sum())
        self._unreadable += self._bytes(guests[lost])
        self._may_be_newer(guests[newer & ~lost])

    def _may_be_newer(self, guests: Counts, length: int | None = None) -> None:
        """Count guest bytes that are read and may have been written since the snapshot."""
        self._rewritable += self._bytes(guests, length)
        if self.newer is not None and len(guests):
            self.newer.append((guests, length or self._cluster_size))

    def _guests(self, slots: Counts) -> Counts:
        """Return the guest offsets that the tables in some L1 slots map, a row each."""
        guests: Counts = slots[:, None] * self._span + np.arange(self._image.header.l2_entries) * self._cluster_size
        return guests

    def _refuse(self, reason: int, hosts: U64, guests: Counts, length: int | None = None) -> None:
        """Count the guest bytes of some host clusters as unreadable, and have reads of these clusters refused."""
        self._unreadable += self._bytes(guests, length)
        if self._refusals is not None:
            self._refusals.add_clusters(reason, hosts)

    def _bytes(self, guests: Counts, length: int | None = None) -> int:
        """Return how many bytes of the disk are at guest offsets: a cluster at each, unless ``length`` says otherwise."""
        return int(np.clip(self._size - guests, 0, length or self._cluster_size).sum())


def _joined(clusters: Sequence[tuple[Counts, int]]) -> tuple[tuple[int, int], ...]:
    """Return (offset, length) of guest ranges, rising, neighbours as one."""
    if not clusters:
        return ()
    starts = np.concatenate([guests for guests, _ in clusters]).astype(np.uint64)
    stops = np.concatenate([guests + length for guests, length in clusters]).astype(np.uint64)
    starts, stops = merged(starts, stops)
    return tuple(zip(starts.tolist(), (stops - starts).tolist(), strict=True))


def _date(entry: SnapshotEntry) -> np.uint64:
    return np.uint64(entry.date_sec << 32 | entry.date_nsec)
