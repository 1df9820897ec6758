"""States of a file whose header can be read: what its tables have lost, and what they do not lead to any more.

::

    L1 table lost          L2 tables placed by snapshots, content and order
    L2 tables lost         older versions of them, and clusters that nobody names
    the disk reverted      free L2 tables that share clusters with those in use
    VM states let go       their clusters, by former tables or by the order of the file
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from ..census import Census, take_census
from ..census.arrays import U64
from ..census.columns import named_offsets, without_copied
from ..errors import LimitExceeded
from ..format.entries import named_offset
from ..format.image import Image
from ..format.source import Source
from ..limits import Budget
from ..reader.notes import log_note
from ..residue.structure_detection import Geometry
from .arrangement import arranged, use_by_file_systems
from .confidence import Confidence
from .l1_tables import (
    is_l1,
    names_counted,
    own_clusters,
    read_l1,
    shared_with_snapshots,
    snapshot_l1_tables,
    tables_by_slot,
)
from .lost_tables import leaked_clusters, lost_slots, rebuild
from .patched_source import Patch
from .placement import Placement, Unplaced, Use, place
from .rebuilt_metadata import stored_l1, with_l1
from .refcounts import FoundRefcounts
from .state import RecoveredState
from .table_contents import TableReader
from .table_search import entries_of, search_tables
from .vm_states import vm_states


def _used(table: U64) -> Iterator[tuple[int, int]]:
    """Yield (slot, host offset) of the L2 tables that an L1 table names."""
    offsets = named_offsets(table)
    used = np.flatnonzero(offsets)
    return zip(used.tolist(), offsets[used].tolist(), strict=True)


def _census(image: Image) -> Census | None:
    """Return who claims each cluster; None, with a warning, where the tables are too many to say."""
    try:
        return take_census(image)
    except LimitExceeded as error:
        log_note(f"lost L2 tables and VM states are not looked for: {error}", doubt=True)
        return None


class WithHeader:
    """Puts the states of one such file together; ``room`` bounds the L2 tables of all states of the file."""

    def __init__(self, source: Source, virtual_size: int | None, room: Budget, image: Image) -> None:
        header = image.header
        self._source = source
        self._virtual_size = virtual_size
        self._room = room
        self._image = image
        self._geometry = Geometry.of(image)
        self._refcounts = FoundRefcounts(
            source,
            header.refcount_table_offset,
            header.refcount_table_clusters * header.cluster_size,
            header.cluster_size,
            header.refcount_order,
        )

    def states(self) -> Iterator[RecoveredState]:
        """Yield the states, the best first."""
        image, header = self._image, self._image.header
        if header.version == 1 or header.external_data:
            return
        tables = search_tables(self._source, self._geometry)
        active = read_l1(self._source, header.l1_table_offset, header.l1_size)
        snapshots = snapshot_l1_tables(self._source, image.snapshots)
        named = {int(at) for table in (active, *snapshots) for at in named_offsets(table).tolist() if at}
        own = own_clusters(image)
        free = [at for at in tables.l2.tolist() if at not in named and at not in own]
        lost = [at for at in free if self._refcounts.of(at)]
        if not is_l1(active, tables) and not names_counted(active, self._geometry, self._refcounts):
            shared = shared_with_snapshots(snapshots, self._refcounts, len(active))
            yield from self._with_lost_l1(lost, self._by_slot(snapshots), shared)
            return
        census = _census(image)
        if census is not None:
            yield from self._with_lost_tables(active, snapshots, free, leaked_clusters(census))
        former = [at for at in free if self._refcounts.of(at) == 0]
        if former:
            yield from self._former(former, active, self._by_slot([*snapshots, active]))
        if census is not None:
            yield from vm_states(self._source, self._geometry, census, free, self._room)

    def _by_slot(self, l1_tables: list[U64]) -> dict[int, list[U64]]:
        return tables_by_slot(self._source, self._geometry, l1_tables)

    def _unplaced(self, offset: int) -> Unplaced:
        return Unplaced(offset, entries_of(self._source, offset, self._geometry), {})

    def _with_lost_tables(
        self, active: U64, snapshots: list[U64], free: list[int], leaks: U64
    ) -> Iterator[RecoveredState]:
        """Yield the active state with other tables in place of L2 tables that were overwritten."""
        geometry, targets = self._geometry, dict(_used(active))
        lost = lost_slots(self._source, geometry, targets, leaks)
        if not lost:
            return
        reader = TableReader(self._source, geometry, self._image, self._image.header.compression_type)
        others, known = [self._unplaced(at) for at in free], self._by_slot(snapshots)
        found = place(others, known, len(active), geometry.cluster_size, ordered=False)
        older = {p.slot: p for p in found.placements}
        for table in reversed(snapshots):
            for slot in np.flatnonzero(named_offsets(table)).tolist():
                at = named_offset(int(table[slot]))
                if at != targets.get(slot):
                    older.setdefault(slot, Placement(slot, at, Confidence.GUESS, ""))
        older = {
            slot: p._replace(confidence=Confidence.GUESS, reason="its table is lost: an older version of it")
            for slot, p in older.items()
        }
        self._room.spend(len(targets))
        rebuilt = rebuild(reader, self._source, geometry, targets, lost, older, leaks, self._use)
        whole = [
            Placement(slot, at, Confidence.CERTAIN, "the image's own L1 table")
            for slot, at in targets.items()
            if slot not in lost
        ]
        placements = tuple(sorted((*whole, *rebuilt.placements)))
        what = f"the active state, {len(lost)} of its L2 tables lost"
        yield self._patched(what, self._image.disk_size, placements, rebuilt.patches)

    def _use(self, reader: TableReader, placed: Mapping[int, int]) -> Use | None:
        return use_by_file_systems(reader, self._geometry, placed)

    def _with_lost_l1(
        self, offsets: list[int], known: dict[int, list[U64]], shared: list[Placement]
    ) -> Iterator[RecoveredState]:
        header = self._image.header
        size = self._virtual_size or self._image.disk_size
        opener = TableReader(self._source, self._geometry, self._image, header.compression_type)
        found = arranged(opener, offsets, self._geometry, known, size, tuple(shared))
        for what, placements, left in found.ways("the active state, its L1 table rebuilt"):
            yield replace(self._patched(what, size, placements), unplaced=left)

    def _patched(
        self,
        what: str,
        size: int,
        placements: tuple[Placement, ...],
        tables: tuple[Patch, ...] = (),
    ) -> RecoveredState:
        count = max(self._image.header.l1_size, -(-size // self._image.header.l2_span))
        patches = (*with_l1(size, stored_l1(placements, count)), *tables)
        return RecoveredState(
            0,
            what,
            size,
            "the caller" if self._virtual_size else "the header",
            self._image.cluster_size,
            placements,
            backing_unknown=False,
            patches=patches,
        )

    def _former(self, offsets: list[int], active: U64, known: dict[int, list[U64]]) -> Iterator[RecoveredState]:
        """Yield the active state that free L2 tables belonged to, before the disk went back to a snapshot."""
        tables = [self._unplaced(at) for at in offsets]
        placed = place(tables, known, len(active), self._geometry.cluster_size, ordered=False)
        usable = [p for p in placed.placements if self._is_free(p, known.get(p.slot, ()))]
        if not usable:
            return
        sure, now = Confidence.LIKELY, "the table in use now"
        if len(usable) < len(tables):  # some slot had another table than it has now, and nothing says which
            sure, now = Confidence.GUESS, f"{now}; {len(tables) - len(usable)} free tables have no known place"
        self._room.spend(int(np.count_nonzero(active)))
        by_slot = {index: Placement(index, at, sure, now) for index, at in _used(active)}
        for p in usable:
            by_slot[p.slot] = p._replace(confidence=Confidence.LIKELY, reason=f"a free table: {p.reason}")
        placements = tuple(by_slot[index] for index in sorted(by_slot))
        yield self._patched(f"a former active state: {len(usable)} free L2 tables", self._image.disk_size, placements)

    def _is_free(self, placed: Placement, in_use: Iterable[U64]) -> bool:
        """Whether what a former table names is still its own: free, or shared with a table in use at the same place."""
        entries = entries_of(self._source, placed.offset, self._geometry)
        shared = np.zeros(len(entries), np.bool_)
        for others in in_use:
            shared |= without_copied(entries) == without_copied(others)
        own = named_offsets(entries[~shared & (entries >> np.uint64(62) != 1)])
        return not any(self._refcounts.of(int(at)) for at in own[own != 0].tolist())
