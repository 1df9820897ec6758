"""States that no header or L1 table leads to any more, found by their tables and offered as disks.

::

    what is lost                 what is used instead
    header, or its first bytes   the form of the tables: cluster size, L1 table, refcounts
    L1 table                     L2 tables placed by snapshots, content and order
    nothing: the disk reverted   free L2 tables that share clusters with those in use

More than 400 lines because each way to a state is a few calls of the modules beside it, in the order in which they are tried.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, islice
from typing import Any, cast

import numpy as np

from ..census import Census, take_census
from ..census.columns import named_offsets, without_copied
from ..errors import LimitExceeded, Qcow2Error, SnapshotNotFound
from ..format.entries import named_offset
from ..format.header import MAGIC, SECTOR
from ..format.image import Image
from ..format.rules import DISK
from ..format.source import PathOrSource, Source, as_source
from ..limits import (
    INNER_IMAGES_SEARCHED,
    L1_ENTRIES,
    REBUILT_L1_BYTES,
    RECOVERED_STATES,
    RECOVERED_TABLES,
    RECOVERY_HINT_BYTES,
    RECOVERY_TABLE_BYTES,
    Budget,
    MiB,
)
from ..reader.chain import close_source
from ..reader.disk import Disk
from ..reader.opening import open_disk
from ..reader.window import WindowSource
from ..residue.structure_detection import Geometry
from .arrangement import Arranged, arranged, use_by_file_systems
from .confidence import Confidence
from .content import TableReader
from .geometry import U64, compression_type_of, find_geometry
from .header import l1_fields, new_header
from .l1_tables import (
    entries_of,
    is_l1,
    left_out_notes,
    named_by_former,
    names_counted,
    own_clusters,
    placed_by_image,
    placements_of,
    rank,
    read_l1,
    shared_with_snapshots,
    snapshot_l1_tables,
    stored_l1,
    table_span,
    tables_by_slot,
)
from .lost_tables import UseOf, leaked_clusters, lost_slots, rebuild
from .metered_source import MeteredSource, stored_pieces
from .patched_source import REBUILT_AT, PatchedSource
from .placement import Placement, Unplaced, place
from .positions import disk_size_of
from .refcounts import FoundRefcounts, find_refcounts
from .state import RecoveredState
from .table_search import FoundTables, L1Candidate, search_tables, table_words
from .vm_states import vm_states

_READ = 4 * MiB
_KEPT = 4  # files whose states are remembered
_known: dict[object, list[RecoveredState]] = {}


def recovered_states(origin: PathOrSource, *, virtual_size: int | None = None) -> list[RecoveredState]:
    """Return the states that can be put together from what is left in a file, the best first.

    ``virtual_size`` in bytes is used where nothing in the file gives it. Reads the whole file, once for a
    file that does not change. An empty list says that no table of a QCOW2 image was found besides those in use.
    """
    source = as_source(origin)
    try:
        found = _remembered(source, virtual_size)
    finally:
        if source is not origin:
            close_source(source)
    return [replace(state, number=number, origin=origin) for number, state in enumerate(found, 1)]


def open_recovered(
    origin: PathOrSource, number: int = 1, *, virtual_size: int | None = None, **options: Any
) -> tuple[Disk, RecoveredState]:
    """Open recovered state ``number`` and return it with what is known of it.

    The disk is the caller's to close, and closes the file with itself where ``origin`` is a path.
    """
    disk = open_disk(origin, f"recovered:{number}", virtual_size=virtual_size, **options)
    return disk, cast("RecoveredState", disk.rebuilt)


def select_recovered(source: Source, wanted: str, virtual_size: int | None = None) -> RecoveredState:
    """Return recovered state ``wanted``, a number from 1: what ``open_disk(snapshot="recovered:N")`` asks."""
    states = recovered_states(source, virtual_size=virtual_size)
    if not (wanted.isascii() and wanted.isdecimal() and len(wanted) < 10 and 1 <= int(wanted) <= len(states)):
        raise SnapshotNotFound(f"recovered:{wanted}", [f"{state.label} ({state.what})" for state in states])
    return states[int(wanted) - 1]


def _remembered(source: Source, virtual_size: int | None) -> list[RecoveredState]:
    """Return the states of a file, looked for once while it does not change: frameworks open it again and again."""
    facts = vars(source) if hasattr(source, "__dict__") else {}  # its own: wrappers show those of what they wrap
    changed = facts.get("mtime_ns")
    if changed is None:
        return _Recovery(source, virtual_size).states()
    key = (facts.get("identity"), changed, source.size, virtual_size)
    if key not in _known:
        _known[key] = _Recovery(source, virtual_size).states()
        while len(_known) > _KEPT:
            _known.pop(next(iter(_known)))
    return _known[key]


def has_tables(origin: PathOrSource) -> bool:
    """Whether the first part of a file holds what looks like tables of a QCOW2 image; no proof either way."""
    source = as_source(origin)
    try:
        found = find_geometry(source, most=RECOVERY_HINT_BYTES)
        if found is None:
            return False
        geometry = Geometry(3, found.cluster_bits, source.size, found.extended_l2)
        tables = search_tables(source, geometry, most=RECOVERY_HINT_BYTES)
        return bool(tables.l1) or len(tables.l2) > 1
    finally:
        if source is not origin:
            close_source(source)


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
        logging.getLogger("qcow2_forensics").warning("lost L2 tables and VM states are not looked for: %s", error)
        return None


def _ways(what: str, found: Arranged) -> Iterator[tuple[str, tuple[Placement, ...], tuple[int, ...]]]:
    """Yield what a state is, its L2 tables and those without a place: the tables by evidence, then all in file order."""
    if found.placements:
        yield what, found.placements, found.left
    if len(found.in_file_order) > len(found.placements):
        yield f"{what}, tables without a known place in the order of the file", found.in_file_order, ()


class _Recovery:
    """Looks at one file and puts its states together."""

    def __init__(self, source: Source, virtual_size: int | None) -> None:
        self._source = MeteredSource(source)
        self._virtual_size = virtual_size
        self._l1_bytes = REBUILT_L1_BYTES  # that sizes in the evidence may still ask for
        self._room = Budget.up_to("L2 tables of recovered states", source.size // SECTOR + RECOVERED_TABLES)

    def states(self) -> list[RecoveredState]:
        """Return the states; those found before the work is too much, with a note that says so, or that as an error."""
        found: list[RecoveredState] = []
        try:
            found.extend(self._states())
        except LimitExceeded as error:
            if not found:
                raise
            note = f"more states may be left, which were not looked for: {error}"
            logging.getLogger("qcow2_forensics").warning("%s", note)
            found = [replace(state, notes=(*state.notes, note), is_search_complete=False) for state in found]
        return found

    def _states(self) -> Iterator[RecoveredState]:
        image = self._image()
        if image is None:
            yield from self._inner_images()
            yield from self._without_header()
        else:
            yield from self._with_header(image)

    def _image(self) -> Image | None:
        """Return the image when its header can be used, None when it is lost."""
        try:
            image = Image(self._source, owns_source=False)
            image.require(DISK)
        except Qcow2Error:
            return None
        return image

    # --- a whole image further back in the file ---------------------------------------------------

    def _inner_images(self) -> Iterator[RecoveredState]:
        for at in islice(self._magics(), INNER_IMAGES_SEARCHED):
            window = WindowSource(self._source, at, None)
            try:
                with open_disk(window, follow=False) as disk:
                    size, cluster_size, named = disk.size, disk.image.cluster_size, disk.image.backing_name
                placed = placed_by_image(window, self._room)
            except LimitExceeded:
                raise
            except (Qcow2Error, OSError):
                continue
            yield RecoveredState(
                0,
                f"an image that starts at host offset {at:#x}",
                size,
                "its header",
                cluster_size,
                placed,
                backing_unknown=named is not None,
                start=at,
            )

    def _magics(self) -> Iterator[int]:
        for at, length in stored_pieces(self._source, _READ):
            data = self._source.read(at, length)
            rows = np.frombuffer(data, ">u4", count=len(data) // SECTOR * (SECTOR // 4)).reshape(-1, SECTOR // 4)
            hits = np.flatnonzero(rows[:, 0] == int.from_bytes(MAGIC, "big")) if len(rows) else ()
            yield from (at + int(row) * SECTOR for row in hits if at + row)

    # --- without a header ------------------------------------------------------------------------

    def _without_header(self) -> Iterator[RecoveredState]:
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
            compression = self._compression(tables, geometry)
        notes = (f"clusters of {geometry.cluster_size} bytes: {found.evidence}", *left_out_notes(tables))
        tables = _with_whole_l1_tables(self._source, tables)
        named = {entry.l1_table_offset: entry for entry in tables.snapshots}
        found_l1 = sorted(tables.l1, key=lambda table: rank(table, named, refcounts))
        if len(found_l1) > RECOVERED_STATES:
            notes = (
                *notes,
                f"{len(found_l1) - RECOVERED_STATES} more L1 tables were found than states are put together",
            )
        if _active_is_missing(tables, refcounts):
            yield from self._placed(geometry, tables, compression, notes, refcounts)
        for table in found_l1[:RECOVERED_STATES]:
            entry = named.get(table.offset)
            self._room.spend(int(np.count_nonzero(table.targets)))
            placements = tuple(placements_of(table, tables, refcounts))
            yield self._rebuilt(
                f"the disk of the L1 table at host offset {table.offset:#x}"
                + (f", snapshot {entry.id}" if entry else ""),
                geometry,
                placements,
                compression,
                notes,
                entry.disk_size if entry is not None else None,
            )

    def _compression(self, tables: FoundTables, geometry: Geometry) -> int | None:
        for offset in tables.l2[:16].tolist():
            words = table_words(self._source, offset, geometry)[:: 2 if geometry.extended_l2 else 1]
            packed = words[words >> np.uint64(62) == 1].tolist()
            if packed:
                return compression_type_of(self._source, packed, geometry.cluster_bits)
        return None

    def _placed(
        self,
        geometry: Geometry,
        tables: FoundTables,
        compression: int | None,
        notes: tuple[str, ...],
        refcounts: FoundRefcounts | None,
    ) -> Iterator[RecoveredState]:
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
        known = tables_by_slot(self._source, geometry, l1_tables)
        opener = TableReader(self._source, geometry, None, compression)
        shared += named_by_former(former, offsets, {placed.slot for placed in shared})
        offsets = [at for at in offsets if all(at != placed.offset for placed in shared)]
        found = arranged(opener, offsets, geometry, known, self._virtual_size, tuple(shared))
        for what, placements, left in _ways("L2 tables without an L1 table", found):
            state = self._rebuilt(what, geometry, placements, compression, notes, None)
            yield replace(state, unplaced=left)

    def _rebuilt(
        self,
        what: str,
        geometry: Geometry,
        placements: tuple[Placement, ...],
        compression: int | None,
        notes: tuple[str, ...],
        recorded_size: int | None,
    ) -> RecoveredState:
        span = table_span(geometry)
        slots = max((placed.slot for placed in placements), default=-1) + 1

        def patches_of(size: int) -> tuple[tuple[int, bytes], ...]:
            entries = max(slots, -(-size // span))
            table = stored_l1(placements, entries)  # first: it refuses what a header has no room for
            header = new_header(
                cluster_bits=geometry.cluster_bits,
                size=size,
                l1_size=entries,
                extended_l2=geometry.extended_l2,
                compression_type=compression,
            )
            return (0, header), (REBUILT_AT, table)

        whole_disk = PatchedSource(self._source, patches_of(slots * span))
        size, size_from = self._size(whole_disk, geometry, placements, recorded_size)
        return RecoveredState(
            0, what, size, size_from, geometry.cluster_size, placements, True, notes, patches=patches_of(size)
        )

    def _size(
        self, source: Source, geometry: Geometry, placements: tuple[Placement, ...], recorded: int | None
    ) -> tuple[int, str]:
        """Return the virtual size and where it comes from; sizes in the evidence are taken as far as they can be mapped."""
        if self._virtual_size is not None:
            return self._virtual_size, "the caller"
        if recorded is not None and self._takes(recorded, geometry):
            return recorded, "its snapshot table entry"
        mapped = 0
        if placements:
            used = np.flatnonzero(table_words(self._source, placements[-1].offset, geometry))
            words = 2 if geometry.extended_l2 else 1
            last = int(used[-1]) // words + 1 if len(used) else 0
            mapped = placements[-1].slot * table_span(geometry) + last * geometry.cluster_size
        try:
            with open_disk(source, follow=False) as disk:
                implied = disk_size_of(disk.read)
        except (Qcow2Error, OSError):
            implied = None
        if implied is not None and mapped <= implied[0] and self._takes(implied[0], geometry):
            return implied
        refused = recorded is not None or (implied is not None and implied[0] > mapped)
        more = "; a larger size that the evidence states is left out" if refused else ""
        return mapped, f"the end of the last mapped cluster{more}"

    def _takes(self, size: int, geometry: Geometry) -> bool:
        """Whether a size found in the evidence leaves room for the L1 tables of the other states; it is counted then."""
        needed = 8 * -(-size // table_span(geometry))
        if needed > min(self._l1_bytes, 8 * L1_ENTRIES):
            return False
        self._l1_bytes -= needed
        return True

    # --- with a header ---------------------------------------------------------------------------

    def _with_header(self, image: Image) -> Iterator[RecoveredState]:
        header = image.header
        if header.version == 1 or header.external_data:
            return
        geometry = Geometry.of(image)
        tables = search_tables(self._source, geometry)
        refcounts = FoundRefcounts(
            self._source,
            header.refcount_table_offset,
            header.refcount_table_clusters * header.cluster_size,
            header.cluster_size,
            header.refcount_order,
        )
        active = read_l1(self._source, header.l1_table_offset, header.l1_size)
        snapshots = snapshot_l1_tables(self._source, image.snapshots)
        named = {int(at) for table in (active, *snapshots) for at in named_offsets(table).tolist() if at}
        own = own_clusters(image)
        free = [at for at in tables.l2.tolist() if at not in named and at not in own]
        lost = [at for at in free if refcounts.of(at)]
        if not is_l1(active, tables) and not names_counted(active, geometry, refcounts):
            known = tables_by_slot(self._source, geometry, snapshots)
            shared = shared_with_snapshots(snapshots, refcounts, len(active))
            yield from self._with_lost_l1(image, geometry, lost, known, shared)
            return
        census = _census(image)
        if census is not None:
            yield from self._with_lost_tables(image, geometry, active, snapshots, free, census)
        former = [at for at in free if refcounts.of(at) == 0]
        if former:
            yield from self._former(image, geometry, former, active, snapshots, refcounts)
        if census is not None:
            yield from vm_states(self._source, geometry, census, free, self._room)

    def _with_lost_tables(
        self,
        image: Image,
        geometry: Geometry,
        active: U64,
        snapshots: list[U64],
        free: list[int],
        census: Census,
    ) -> Iterator[RecoveredState]:
        """Yield the active state with other tables in place of L2 tables that were overwritten."""
        targets = dict(_used(active))
        leaks = leaked_clusters(census)
        lost = lost_slots(self._source, geometry, targets, leaks)
        if not lost:
            return
        reader = TableReader(self._source, geometry, image, image.header.compression_type)
        known = tables_by_slot(self._source, geometry, snapshots)
        others = [Unplaced(at, entries_of(self._source, at, geometry), {}) for at in free]
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
        rebuilt = rebuild(reader, self._source, geometry, targets, lost, older, leaks, self._use(geometry))
        whole = [
            Placement(slot, at, Confidence.CERTAIN, "the image's own L1 table")
            for slot, at in targets.items()
            if slot not in lost
        ]
        placements = tuple(sorted((*whole, *rebuilt.placements)))
        what = f"the active state, {len(lost)} of its L2 tables lost"
        yield self._patched(image, what, image.disk_size, placements, rebuilt.patches)

    def _use(self, geometry: Geometry) -> UseOf:
        return lambda reader, placed: use_by_file_systems(reader, geometry, placed)

    def _with_lost_l1(
        self,
        image: Image,
        geometry: Geometry,
        offsets: list[int],
        known: dict[int, list[U64]],
        shared: list[Placement],
    ) -> Iterator[RecoveredState]:
        header = image.header
        size = self._virtual_size or image.disk_size
        opener = TableReader(self._source, geometry, image, header.compression_type)
        found = arranged(opener, offsets, geometry, known, size, tuple(shared))
        for what, placements, left in _ways("the active state, its L1 table rebuilt", found):
            yield replace(self._patched(image, what, size, placements), unplaced=left)

    def _patched(
        self,
        image: Image,
        what: str,
        size: int,
        placements: tuple[Placement, ...],
        tables: tuple[tuple[int, bytes], ...] = (),
    ) -> RecoveredState:
        count = max(image.header.l1_size, -(-size // image.header.l2_span))
        table = stored_l1(placements, count)
        patches = (l1_fields(count), (24, size.to_bytes(8, "big")), (REBUILT_AT, table), *tables)
        return RecoveredState(
            0,
            what,
            size,
            "the caller" if self._virtual_size else "the header",
            image.cluster_size,
            placements,
            backing_unknown=False,
            patches=patches,
        )

    def _former(
        self,
        image: Image,
        geometry: Geometry,
        offsets: list[int],
        active: U64,
        snapshots: list[U64],
        refcounts: FoundRefcounts,
    ) -> Iterator[RecoveredState]:
        """Yield the active state that free L2 tables belonged to, before the disk went back to a snapshot."""
        known = tables_by_slot(self._source, geometry, [*snapshots, active])
        tables = [Unplaced(at, entries_of(self._source, at, geometry), {}) for at in offsets]
        placed = place(tables, known, len(active), geometry.cluster_size, ordered=False)
        usable = [p for p in placed.placements if self._is_free(p, geometry, known, refcounts)]
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
        yield self._patched(image, f"a former active state: {len(usable)} free L2 tables", image.disk_size, placements)

    def _is_free(
        self, placed: Placement, geometry: Geometry, known: dict[int, list[U64]], refcounts: FoundRefcounts
    ) -> bool:
        """Whether what a former table names is still its own: free, or shared with a table in use at the same place."""
        entries = entries_of(self._source, placed.offset, geometry)
        shared = np.zeros(len(entries), np.bool_)
        for others in known.get(placed.slot, ()):
            shared |= without_copied(entries) == without_copied(others)
        own = named_offsets(entries[~shared & (entries >> np.uint64(62) != 1)])
        return not any(refcounts.of(int(at)) for at in own[own != 0].tolist())
