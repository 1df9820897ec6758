"""L1 tables and the L2 tables that they name, read as arrays, for putting states together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import numpy as np

from ..census.arrays import U64, is_among
from ..census.columns import named_offsets
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from ..format.source import Source
from ..limits import DEFAULT_LIMITS, RECOVERY_TABLE_BYTES, Budget, MiB
from ..residue.structure_detection import Geometry, l1_rows
from ..text import plural
from .confidence import Confidence
from .placement import Placement
from .refcounts import FoundRefcounts
from .table_search import FoundTables, L1Candidate, entries_of

_L1_AT_ONCE = 1 << 17  # entries


def read_l1(source: Source, offset: int, count: int) -> U64:
    """Return ``count`` L1 entries, zeros past the end of the file."""
    data = source.read(offset, max(0, min(count * 8, source.size - offset)))
    return np.frombuffer(data.ljust(count * 8, b"\0"), ">u8").astype(np.uint64)


def snapshot_l1_tables(source: Source, entries: Iterable[SnapshotEntry]) -> list[U64]:
    """Return the L1 tables of snapshots, as far as they are in the file.

    Raises :class:`LimitExceeded` where entries name more bytes than a file of this size can store.
    """
    budget = Budget("L1 tables of snapshots", source.size)
    tables = []
    for entry in entries:
        stored = max(0, min(entry.l1_size, DEFAULT_LIMITS.l1_bytes // 8, (source.size - entry.l1_table_offset) // 8))
        budget.spend(stored * 8)
        tables.append(read_l1(source, entry.l1_table_offset, stored))
    return tables


def is_l1(table: U64, tables: FoundTables) -> bool:
    """Whether most of what an L1 table names still looks like L2 tables."""
    targets = named_offsets(table).astype(np.int64)
    targets = targets[targets != 0]
    return bool(is_among(targets, tables.l2).mean() >= 0.5) if len(targets) else False


def own_clusters(image: Image) -> set[int]:
    """Return the host offsets of the image's L1 tables and refcount table, which may look like L2 tables."""
    header, size = image.header, image.cluster_size
    ranges = [(header.l1_table_offset, header.l1_size * 8)]
    ranges.append((header.refcount_table_offset, header.refcount_table_clusters * size))
    ranges += [(entry.l1_table_offset, entry.l1_size * 8) for entry in image.snapshots]
    return {at for first, length in ranges for at in range(first, first + min(length, MiB * 32), size)}


def names_counted(table: U64, geometry: Geometry, refcounts: FoundRefcounts) -> bool:
    """Whether an L1 table is sound by itself: its entries are well formed, and what they name is in use."""
    used = table[table != 0]
    if not len(used) or not l1_rows(used[np.newaxis], geometry).sound[0]:
        return False
    counted = [bool(refcounts.of(int(at))) for at in named_offsets(used)]
    return sum(counted) * 2 > len(counted)


def placements_of(table: L1Candidate, tables: FoundTables, refcounts: FoundRefcounts | None) -> Iterator[Placement]:
    """Yield the slots of an L1 table that was found by its form."""
    counted = refcounts is not None and bool(refcounts.of(table.offset))
    used = np.flatnonzero(table.targets)
    are_tables = is_among(table.targets[used].astype(np.int64), tables.l2)
    for index, target, is_table in zip(used.tolist(), table.targets[used].tolist(), are_tables.tolist(), strict=True):
        if not is_table:
            why = "the L1 table names it, but it does not look like an L2 table: it may hold no entries, or be overwritten"
            yield Placement(index, target, Confidence.GUESS, why)
        elif index < table.sure and counted and refcounts is not None and refcounts.of(target):
            yield Placement(index, target, Confidence.CERTAIN, "the L1 table names it, and both are counted as in use")
        else:
            yield Placement(index, target, Confidence.LIKELY, "an L1 table found by its form names it")


