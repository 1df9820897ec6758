"""States of a file whose header is lost: its tables are found by their form, and a header is made for them.

The cluster size comes from the tables; L1 tables that are found lead to their disks, and L2 tables in use
that none of them names are put in order by what is known of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate

import numpy as np

from ..census.columns import named_offsets
from ..errors import Qcow2Error
from ..format.source import Source
from ..limits import L1_ENTRIES, REBUILT_L1_BYTES, RECOVERED_STATES, RECOVERY_TABLE_BYTES, Budget
from ..reader.opening import open_disk
from ..residue.structure_detection import Geometry
from .arrangement import arranged
from .geometry import compression_type_of, find_geometry
from .l1_tables import (
    left_out_notes,
    named_by_former,
    placements_of,
    rank,
    read_l1,
    shared_with_snapshots,
    tables_by_slot,
)
from .patched_source import Patch, PatchedSource
from .placement import Placement
from .rebuilt_metadata import REBUILT_AT, new_header, stored_l1
from .refcounts import FoundRefcounts, find_refcounts
from .state import END_OF_DATA, RecoveredState
from .table_contents import TableReader
from .table_search import FoundTables, L1Candidate, entries_of, search_tables, table_words
from .volumes import disk_size_of


def _with_whole_l1_tables(source: Source, tables: FoundTables) -> FoundTables:
    """Return the tables with the L1 tables of snapshots as long as their entries say, and no piece of one by itself."""
    ranges = sorted((entry.l1_table_offset, entry.l1_size) for entry in tables.snapshots)
    sizes = dict(ranges)
    starts = [first for first, _ in ranges]
    ends = list(accumulate((first + size * 8 for first, size in ranges), max))

    def inside(offset: int) -> bool:
        before = bisect_left(starts, offset)
        return before > 0 and offset < ends[before - 1]

    budget = Budget.up_to("L1 tables of snapshots", source.size + RECOVERY_TABLE_BYTES)
    whole: list[L1Candidate] = []
    for table in tables.l1:
        if inside(table.offset):
            continue
        size = sizes.get(table.offset, 0)
        if 0 < size <= L1_ENTRIES:
            stored = max(0, min(size, (source.size - table.offset) // 8))
            budget.spend(stored * 8)
            table = table._replace(targets=named_offsets(read_l1(source, table.offset, stored)), sure=size)  # noqa: PLW2901
        whole.append(table)
    return tables._replace(l1=whole)


def _active_is_missing(tables: FoundTables, refcounts: FoundRefcounts | None) -> bool:
    """Whether none of the L1 tables seems to be the active state's: most L2 tables in use are named by none that may be."""
    of_snapshots = {entry.l1_table_offset for entry in tables.snapshots}
    snapshots_, others = set[int](), set[int]()
    for table in tables.l1:
        here = table.targets[table.targets != 0].tolist()
        (snapshots_ if table.offset in of_snapshots else others).update(map(int, here))
    in_use = {at for at in tables.l2.tolist() if refcounts is None or refcounts.of(at) != 0}
    return not others or len(in_use - snapshots_ - others) > len(in_use & others)


class WithoutHeader:
    """Puts the states of one such file together; ``room`` bounds the L2 tables of all states of the file."""

    def __init__(self, source: Source, virtual_size: int | None, room: Budget) -> None:
        self._source = source
        self._virtual_size = virtual_size
        self._room = room

    def states(self) -> Iterator[RecoveredState]:
        """Yield the states, the best first."""
        found = find_geometry(self._source)
        if found is None:
            return
        geometry = Geometry(3, found.cluster_bits, self._source.size, found.extended_l2)
        tables = search_tables(self._source, geometry)
        refcounts = find_refcounts(
            self._source,
            tables.refcount_tables,
            geometry.cluster_size,
            [table.offset for table in tables.l1] or tables.l2.tolist(),
        )
        compression = found.compression_type
        if compression is None:
            compression = _compression(self._source, tables, geometry)
        notes = [f"clusters of {geometry.cluster_size} bytes: {found.evidence}", *left_out_notes(tables)]
        tables = _with_whole_l1_tables(self._source, tables)
        named = {entry.l1_table_offset: entry for entry in tables.snapshots}
        found_l1 = sorted(tables.l1, key=lambda table: rank(table, named, refcounts))
        if len(found_l1) > RECOVERED_STATES:
            more = len(found_l1) - RECOVERED_STATES
            notes.append(f"{more} more L1 tables were found than states are put together")
        rebuilder = Rebuilder(self._source, self._virtual_size, geometry, compression, tuple(notes))
        if _active_is_missing(tables, refcounts):
            yield from rebuilder.of_l2_tables(tables, refcounts)
        for table in found_l1[:RECOVERED_STATES]:
            entry = named.get(table.offset)
            self._room.spend(int(np.count_nonzero(table.targets)))
            what = f"the disk of the L1 table at host offset {table.offset:#x}"
            yield rebuilder.state(
                what + (f", snapshot {entry.id}" if entry else ""),
                tuple(placements_of(table, tables, refcounts)),
                entry.disk_size if entry is not None else None,
            )


