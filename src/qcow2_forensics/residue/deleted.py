"""Deleted snapshots: entries no table lists any more, and how much of their disk can still be read.

Deleting a snapshot rewrites the snapshot table elsewhere and frees the L1 table, the L2 tables and
the clusters only that snapshot used. Until they are reused they stay as they were, so an entry
found in free space can be opened like a live one::

    former table entry -> former L1 -> former L2 tables -> freed clusters (intact until reused)
                                                       -> clusters live states still share
                                                       -> clusters reused since: refused
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..census import Census
from ..census.tally import descriptors
from ..errors import FormatError, SnapshotNotFound, printable
from ..header_rules import INT64_MAX
from ..host_holes import host_runs
from ..image import Image
from ..structures import OFFSET_MASK, SnapshotEntry
from . import tables, trees
from .guard import GuardedSource
from .tables import Geometry

Flags = npt.NDArray[np.bool_]

_LOST_TABLE = "this L2 table of the deleted snapshot is gone: its cluster was reused or punched"
_REUSED = "this cluster of the deleted snapshot has been reused by something else"
_PUNCHED = "this cluster of the deleted snapshot is a hole in the file now"


@dataclass(frozen=True, slots=True)
class DeletedSnapshot:
    """A former snapshot table entry and what became of the clusters it names.

    Counts are clusters: ``intact`` ones nothing else uses and that hold bytes, ``shared`` ones a
    live state maps at the same guest offset, ``zeroed`` ones that are free and all zeros,
    ``reused`` ones that belong to something else now, ``compressed`` ones that do not.
    ``lost_tables`` counts L2 tables that are gone, of ``l2_tables``. ``forbidden`` lists (offset,
    length, reason) that must not be read, ``streams`` those of compressed clusters.

    ``rewritable_bytes`` are read, yet may be newer than the snapshot: no snapshot older than it
    holds their L2 table or cluster too, so that the active state could write there in place.
    """

    entry: SnapshotEntry
    l1_intact: bool
    l2_tables: int = 0
    lost_tables: int = 0
    intact: int = 0
    shared: int = 0
    zeroed: int = 0
    reused: int = 0
    compressed: int = 0
    unreadable_bytes: int = 0
    rewritable_bytes: int = 0
    forbidden: tuple[tuple[int, int, str], ...] = field(default=(), repr=False)
    streams: tuple[tuple[int, int, str], ...] = field(default=(), repr=False)

    @property
    def size(self) -> int | None:
        """Bytes of its disk; None when the entry does not say."""
        return self.entry.disk_size

    @property
    def readable(self) -> float:
        """The fraction of its guest bytes that can be read, 0 when its L1 table is gone."""
        total = self.entry.disk_size or 0
        if not self.l1_intact:
            return 0.0
        return max(0.0, 1 - self.unreadable_bytes / total) if total else 1.0

    @property
    def rewritable(self) -> float:
        """The fraction of its guest bytes that can be read and may have been written in place since."""
        total = self.entry.disk_size or 0
        return min(1.0, self.rewritable_bytes / total) if total else 0.0

    @property
    def told(self) -> str:
        """How much can be read, and how much of that may be newer, in words."""
        newer = f", {self.rewritable:.0%} perhaps newer" if self.rewritable_bytes else ""
        return f"{self.readable:.0%} readable{newer}"

    @property
    def complete(self) -> bool:
        """Whether its L1, every L2 table and every cluster are still there."""
        return self.l1_intact and not self.forbidden and not self.streams

    @property
    def selector(self) -> str:
        """What ``open_disk(snapshot=...)`` takes."""
        return f"deleted:{self.entry.offset:#x}"


def unknown_entries(image: Image, entries: Iterable[SnapshotEntry]) -> list[SnapshotEntry]:
    """Return the former entries that are not live snapshots, each once, in order of ID and place.

    QEMU rewrites the whole table at each change, so old copies of it list live snapshots too.
    """
    former = list(entries)
    live = {_identity(entry) for entry in image.snapshots} if former else ()
    unknown: dict[object, SnapshotEntry] = {}
    for entry in former:
        if _identity(entry) not in live:
            unknown.setdefault((*_identity(entry), entry.l1_table_offset), entry)
    return sorted(unknown.values(), key=lambda entry: (int(entry.id_bytes), entry.date_sec, entry.offset))


def _identity(entry: SnapshotEntry) -> tuple[bytes, bytes, int, int]:
    return entry.id_bytes, entry.name_bytes, entry.date_sec, entry.date_nsec


def examine(
    image: Image, entries: Iterable[SnapshotEntry], census: Census, *, read_data: bool = True
) -> list[DeletedSnapshot]:
    """Follow former entries' tables and return how much of each disk is still readable.

    Without ``read_data`` the data clusters are not read: those that hold zeros count as intact.
    """
    examiner = _Examiner(image, census, read_data)
    return [_Examination(examiner, entry).result() for entry in entries]


_L1_TARGETS = 8  # of what may be an L1 table, read to see whether they are L2 tables
_UNKNOWN, _BYTES, _ZEROS, _HOLE = range(4)  # what a free host cluster holds
_PAGE = 256  # host clusters remembered together, once one of them was looked at


class _Examiner:
    """What all former entries of an image share; every free cluster is looked at once."""

    def __init__(self, image: Image, census: Census, read_data: bool) -> None:
        self.image = image
        self.census = census
        self.geometry = Geometry.of(image)
        self.room = image.file_size // 8  # L1 entries of former tables that do not overlap
        self._read_data = read_data
        self._pages = np.zeros(-(-census.clusters // _PAGE), np.intp)
        self._known = np.full((1, _PAGE), _UNKNOWN, np.uint8)  # the first page is that of clusters not looked at

    @cached_property
    def longest_l1(self) -> int:
        """The entries of the longest L1 table that is not deleted, or that this disk needs."""
        header = self.image.header
        return max(header.l1_size, max((entry.l1_size for entry in self.image.snapshots), default=0))

    def is_l2_table(self, offset: int) -> bool:
        """Whether a host cluster has more of an L2 table than guest data has by chance."""
        facts = tables.parse_l2(self.image.read(offset, self.image.cluster_size), self.geometry)
        return facts is not None and facts.is_telling

    @cached_property
    def live(self) -> dict[trees.State, tables.Words]:
        """The L1 tables of the states that are not deleted: large where crafted, so read when asked for."""
        return trees.l1_tables(self.image)

    def is_claimed(self, offset: int, length: int) -> bool:
        size = self.image.cluster_size
        last = min(-(-(offset + length) // size), self.census.clusters)
        return bool(self.census.is_claimed(np.arange(offset // size, last)).any())

    def is_hole(self, offset: int, length: int) -> bool:
        """Whether the file system stores nothing for the range; False where it cannot be asked."""
        return all(run.is_hole for run in host_runs(self.image.source, offset, length))

    def has_hole(self, offset: int, length: int) -> bool:
        """Whether the file system stores nothing for part of the range."""
        return any(run.is_hole for run in host_runs(self.image.source, offset, length))

    def contents(self, numbers: npt.NDArray[np.intp]) -> npt.NDArray[np.uint8]:
        """Return what the free host clusters of these numbers hold."""
        pages, places = numbers // _PAGE, numbers % _PAGE
        fresh = np.unique(pages[self._pages[pages] == 0])
        if len(fresh):
            self._pages[fresh] = np.arange(len(fresh)) + len(self._known)
            self._known = np.concatenate((self._known, np.full((len(fresh), _PAGE), _UNKNOWN, np.uint8)))
        for number in np.unique(numbers[self._known[self._pages[pages], places] == _UNKNOWN]).tolist():
            self._known[self._pages[number // _PAGE], number % _PAGE] = self._look(number * self.image.cluster_size)
        found: npt.NDArray[np.uint8] = self._known[self._pages[pages], places]
        return found

    def _look(self, offset: int) -> int:
        size = self.image.cluster_size
        if self.is_hole(offset, min(size, self.image.file_size - offset)):
            return _HOLE
        return _BYTES if not self._read_data or any(self.image.read(offset, size)) else _ZEROS


class _Examination:
    """Follows the tables of one former entry."""

    def __init__(self, examiner: _Examiner, entry: SnapshotEntry) -> None:
        self._examiner = examiner
        self._image = examiner.image
        self._entry = entry
        self._cluster_size = self._image.cluster_size
        self._span = self._image.header.l2_span
        size = entry.disk_size if entry.disk_size is not None else self._image.disk_size
        self._size = min(size, INT64_MAX)
        self._forbidden: list[tuple[int, int, str]] = []
        self._streams: list[tuple[int, int, str]] = []
        self._kept: list[npt.NDArray[np.intp]] = []  # host clusters of streams that a live state maps too
        self._unmapped: list[tuple[npt.NDArray[np.intp], tables.Words]] = []  # guest offsets and entries of other ones
        self._counts = {"intact": 0, "shared": 0, "zeroed": 0, "reused": 0, "compressed": 0}
        self._unreadable = 0
        self._rewritable = 0

    def result(self) -> DeletedSnapshot:
        """Return what became of the entry."""
        offsets = self._l1_table()
        if offsets is None:
            return DeletedSnapshot(self._entry, l1_intact=False)
        used = np.flatnonzero(offsets).tolist()
        lost = sum(not self._table(index, int(offsets[index])) for index in used)
        self._streams_left()
        return DeletedSnapshot(
            self._entry,
            True,
            l2_tables=len(used),
            lost_tables=lost,
            unreadable_bytes=self._unreadable,
            rewritable_bytes=self._rewritable,
            forbidden=tuple(self._forbidden),
            streams=tuple(self._streams),
            **self._counts,
        )

    def _l1_table(self) -> tables.Words | None:
        """Return the host offsets in the former L1 table, None when it is not there any more."""
        examiner, first, length = self._examiner, self._entry.l1_table_offset, self._entry.l1_size * 8
        examiner.room -= self._entry.l1_size
        if first + length > self._image.file_size or length > self._image.limits.l1_bytes or examiner.room < 0:
            return None
        if examiner.is_claimed(first, length):
            return None
        data = self._image.read(first, length)
        # Of zeros nobody can tell whether the disk was empty or the table wiped: not every file system keeps
        # a discarded table as a hole, and no copy has to.
        if tables.parse_l1(data, examiner.geometry) is None or examiner.has_hole(first, length):
            return None
        return tables.words_of(data) & np.uint64(OFFSET_MASK)

    def _table(self, index: int, offset: int) -> bool:
        """Count one L2 table; return whether it is intact."""
        guest = index * self._span
        lives = self._live_tables(index)
        shared = offset in lives
        data = self._image.read(offset, self._cluster_size)
        sound = shared or not self._examiner.is_claimed(offset, self._cluster_size)
        facts = tables.parse_l2(data, self._examiner.geometry) if sound else None
        if facts is None or (not shared and self._begins_as_l1_table(data)):
            self._forbidden.append((offset, self._cluster_size, _LOST_TABLE))
            self._unreadable += max(0, min(self._span, self._size - guest))
            return False
        columns = trees.columns(self._image, tables.words_of(data))
        found = [(trees.l2_table(self._image, offset), kept) for offset, kept in lives.items()]
        live = [(trees.columns(self._image, table), kept) for table, kept in found if table is not None]
        if facts.compressed:
            self._packed(guest, columns, [entries for entries, _ in live])
        hosts = np.where(columns.zero_flags, np.uint64(0), columns.offsets)
        used = np.flatnonzero(hosts)
        hosts = hosts[used]
        mapped, kept = np.zeros(len(used), np.bool_), np.zeros(len(used), np.bool_)
        for entries, by_older in live:
            same = entries.offsets[used] == hosts
            mapped |= same
            kept |= same & by_older
        mapped |= self._image.header.external_data
        if shared and not lives[offset]:  # the active state wrote its own entries into this very table
            self._rewritable += max(0, min(self._span, self._size - guest))
        else:
            changed = guest + used[mapped & ~kept] * self._cluster_size
            self._rewritable += int(np.clip(self._size - changed, 0, self._cluster_size).sum())
        self._data(guest + used * self._cluster_size, hosts, mapped)
        return True

    def _begins_as_l1_table(self, data: bytes) -> bool:
        """Whether a later snapshot's L1 table was written over the first entries, whose form is that of L2 entries."""
        facts = tables.parse_l1(data[: self._examiner.longest_l1 * 8], self._examiner.geometry)
        if facts is None or not len(facts.targets) or self._image.header.external_data:
            return False  # what an L2 table of an image with a data file names is in that file
        return all(self._examiner.is_l2_table(int(target)) for target in facts.targets[:_L1_TARGETS])

    def _data(self, guests: npt.NDArray[np.intp], hosts: tables.Words, mapped: Flags) -> None:
        """Count data clusters: those still mapped by a live state, reused ones, and free ones."""
        numbers = np.minimum(hosts // np.uint64(self._cluster_size), np.uint64(self._examiner.census.clusters - 1))
        numbers = numbers.astype(np.intp)
        reused = ~mapped & self._examiner.census.is_claimed(numbers)
        free = ~mapped & ~reused
        holds = np.full(len(hosts), _UNKNOWN, np.uint8)
        holds[free] = self._examiner.contents(numbers[free])
        self._counts["shared"] += int(mapped.sum())
        self._counts["reused"] += int(reused.sum())
        self._counts["intact"] += int((holds == _BYTES).sum())
        self._counts["zeroed"] += int((holds == _ZEROS).sum() + (holds == _HOLE).sum())
        for gone, reason in ((reused, _REUSED), (holds == _HOLE, _PUNCHED)):
            self._forbidden += [(int(host), self._cluster_size, reason) for host in np.unique(hosts[gone])]
            self._unreadable += int(np.clip(self._size - guests[gone], 0, self._cluster_size).sum())

    def _packed(self, guest: int, columns: trees.Entries, lives: list[trees.Entries]) -> None:
        """Count the compressed clusters that a live state maps too; the others are told when all such are known."""
        places = np.flatnonzero(columns.compressed)
        entries = columns.entries[places]
        mapped = np.zeros(len(places), np.bool_)
        for live in lives:
            mapped |= live.entries[places] == entries
        self._kept.append(np.unique(self._touched(entries[mapped])))
        self._counts["compressed"] += int(mapped.sum())
        self._unmapped.append((guest + places[~mapped] * self._cluster_size, entries[~mapped]))

    def _touched(self, entries: tables.Words) -> list[npt.NDArray[np.intp]]:
        """Return the host clusters that each compressed cluster lies in: the first, one between, the last."""
        offsets, lengths = descriptors(entries, self._image.header.cluster_bits)
        most = self._examiner.census.clusters - 1  # a descriptor may reach past the end of the file
        first, last = (
            (ends // np.uint64(self._cluster_size)).astype(np.intp)
            for ends in (offsets, offsets + lengths - np.uint64(1))
        )
        return [np.minimum(part, most) for part in (first, (first + last) // 2, last)]

    def _streams_left(self) -> None:
        """Tell the compressed clusters no live state maps: whole only in host clusters that were never let go.

        QEMU writes streams one behind the other, and never over one while its host cluster holds
        another that is in use. A stream that the entry and a live state share is one of those.
        """
        census = self._examiner.census
        kept = np.unique(np.concatenate(self._kept)) if self._kept else np.empty(0, np.intp)
        for guests, entries in self._unmapped:
            lost = np.zeros(len(entries), np.bool_)
            for numbers in self._touched(entries):
                lost |= census.is_claimed(numbers) & ~np.isin(numbers, kept)
            self._counts["compressed"] += int((~lost).sum())
            self._counts["reused"] += int(lost.sum())
            offsets, lengths = descriptors(entries[lost], self._image.header.cluster_bits)
            found = zip(offsets.tolist(), lengths.tolist(), strict=True)
            self._streams += [
                (offset, min(length, self._image.file_size - offset), _REUSED) for offset, length in found
            ]
            self._unreadable += int(np.clip(self._size - guests[lost], 0, self._cluster_size).sum())

    def _live_tables(self, index: int) -> dict[int, bool]:
        """Return the L2 tables of live states in an L1 slot, and whether a snapshot older than this one holds each.

        QEMU writes in place what only the active state holds, and never what a snapshot does.
        """
        taken = self._entry.date_sec, self._entry.date_nsec
        found: dict[int, bool] = {}
        for state, live in self._examiner.live.items():
            if index < len(live) and live[index]:
                one = state.snapshot
                older = one is not None and (one.date_sec, one.date_nsec) < taken
                found[int(live[index])] = found.get(int(live[index]), False) or older
        return found


def gone(entry: SnapshotEntry) -> FormatError:
    """Return the error for a former entry whose L1 table is not there any more."""
    return FormatError(
        f"the L1 table of the deleted snapshot {printable(entry.id)} ({printable(entry.name)}) "
        "is gone: it has been reused or wiped",
        offset=entry.l1_table_offset,
        field="l1_table_offset",
    )


def choose(found: Iterable[DeletedSnapshot], wanted: str) -> DeletedSnapshot:
    """Return the deleted snapshot with an ID, a name or an entry offset (``0x...``)."""
    known = list(found)
    matches = [item for item in known if f"{item.entry.offset:#x}" == wanted.lower()]
    matches = matches or [item for item in known if item.entry.id == wanted]
    matches = matches or [item for item in known if item.entry.name == wanted]
    if len(matches) == 1:
        return matches[0]
    raise SnapshotNotFound(f"deleted:{wanted}", _choices(matches or known), ambiguous=bool(matches))


def _choices(found: Iterable[DeletedSnapshot]) -> Iterator[str]:
    for item in found:
        yield f"{item.selector} (ID {printable(item.entry.id)}, {printable(item.entry.name)})"


def guard(image: Image, deleted: DeletedSnapshot) -> SnapshotEntry:
    """Make ``image`` refuse what this snapshot no longer owns and return the entry to open.

    After this the image answers for this one state only: it is for a disk of its own.
    """
    # What the header names is read before the guard stands, in case a crafted entry maps it.
    _ = image.problems, image.backing_name, image.crypto_header
    image.source = GuardedSource(image.source, deleted.forbidden, deleted.streams)
    return deleted.entry