def rank(
    table: L1Candidate, named: dict[int, SnapshotEntry], refcounts: FoundRefcounts | None
) -> tuple[bool, bool, int, int]:
    """Return the key that sorts L1 tables, the active state's first: no snapshot's, counted, largest."""
    unused = refcounts is not None and not refcounts.of(table.offset)
    return table.offset in named, unused, -int(np.count_nonzero(table.targets)), table.offset


def placed_by_image(source: Source, room: Budget) -> tuple[Placement, ...]:
    """Return where the L1 table of a whole image has its L2 tables; raises :class:`LimitExceeded` without room for them."""
    with Image(source, owns_source=False) as image:
        offset, count = image.header.l1_table_offset, image.header.l1_size
    placed: list[Placement] = []
    for first in range(0, count, _L1_AT_ONCE):
        table = named_offsets(read_l1(source, offset + first * 8, min(_L1_AT_ONCE, count - first)))
        used = np.flatnonzero(table).tolist()
        room.spend(len(used))
        placed += (Placement(first + i, int(table[i]), Confidence.CERTAIN, "the image's own L1 table") for i in used)
    return tuple(placed)


def left_out_notes(tables: FoundTables) -> tuple[str, ...]:
    """Return notes on what was found and not kept, or not looked at."""
    notes = []
    if tables.left_out:
        notes.append(f"{plural(tables.left_out, 'more table was', 'more tables were')} found than are kept")
    if tables.entries_left_out:
        places = plural(tables.entries_left_out, "place that looks", "places that look")
        notes.append(
            f"{places} like an entry of a snapshot table {'was' if tables.entries_left_out == 1 else 'were'} not looked at"
        )
    return tuple(notes)


def tables_by_slot(source: Source, geometry: Geometry, l1_tables: list[U64]) -> dict[int, list[U64]]:
    """Return the entries of the L2 tables that L1 tables name, by slot, each table once.

    Raises :class:`LimitExceeded` where tables are in several slots until they are more than the file stores.
    """
    known: dict[int, dict[int, None]] = {}
    read: dict[int, U64] = {}
    budget = Budget.up_to("L2 tables under L1 tables", source.size + RECOVERY_TABLE_BYTES)
    for table in l1_tables:
        targets = named_offsets(table)
        used = np.flatnonzero(targets)
        for index, at in zip(used.tolist(), targets[used].tolist(), strict=True):
            if at + geometry.cluster_size <= source.size:
                if at in known.setdefault(index, {}):
                    continue
                budget.spend(geometry.cluster_size)
                known[index][at] = None
                if at not in read:
                    read[at] = entries_of(source, at, geometry)
    return {index: [read[at] for at in versions] for index, versions in known.items()}


def shared_with_snapshots(snapshots: list[U64], refcounts: FoundRefcounts, slots_: int) -> list[Placement]:
    """Return the L2 tables of snapshots that the active state shares, by their refcounts."""
    uses: dict[tuple[int, int], int] = {}
    for table in snapshots:
        targets = named_offsets(table)
        for index in np.flatnonzero(targets).tolist():
            uses[index, int(targets[index])] = uses.get((index, int(targets[index])), 0) + 1
    return [
        Placement(index, at, Confidence.CERTAIN, f"its refcount is one more than the {count} snapshots that share it")
        for (index, at), count in uses.items()
        if index < slots_ and (refcounts.of(at) or 0) == count + 1
    ]


def named_by_former(former: list[U64], offsets: Collection[int], taken: Collection[int]) -> list[Placement]:
    """Return the L2 tables in use, at ``offsets``, that L1 tables in free space name in one slot that is not ``taken``."""
    slots: dict[int, set[int]] = {at: set() for at in offsets}
    tables: dict[int, set[int]] = {}
    for table in former:
        targets = named_offsets(table)
        for index in np.flatnonzero(targets).tolist():
            at = int(targets[index])
            if at in slots:
                slots[at].add(index)
                tables.setdefault(index, set()).add(at)
    why = "a former L1 table names it there"
    return [
        Placement(index, at, Confidence.LIKELY, why)
        for at, (index, *more) in ((at, sorted(found)) for at, found in slots.items() if found)
        if not more and len(tables[index]) == 1 and index not in taken
    ]