def _compression(source: Source, tables: FoundTables, geometry: Geometry) -> int | None:
    """Return the compression type of the first L2 table that has compressed entries."""
    for offset in tables.l2[:16].tolist():
        words = entries_of(source, offset, geometry)
        packed = words[words >> np.uint64(62) == 1].tolist()
        if packed:
            return compression_type_of(source, packed, geometry.cluster_bits)
    return None


class Rebuilder:
    """Makes states of L2 tables that have a slot: with a header of its own for each, and a size."""

    def __init__(
        self,
        source: Source,
        virtual_size: int | None,
        geometry: Geometry,
        compression: int | None,
        notes: tuple[str, ...],
    ) -> None:
        self._source = source
        self._virtual_size = virtual_size
        self._geometry = geometry
        self._compression = compression
        self._notes = notes
        self._l1_bytes = REBUILT_L1_BYTES  # that sizes in the evidence may still ask for

    def of_l2_tables(self, tables: FoundTables, refcounts: FoundRefcounts | None) -> Iterator[RecoveredState]:
        """Yield the state of L2 tables that no L1 table names, and that have no header either."""
        counted = [refcounts is None or bool(refcounts.of(table.offset)) for table in tables.l1]
        l1_tables = [table.targets for table, is_used in zip(tables.l1, counted, strict=True) if is_used]
        former = [table.targets for table, is_used in zip(tables.l1, counted, strict=True) if not is_used]
        of_snapshots = {int(at) for table in l1_tables for at in table[table != 0].tolist()}
        in_use = [at for at in tables.l2.tolist() if refcounts is None or refcounts.of(at) != 0]
        offsets = [at for at in in_use if at not in of_snapshots]
        shared = shared_with_snapshots(l1_tables, refcounts, L1_ENTRIES) if refcounts is not None else []
        if not offsets and not shared:
            return
        known = tables_by_slot(self._source, self._geometry, l1_tables)
        opener = TableReader(self._source, self._geometry, None, self._compression)
        shared += named_by_former(former, offsets, {placed.slot for placed in shared})
        offsets = [at for at in offsets if all(at != placed.offset for placed in shared)]
        found = arranged(opener, offsets, self._geometry, known, self._virtual_size, tuple(shared))
        for what, placements, left in found.ways("L2 tables without an L1 table"):
            yield replace(self.state(what, placements), unplaced=left)

    def state(self, what: str, placements: tuple[Placement, ...], recorded_size: int | None = None) -> RecoveredState:
        """Return the state of L2 tables; ``recorded_size`` is the disk's by a snapshot table entry."""
        geometry = self._geometry
        slots = max((placed.slot for placed in placements), default=-1) + 1

        def patches_of(size: int) -> tuple[Patch, ...]:
            entries = max(slots, -(-size // geometry.l2_span))
            table = stored_l1(placements, entries)  # first: it refuses what a header has no room for
            header = new_header(
                cluster_bits=geometry.cluster_bits,
                size=size,
                l1_size=entries,
                extended_l2=geometry.extended_l2,
                compression_type=self._compression,
            )
            return (0, header), (REBUILT_AT, table)

        whole_disk = PatchedSource(self._source, patches_of(slots * geometry.l2_span))
        size, size_from = self._size(whole_disk, placements, recorded_size)
        return RecoveredState(
            0, what, size, size_from, geometry.cluster_size, placements, True, self._notes, patches=patches_of(size)
        )

    def _size(self, source: Source, placements: tuple[Placement, ...], recorded: int | None) -> tuple[int, str]:
        """Return the virtual size and where it comes from; sizes in the evidence are taken as far as they can be mapped."""
        geometry = self._geometry
        if self._virtual_size is not None:
            return self._virtual_size, "the caller"
        if recorded is not None and self._takes(recorded):
            return recorded, "its snapshot table entry"
        mapped = 0
        if placements:
            used = np.flatnonzero(table_words(self._source, placements[-1].offset, geometry))
            last = int(used[-1]) // geometry.entry_words + 1 if len(used) else 0
            mapped = placements[-1].slot * geometry.l2_span + last * geometry.cluster_size
        try:
            with open_disk(source, follow=False) as disk:
                implied = disk_size_of(disk.read)
        except (Qcow2Error, OSError):
            implied = None
        if implied is not None and mapped <= implied[0] and self._takes(implied[0]):
            return implied
        refused = recorded is not None or (implied is not None and implied[0] > mapped)
        more = "; a larger size that the evidence states is left out" if refused else ""
        return mapped, f"{END_OF_DATA}{more}"

    def _takes(self, size: int) -> bool:
        """Whether a size found in the evidence leaves room for the L1 tables of the other states; it is counted then."""
        needed = 8 * -(-size // self._geometry.l2_span)
        if needed > min(self._l1_bytes, 8 * L1_ENTRIES):
            return False
        self._l1_bytes -= needed
        return True
