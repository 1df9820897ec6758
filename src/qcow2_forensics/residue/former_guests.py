"""Where clusters that nothing refers to any more had their place on a guest's disk, by the tables that named them.

::

    former L1, at slot 3   ->   former L2, entry 7   ->   free cluster: guest offset (3 * entries + 7) * cluster size

A table is believed where nothing live is in its place. What two of them contradict each other about stays unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from ..census import Census
from ..census.arrays import U64, Mask, run_starts
from ..census.columns import Columns, big_endian, table_offsets
from ..errors import LimitExceeded
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from ..limits import FORMER_PLACES, Budget, MiB
from . import structure_detection
from .former_clusters import IS_L2, Targets, read_clusters
from .former_tables import FormerTables
from .structure_detection import Counts, Geometry

UNKNOWN = -1  # no guest offset
_BATCH = 1 * MiB  # of L2 tables decoded together
_TOGETHER = 1 << 20  # pairs that are sorted together at least


class FormerGuests:
    """The guest offsets of host clusters, by rising host offset."""

    def __init__(self, hosts: Counts, guests: Counts) -> None:
        self._hosts = hosts
        self._guests = guests

    def at(self, offsets: Counts) -> Counts:
        """Return the guest offsets of the clusters at some host offsets."""
        found = np.full(len(offsets), UNKNOWN, np.intp)
        places = np.searchsorted(self._hosts, offsets)
        rows = np.flatnonzero(places < len(self._hosts))
        rows = rows[self._hosts[places[rows]] == offsets[rows]]
        found[rows] = self._guests[places[rows]]
        return found


def former_guests(
    image: Image, census: Census, former: FormerTables, snapshots: Iterable[SnapshotEntry]
) -> FormerGuests:
    """Follow the former L1 tables that are left, those of ``snapshots`` and those found by their form alone.

    Each L2 table is decoded once; of more than 8 Mi clusters the first ones are remembered.
    """
    places = _Agreement()
    if not Geometry.of(image).external_data:  # where what an L2 table names is in that file
        numbers, slots = _l2_tables(image, census, former, snapshots)
        step = max(1, _BATCH // image.cluster_size)
        for at in range(0, len(numbers), step):
            places.add(*_clusters(image, census, numbers[at : at + step], slots[at : at + step]))
            if places.count > FORMER_PLACES:
                break
    return FormerGuests(*places.result())


class _Agreement:
    """Gathers values by their keys, an array at a time; of a key with several values none holds."""

    def __init__(self) -> None:
        self._parts = [np.empty((2, 0), np.intp)]  # the first one holds each key once, rising
        self._waiting = 0

    @property
    def count(self) -> int:
        """How many keys there are at least."""
        return self._parts[0].shape[1]

    def add(self, keys: Counts, values: Counts) -> None:
        """Take in values, none of which is UNKNOWN."""
        self._parts.append(np.stack((keys, values)))
        self._waiting += len(keys)
        if self._waiting > max(_TOGETHER, self.count):
            self._merge()

    def result(self) -> tuple[Counts, Counts]:
        """Return the keys that have one value, rising, and these."""
        self._merge()
        keys, values = self._parts[0]
        return keys[values != UNKNOWN], values[values != UNKNOWN]

    def _merge(self) -> None:
        keys, values = np.concatenate(self._parts, axis=1)
        order = np.lexsort((values, keys))
        keys, values = keys[order], values[order]
        first = run_starts(keys)
        last = np.append(first[1:], len(keys))[: len(first)] - 1
        agreed = np.where(values[first] == values[last], values[first], UNKNOWN)
        self._parts, self._waiting = [np.stack((keys[first], agreed))], 0


def _l2_tables(
    image: Image, census: Census, former: FormerTables, snapshots: Iterable[SnapshotEntry]
) -> tuple[Counts, Counts]:
    """Return the clusters of the former L2 tables that former L1 tables name, and the slots that do."""
    targets = Targets(image)
    bits = np.uint64(image.header.cluster_bits)
    found = _Agreement()
    for table in _l1_tables(image, census, former, snapshots):
        used = np.flatnonzero(table)
        numbers = (table[used] >> bits).astype(np.intp)
        inside = numbers < image.file_size // image.cluster_size
        used, numbers = used[inside], numbers[inside]
        free = ~census.is_claimed(numbers)
        free[free] = (targets.look(numbers[free]) & IS_L2) != 0
        found.add(numbers[free], used[free])
    return found.result()


def _l1_tables(image: Image, census: Census, former: FormerTables, snapshots: Iterable[SnapshotEntry]) -> Iterator[U64]:
    """Yield the host offsets in former L1 tables that are still whole, of crafted ones no more than work is allowed for."""
    size, geometry = image.cluster_size, Geometry.of(image)
    budget = Budget("bytes of former L1 tables", image.file_size, image.limits)
    places = sorted({(entry.l1_table_offset, entry.l1_size * 8) for entry in snapshots})
    # Where L1 tables take more than a cluster each, one that is found by its form may start anywhere in it.
    if max(image.header.l1_size, *(entry.l1_size for entry in image.snapshots), 0) * 8 <= size:
        found = former.l1_tables()
        alone = found[np.diff(found, prepend=-size) != size]
        places += [(offset, size) for offset in alone[~_within(alone, places)].tolist()]
    for offset, length in sorted(places, key=lambda place: place[1]):  # genuine ones are short
        if offset + length > image.file_size or length > image.limits.l1_bytes:
            continue
        try:
            budget.spend(length)
        except LimitExceeded:
            return
        if census.is_claimed(np.arange(offset // size, -(-(offset + length) // size))).any():
            continue
        words = big_endian(image.read(offset, length))
        if structure_detection.l1_rows(words.reshape(1, -1), geometry).tables[0]:
            yield table_offsets(words, image.header)


def _within(offsets: Counts, ranges: list[tuple[int, int]]) -> Mask:
    """Return which offsets are inside of any of some ranges, (offset, length), that rise."""
    starts, lengths = np.asarray(ranges, np.intp).reshape(-1, 2).T
    ends = np.maximum.accumulate(starts + lengths)
    places = np.searchsorted(starts, offsets, "right")
    within: Mask = (places > 0) & (np.append(ends, 0)[places - 1] > offsets)
    return within


def _clusters(image: Image, census: Census, numbers: Counts, slots: Counts) -> tuple[Counts, Counts]:
    """Return the host offsets that some L2 tables name and nothing else does any more, and their guest offsets."""
    header = image.header
    words: U64 = big_endian(read_clusters(image, numbers)).reshape(len(numbers), -1)
    columns = Columns.of(words, header)
    hosts = columns.hosts
    rows, entries = np.nonzero((hosts != 0) & (hosts < np.uint64(image.file_size)))
    found = hosts[rows, entries].astype(np.intp)
    free = (found % header.cluster_size == 0) & ~census.is_claimed(found // header.cluster_size)
    guests = slots[rows] * header.l2_span + entries * header.cluster_size
    return found[free], guests[free]
