"""States that no header or L1 table leads to any more, found by their tables and offered as disks.

::

    what is lost                 what is used instead
    header, or its first bytes   the form of the tables: cluster size, L1 table, refcounts
    L1 table                     L2 tables placed by snapshots, content and order
    nothing: the disk reverted   free L2 tables that share clusters with those in use
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import NotQcow2, Qcow2Error, SnapshotNotFound
from ..format.entries import COPIED, OFFSET_MASK
from ..format.header import MAGIC
from ..format.image import Image
from ..format.rules import DISK
from ..format.snapshot_table import SnapshotEntry
from ..format.source import PathOrSource, Source, as_source
from ..limits import MiB
from ..reader.disk import Disk
from ..reader.mapping import Kind
from ..reader.opening import open_disk
from ..residue.structure_detection import Geometry
from .confidence import Confidence, SureRange
from .geometry import U64, find_geometry, has_deflate_or_zstd
from .header import l1_fields, new_header
from .patched_source import REBUILT_AT, PatchedSource, Window
from .placement import Placement, Unplaced, place
from .positions import disk_size_of, empty, file_system_starts, note_file_systems, positions, slots
from .refcounts import FoundRefcounts, find_refcounts
from .table_search import FoundTables, L1Candidate, search_tables, table_words

_READ = 4 * MiB
_CONTENT = 64 * MiB  # guest data read under one L2 table to find out where it belongs
_VOTES = 4096  # structures per table that are asked where they belong
_SECTOR = 512
_MAX_L1 = 4 * MiB  # entries, what QEMU accepts


@dataclass(frozen=True)
class RecoveredState:
    """One state put together from what is left. ``number`` chooses it: ``recovered:1`` is the best.

    ``size`` is in bytes; ``size_from`` says where it comes from. ``placements`` are the L1 slots in
    use with how sure they are; ``backing_unknown`` is set where a lost header may have named a backing file.
    """

    number: int
    what: str
    size: int
    size_from: str
    cluster_size: int
    placements: tuple[Placement, ...]
    backing_unknown: bool
    notes: tuple[str, ...] = ()
    _source: Source = field(repr=False, default=None)  # type: ignore[assignment]

    @property
    def label(self) -> str:
        """What to call it in listings."""
        return f"recovered:{self.number}"

    @property
    def confidence(self) -> Confidence:
        """How sure the least sure of its placed ranges is; a guess where there is none."""
        return min((placed.confidence for placed in self.placements), default=Confidence.GUESS)

    def open(self, **options: Any) -> Disk:
        """Return the state as a disk; ``options`` are those of :func:`qcow2_forensics.open_disk`."""
        return open_disk(self._source, None, **options)

    def ranges(self, disk: Disk) -> Iterator[SureRange]:
        """Yield guest ranges that tile ``disk``, opened from this state, with how sure each is."""
        span = disk.image.header.l2_span
        sure = {placed.slot: placed for placed in self.placements}
        pending: SureRange | None = None
        for offset, length, kind in _by_slot(disk, span):
            placed = sure.get(offset // span)
            if placed is None:
                confidence, reason = Confidence.GUESS, "no L2 table was found for it"
            elif kind == Kind.HOLE and self.backing_unknown:
                confidence = min(placed.confidence, Confidence.LIKELY)
                reason = "unallocated; the lost header may have named a backing file"
            else:
                confidence, reason = placed.confidence, placed.reason
            if pending is not None and pending[2:] == (confidence, reason):
                pending = pending._replace(length=pending.length + length)
                continue
            if pending is not None:
                yield pending
            pending = SureRange(offset, length, confidence, reason)
        if pending is not None:
            yield pending


def _by_slot(disk: Disk, span: int) -> Iterator[tuple[int, int, Kind]]:
    """Yield the extents of a disk, cut where one L2 table ends and the next begins."""
    for extent in disk.extents():
        offset, end = extent.offset, extent.offset + extent.length
        while offset < end:
            stop = min(end, (offset // span + 1) * span)
            yield offset, stop - offset, extent.kind
            offset = stop


def recovered_states(origin: PathOrSource, *, virtual_size: int | None = None) -> list[RecoveredState]:
    """Return the states that can be put together from what is left in a file, the best first.

    ``virtual_size`` in bytes is used where nothing in the file gives it. Reads the whole file. An
    empty list says that no table of a QCOW2 image was found besides those in use.
    """
    source = as_source(origin)
    found = list(_Recovery(source, virtual_size).states())
    return [_numbered(state, number) for number, state in enumerate(found, 1)]


def open_recovered(
    origin: PathOrSource, number: int = 1, *, virtual_size: int | None = None, **options: Any
) -> tuple[Disk, RecoveredState]:
    """Open recovered state ``number`` and return it with what is known of it."""
    states = recovered_states(origin, virtual_size=virtual_size)
    if not 1 <= number <= len(states):
        raise SnapshotNotFound(f"recovered:{number}", [state.label for state in states])
    state = states[number - 1]
    return state.open(**options), state


def _numbered(state: RecoveredState, number: int) -> RecoveredState:
    from dataclasses import replace

    return replace(state, number=number)


class _Recovery:
    """Looks at one file and puts its states together."""

    def __init__(self, source: Source, virtual_size: int | None) -> None:
        self._source = source
        self._virtual_size = virtual_size

    def states(self) -> Iterator[RecoveredState]:
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
        for at in self._magics():
            window = Window(self._source, at)
            try:
                with open_disk(window, follow=False) as disk:
                    size, cluster_size, named = disk.size, disk.image.cluster_size, disk.image.backing_name
            except (Qcow2Error, OSError):
                continue
            yield RecoveredState(
                0,
                f"an image that starts at host offset {at:#x}",
                size,
                "its header",
                cluster_size,
                _placed_by_image(window),
                backing_unknown=named is not None,
                _source=window,
            )

    def _magics(self) -> Iterator[int]:
        for at in range(0, self._source.size, _READ):
            data = self._source.read(at, min(_READ, self._source.size - at))
            rows = np.frombuffer(data, ">u4", count=len(data) // _SECTOR * (_SECTOR // 4)).reshape(-1, _SECTOR // 4)
            hits = np.flatnonzero(rows[:, 0] == int.from_bytes(MAGIC, "big")) if len(rows) else ()
            yield from (at + int(row) * _SECTOR for row in hits if at + row)

    # --- without a header ------------------------------------------------------------------------

    def _without_header(self) -> Iterator[RecoveredState]:
        found = find_geometry(self._source)
        if found is None:
            return
        geometry = Geometry(3, found.cluster_bits, self._source.size, found.extended_l2)
        tables = search_tables(self._source, geometry)
        refcounts = find_refcounts(
            self._source, tables.refcount_tables, geometry.cluster_size, [table.offset for table in tables.l1]
        )
        compression = found.compression_type
        if compression is None:
            compression = self._compression(tables, geometry)
        notes = (f"clusters of {geometry.cluster_size} bytes: {found.evidence}", *_left_out(tables))
        named = {entry.l1_table_offset: entry for entry in tables.snapshots}
        for table in sorted(tables.l1, key=lambda table: _rank(table, named, refcounts)):
            entry = named.get(table.offset)
            placements = tuple(_of_l1(table, tables, refcounts))
            yield self._rebuilt(
                f"the disk of the L1 table at host offset {table.offset:#x}"
                + (f", snapshot {entry.id}" if entry else ""),
                geometry,
                placements,
                compression,
                notes,
                entry.disk_size if entry is not None else None,
            )
        if not tables.l1 and len(tables.l2):
            yield from self._placed(geometry, tables, compression, notes, refcounts)

    def _compression(self, tables: FoundTables, geometry: Geometry) -> int | None:
        for offset in tables.l2[:16].tolist():
            words = table_words(self._source, offset, geometry)[:: 2 if geometry.extended_l2 else 1]
            packed = words[words >> np.uint64(62) == 1].tolist()
            if packed:
                return has_deflate_or_zstd(self._source, packed, geometry.cluster_bits)
        return None

    def _placed(
        self,
        geometry: Geometry,
        tables: FoundTables,
        compression: int | None,
        notes: tuple[str, ...],
        refcounts: FoundRefcounts | None,
    ) -> Iterator[RecoveredState]:
        """Yield the state of L2 tables without an L1 table and without a header."""
        offsets = [at for at in tables.l2.tolist() if refcounts is None or refcounts.of(at) != 0]
        if not offsets:
            return
        span = _span(geometry)
        slots_ = -(-self._virtual_size // span) if self._virtual_size else len(offsets)
        opener = _TableReader(self._source, geometry, None, compression)
        placements = tuple(place(list(_unplaced(opener, offsets, span, max(slots_, _MAX_L1))), {}, slots_))
        yield self._rebuilt("L2 tables without an L1 table", geometry, placements, compression, notes, None)

    def _rebuilt(
        self,
        what: str,
        geometry: Geometry,
        placements: tuple[Placement, ...],
        compression: int | None,
        notes: tuple[str, ...],
        recorded_size: int | None,
    ) -> RecoveredState:
        l1_table = _l1_table(placements)
        whole = len(l1_table) * _span(geometry)

        def source_of(size: int) -> PatchedSource:
            header = new_header(
                cluster_bits=geometry.cluster_bits,
                size=size,
                l1_size=max(len(l1_table), -(-size // _span(geometry))),
                extended_l2=geometry.extended_l2,
                compression_type=compression,
            )
            padded = l1_table.astype(">u8").tobytes().ljust(8 * max(len(l1_table), -(-size // _span(geometry))), b"\0")
            return PatchedSource(self._source, [(0, header), (REBUILT_AT, padded)])

        size, size_from = self._size(source_of(whole), recorded_size)
        return RecoveredState(
            0, what, size, size_from, geometry.cluster_size, placements, True, notes, _source=source_of(size)
        )

    def _size(self, source: Source, recorded: int | None) -> tuple[int, str]:
        """Return the virtual size and where it comes from."""
        if self._virtual_size is not None:
            return self._virtual_size, "the caller"
        if recorded is not None:
            return recorded, "its snapshot table entry"
        with open_disk(source, follow=False) as disk:
            mapped = max((e.offset + e.length for e in disk.extents() if e.kind != Kind.HOLE), default=0)
            try:
                implied = disk_size_of(disk.read)
            except (Qcow2Error, OSError):
                implied = None
        if implied is not None and mapped <= implied[0] <= 1 << 60:
            return implied
        return mapped, "the end of the last mapped cluster"

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
        active = _table(self._source, header.l1_table_offset, header.l1_size)
        snapshots = [_table(self._source, e.l1_table_offset, e.l1_size) for e in image.snapshots]
        named = {int(at) for table in (active, *snapshots) for at in (table & np.uint64(OFFSET_MASK)).tolist() if at}
        free = [at for at in tables.l2.tolist() if at not in named]
        lost = [at for at in free if refcounts.of(at)]
        if not (active & np.uint64(OFFSET_MASK)).any() or not _is_l1(active, tables):
            known = _known(self._source, geometry, snapshots)
            shared = _shared(snapshots, refcounts, len(active))
            yield from self._with_lost_l1(image, geometry, lost, known, shared)
            return
        former = [at for at in free if refcounts.of(at) == 0]
        if former:
            yield from self._former(image, geometry, former, active, snapshots, refcounts)

    def _with_lost_l1(
        self,
        image: Image,
        geometry: Geometry,
        offsets: list[int],
        known: dict[int, list[U64]],
        shared: list[Placement],
    ) -> Iterator[RecoveredState]:
        header = image.header
        span, size = header.l2_span, self._virtual_size or image.disk_size
        count = -(-size // span)
        opener = _TableReader(self._source, geometry, image, header.compression_type)
        own = place(list(_unplaced(opener, offsets, span, count)), known, count)
        by_slot = {placed.slot: placed for placed in shared if placed.slot < count}
        by_slot.update({placed.slot: placed for placed in own})
        if by_slot:
            placements = tuple(by_slot[index] for index in sorted(by_slot))
            yield self._patched(image, "the active state, its L1 table rebuilt", size, placements)

    def _patched(self, image: Image, what: str, size: int, placements: tuple[Placement, ...]) -> RecoveredState:
        count = max(image.header.l1_size, -(-size // image.header.l2_span))
        table = _l1_table(placements)
        padded = table.astype(">u8").tobytes().ljust(8 * count, b"\0")
        patches = [l1_fields(count), (24, size.to_bytes(8, "big")), (REBUILT_AT, padded)]
        return RecoveredState(
            0,
            what,
            size,
            "the caller" if self._virtual_size else "the header",
            image.cluster_size,
            placements,
            backing_unknown=False,
            _source=PatchedSource(self._source, patches),
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
        known = _known(self._source, geometry, [*snapshots, active])
        tables = [Unplaced(at, _entries(self._source, at, geometry), {}) for at in offsets]
        placed = [p for p in place(tables, known, len(active)) if p.confidence != Confidence.GUESS]
        usable = [p for p in placed if self._is_free(p, geometry, known, refcounts)]
        if not usable:
            return
        by_slot = {
            index: Placement(index, int(at), Confidence.LIKELY, "the table in use now")
            for index, at in enumerate((active & np.uint64(OFFSET_MASK)).tolist())
            if at
        }
        for p in usable:
            by_slot[p.slot] = p._replace(confidence=Confidence.LIKELY, reason=f"a free table: {p.reason}")
        placements = tuple(by_slot[index] for index in sorted(by_slot))
        yield self._patched(image, f"a former active state: {len(usable)} free L2 tables", image.disk_size, placements)

    def _is_free(
        self, placed: Placement, geometry: Geometry, known: dict[int, list[U64]], refcounts: FoundRefcounts
    ) -> bool:
        """Whether what a former table names is still its own: free, or shared with a table in use at the same place."""
        entries = _entries(self._source, placed.offset, geometry)
        shared = np.zeros(len(entries), np.bool_)
        for others in known.get(placed.slot, ()):
            shared |= entries & ~np.uint64(COPIED) == others & ~np.uint64(COPIED)
        own = entries[~shared & (entries >> np.uint64(62) != 1)] & np.uint64(OFFSET_MASK)
        return not any(refcounts.of(int(at)) for at in own[own != 0].tolist())


# --- tables ------------------------------------------------------------------------------------------


def _span(geometry: Geometry) -> int:
    return geometry.cluster_size * (geometry.cluster_size // (16 if geometry.extended_l2 else 8))


def _table(source: Source, offset: int, count: int) -> U64:
    data = source.read(offset, max(0, min(count * 8, source.size - offset)))
    return np.frombuffer(data.ljust(count * 8, b"\0"), ">u8").astype(np.uint64)


def _entries(source: Source, offset: int, geometry: Geometry) -> U64:
    return table_words(source, offset, geometry)[:: 2 if geometry.extended_l2 else 1]


def _l1_table(placements: tuple[Placement, ...]) -> U64:
    table = np.zeros(max((placed.slot for placed in placements), default=-1) + 1, np.uint64)
    for placed in placements:
        table[placed.slot] = np.uint64(placed.offset | COPIED)
    return table


def _is_l1(table: U64, tables: FoundTables) -> bool:
    """Whether most of what an L1 table names still looks like L2 tables."""
    targets = (table & np.uint64(OFFSET_MASK)).astype(np.int64)
    targets = targets[targets != 0]
    return bool(np.isin(targets, tables.l2).mean() >= 0.5) if len(targets) else False


def _of_l1(table: L1Candidate, tables: FoundTables, refcounts: FoundRefcounts | None) -> Iterator[Placement]:
    """Yield the slots of an L1 table that was found by its form."""
    counted = refcounts is not None and bool(refcounts.of(table.offset))
    for index in np.flatnonzero(table.targets).tolist():
        target = int(table.targets[index])
        if not np.isin(target, tables.l2):
            yield Placement(
                index, target, Confidence.GUESS, "the L1 table names it, but it does not look like an L2 table"
            )
        elif index < table.sure and counted and refcounts is not None and refcounts.of(target):
            yield Placement(index, target, Confidence.CERTAIN, "the L1 table names it, and both are counted as in use")
        else:
            yield Placement(index, target, Confidence.LIKELY, "an L1 table found by its form names it")


def _rank(
    table: L1Candidate, named: dict[int, SnapshotEntry], refcounts: FoundRefcounts | None
) -> tuple[bool, bool, int, int]:
    """Return the key that sorts L1 tables, the active state's first: no snapshot's, counted, largest."""
    unused = refcounts is not None and not refcounts.of(table.offset)
    return table.offset in named, unused, -int(np.count_nonzero(table.targets)), table.offset


def _placed_by_image(source: Source) -> tuple[Placement, ...]:
    with Image(source, owns_source=False) as image:
        table = _table(source, image.header.l1_table_offset, image.header.l1_size) & np.uint64(OFFSET_MASK)
    used = np.flatnonzero(table).tolist()
    return tuple(Placement(i, int(table[i]), Confidence.CERTAIN, "the image's own L1 table") for i in used)


def _left_out(tables: FoundTables) -> tuple[str, ...]:
    return (f"{tables.left_out} more tables were found than are kept",) if tables.left_out else ()


def _known(source: Source, geometry: Geometry, l1_tables: list[U64]) -> dict[int, list[U64]]:
    """Return the entries of the L2 tables that L1 tables name, by slot, each table once."""
    known: dict[int, dict[int, U64]] = {}
    for table in l1_tables:
        targets = table & np.uint64(OFFSET_MASK)
        for index in np.flatnonzero(targets).tolist():
            at = int(targets[index])
            if at + geometry.cluster_size <= source.size and at not in known.setdefault(index, {}):
                known[index][at] = _entries(source, at, geometry)
    return {index: list(versions.values()) for index, versions in known.items()}


def _shared(snapshots: list[U64], refcounts: FoundRefcounts, slots_: int) -> list[Placement]:
    """Return the L2 tables of snapshots that the active state shares, by their refcounts."""
    uses: dict[tuple[int, int], int] = {}
    for table in snapshots:
        targets = table & np.uint64(OFFSET_MASK)
        for index in np.flatnonzero(targets).tolist():
            uses[index, int(targets[index])] = uses.get((index, int(targets[index])), 0) + 1
    return [
        Placement(index, at, Confidence.CERTAIN, f"its refcount is one more than the {count} snapshots that share it")
        for (index, at), count in uses.items()
        if index < slots_ and (refcounts.of(at) or 0) == count + 1
    ]


# --- content -----------------------------------------------------------------------------------------


class _TableReader:
    """Reads what one L2 table maps, as the guest bytes from 0 on."""

    def __init__(self, source: Source, geometry: Geometry, image: Image | None, compression: int | None) -> None:
        self._source = source
        self._geometry = geometry
        self._image = image
        self._compression = compression

    def disk(self, offset: int) -> Disk:
        """Return the disk that the L2 table at a host offset alone maps."""
        span = _span(self._geometry)
        entry = (offset | COPIED).to_bytes(8, "big")
        if self._image is not None:
            patches = [l1_fields(1), (24, span.to_bytes(8, "big")), (REBUILT_AT, entry)]
        else:
            header = new_header(
                cluster_bits=self._geometry.cluster_bits,
                size=span,
                l1_size=1,
                extended_l2=self._geometry.extended_l2,
                compression_type=self._compression,
            )
            patches = [(0, header), (REBUILT_AT, entry)]
        return open_disk(PatchedSource(self._source, patches), follow=False)

    def entries(self, offset: int) -> U64:
        """Return the entries of the table."""
        return _entries(self._source, offset, self._geometry)

    def pieces(self, offset: int) -> Iterator[tuple[int, bytes]]:
        """Yield (offset under the table, bytes) of what is stored, at most 64 MiB spread over it; nothing unreadable."""
        try:
            with self.disk(offset) as disk:
                if disk.is_locked:
                    return
                stored = [e for e in disk.extents() if e.kind in (Kind.DATA, Kind.COMPRESSED)]
                step = max(1, sum(e.length for e in stored) // _CONTENT)
                for number, extent in enumerate(_cut(stored)):
                    if number % step == 0:
                        yield extent[0], disk.read(*extent)
        except (Qcow2Error, OSError):
            return


def _cut(extents: list[Any]) -> Iterator[tuple[int, int]]:
    for extent in extents:
        for at in range(extent.offset, extent.offset + extent.length, MiB):
            yield at, min(MiB, extent.offset + extent.length - at)


def _unplaced(reader: _TableReader, offsets: list[int], span: int, slots_: int) -> Iterator[Unplaced]:
    """Yield L2 tables with the slots that their content agrees with."""
    known = empty()
    found: dict[int, list[Any]] = {}
    starts: set[int] = set(file_system_starts(bytes(1024)))
    for offset in offsets:
        kept: list[tuple[int, bytes]] = []
        for at, data in reader.pieces(offset):
            note_file_systems(known, data)
            if at == 0 and data[510:512] == b"\x55\xaa":
                starts.update(file_system_starts(data[: 64 * 512]))
            kept += _structures(at, data)
        found[offset] = kept[:_VOTES]
    for offset in offsets:
        seen = [position for at, data in found[offset] for position in positions(known, at, data)]
        yield Unplaced(offset, reader.entries(offset), slots(seen, sorted(starts), span, slots_))


def _structures(at: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    from .positions import sectors_with_structures

    for place_ in sectors_with_structures(data):
        yield at + place_, data[place_ : place_ + _SECTOR]


__all__ = ["NotQcow2", "RecoveredState", "open_recovered", "recovered_states"]
