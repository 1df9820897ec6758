"""Rules about bytes no state of the disk shows (section "residual")."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from .. import structures
from ..census import Owner
from ..errors import Qcow2Error
from ..findings import EVIDENCE_LIMIT, Evidence, Finding, Severity
from ..residue import DeletedSnapshot, Piece, Residue, hidden, streams
from ..residue.deleted import examine
from ..source import FileSource
from ..structures import Autoclear, BitmapEntry, SnapshotEntry
from .facts import Facts
from .history import date_of, machine_type
from .names import chain
from .pieces import evidence_of
from .rules import CRAFTED, QEMU_MADE, Depth, rule, variant

_DELETED = 100  # former snapshots followed into their tables
_RANGES = 1_000_000  # pieces kept for the map
_METADATA = ("l1", "l2", "refcount-table", "refcounts", "snapshot-table", "bitmap-directory", "bitmap")


# --- one pass over everything unclaimed ----------------------------------------------------------


@dataclass
class _Group:
    """Pieces of one kind: the first ones, and what all of them add up to."""

    kept: list[Piece] = field(default_factory=list)
    count: int = 0
    nonzero: int = 0

    def add(self, piece: Piece) -> None:
        if len(self.kept) < EVIDENCE_LIMIT:
            self.kept.append(piece)
        self.count += 1
        self.nonzero += piece.nonzero


@dataclass
class _Survey:
    groups: defaultdict[tuple[str, str], _Group] = field(default_factory=lambda: defaultdict(_Group))
    snapshots: list[SnapshotEntry] = field(default_factory=list)
    bitmaps: list[BitmapEntry] = field(default_factory=list)
    deleted: list[DeletedSnapshot] = field(default_factory=list)
    ranges: list[tuple[int, int]] = field(default_factory=list)  # (offset, length) of the first pieces

    def mark(self, looks: str, clusters: set[int], size: int) -> None:
        """Let the pieces kept that lie wholly in some clusters look like something they were."""
        for (kind, look), group in list(self.groups.items()) if clusters else ():
            if look not in ("data", "l2"):
                continue
            inside = [
                piece
                for piece in group.kept
                if clusters.issuperset(range(piece.offset, piece.offset + piece.length, size))
            ]
            for piece in inside:
                group.kept.remove(piece)
                group.count -= 1
                group.nonzero -= piece.nonzero
                self.groups[kind, looks].add(replace(piece, looks=looks))

    def of(self, kinds: Iterable[str], looks: Iterable[str]) -> _Group:
        """Return the groups of some kinds and looks as one."""
        merged = _Group()
        for kind in kinds:
            for look in looks:
                group = self.groups.get((kind, look))
                if group is not None:
                    merged.kept += group.kept
                    merged.count += group.count
                    merged.nonzero += group.nonzero
        merged.kept.sort(key=lambda piece: piece.offset)
        return merged


def survey_of(facts: Facts) -> _Survey:
    """Return what a deep look at everything unclaimed found; made once per audit."""
    return facts.once(_survey)


def _survey(facts: Facts) -> _Survey:
    residue = Residue(facts.image, census=facts.census)
    survey = _Survey()
    for found in residue.unclaimed():
        survey.groups[found.piece.kind, found.piece.looks].add(found.piece)
        if len(survey.ranges) < _RANGES:
            survey.ranges.append((found.piece.offset, found.piece.length))
    survey.snapshots, survey.bitmaps = residue.entries()
    survey.mark("bitmap", residue.former_bitmap_clusters(), facts.cluster_size)
    survey.deleted = examine(facts.image, survey.snapshots[:_DELETED], facts.census)
    return survey


def _finding(code: str, group: _Group, severity: Severity | None = None, title: str = "") -> Iterator[Finding]:
    if group.count:
        evidence = [evidence_of(piece) for piece in group.kept]
        yield variant(code, evidence, severity=severity, title=title, count=group.count)


@rule(
    "QCOW2-RESIDUAL-CLUSTERS",
    Severity.MEDIUM,
    "free clusters hold data",
    note="consistent with remains of deleted snapshots, or of discarded or overwritten data",
    when="a cluster with refcount 0 that nothing refers to is not all zeros; Low where it is a former table",
    harmless="QEMU leaves former L1, L2 and bitmap tables behind in ordinary use",
    depth=Depth.DEEP,
    validated=QEMU_MADE,
)
def residual_clusters(facts: Facts) -> Iterator[Finding]:
    survey = survey_of(facts)
    yield from _finding("QCOW2-RESIDUAL-CLUSTERS", survey.of(["free"], ["data", "vm-state"]))
    former = survey.of(["free"], _METADATA)
    yield from _finding("QCOW2-RESIDUAL-CLUSTERS", former, Severity.LOW, "free clusters hold former tables")


@rule(
    "QCOW2-LEAKED-DATA",
    Severity.MEDIUM,
    "unreferenced clusters that are counted as used hold data",
    note="accounted yet unreachable: consistent with an interrupted operation, or with a hiding place that survives "
    "writes",
    when="a cluster with a refcount above 0 that nothing refers to is not all zeros",
    harmless="crashes leave such clusters",
    depth=Depth.DEEP,
    explained_by=("QCOW2-DIRTY",),
)
def leaked_data(facts: Facts) -> Iterator[Finding]:
    yield from _finding("QCOW2-LEAKED-DATA", survey_of(facts).of(["leaked"], ["data", "vm-state", *_METADATA]))


@rule(
    "QCOW2-TRAILING-DATA",
    Severity.MEDIUM,
    "data after the end of the image",
    note="consistent with appended data, with concatenated files, or with clusters abandoned at the end",
    when="bytes after the last referenced or counted cluster are not zeros",
    harmless="former tables at the end are Low; zeros there are common and not reported",
    depth=Depth.DEEP,
    validated=CRAFTED,
)
def trailing_data(facts: Facts) -> Iterator[Finding]:
    survey = survey_of(facts)
    yield from _finding("QCOW2-TRAILING-DATA", survey.of(["trailing"], ["data", "vm-state"]))
    yield from _finding(
        "QCOW2-TRAILING-DATA", survey.of(["trailing"], _METADATA), Severity.LOW, "former tables after the image's end"
    )


# --- former tables -------------------------------------------------------------------------------


@rule(
    "QCOW2-RESIDUAL-L1",
    Severity.MEDIUM,
    "a former L1 table",
    note="consistent with a former active table, or with that of a deleted snapshot",
    when="an unreferenced cluster holds only sound L1 entries whose targets parse as L2 tables; Low when all of them "
    "are still in use or empty",
    harmless="growing a disk moves its L1 table",
    depth=Depth.DEEP,
    validated=QEMU_MADE,
)
def residual_l1(facts: Facts) -> Iterator[Evidence | Finding]:
    yield from _tables(facts, "QCOW2-RESIDUAL-L1", "l1")


@rule(
    "QCOW2-RESIDUAL-L2",
    Severity.MEDIUM,
    "a former L2 table",
    note="consistent with a former mapping of the guest's disk",
    when="an unreferenced cluster holds only sound L2 entries; Low when nothing is left of what they name",
    harmless="tables of zero flags alone are common",
    depth=Depth.DEEP,
    validated=QEMU_MADE,
)
def residual_l2(facts: Facts) -> Iterator[Evidence | Finding]:
    yield from _tables(facts, "QCOW2-RESIDUAL-L2", "l2")


def _tables(facts: Facts, code: str, looks: str) -> Iterator[Finding]:
    group = survey_of(facts).of(["free", "leaked", "trailing"], [looks])
    if not group.count:
        return
    telling = [piece for piece in group.kept if piece.intact and not piece.zero_only]
    severity = None if telling else Severity.LOW
    evidence = [replace(evidence_of(piece), value=_contents(piece)) for piece in group.kept]
    yield variant(code, evidence, severity=severity, confidence="likely", count=group.count)


def _contents(piece: Piece) -> str:
    return f"{piece.entries} entries, {piece.intact} of their targets unused since and not empty"


@rule(
    "QCOW2-RESIDUAL-SNAPSHOT-ENTRY",
    Severity.MEDIUM,
    "an entry of a former snapshot table",
    note="consistent with a deleted snapshot; entries of live snapshots in older copies of the table are left out",
    when="free space or table slack parses as a snapshot table entry that no live snapshot equals",
    depth=Depth.DEEP,
    validated=QEMU_MADE,
)
def residual_snapshot_entry(facts: Facts) -> Iterator[Evidence]:
    for entry in survey_of(facts).snapshots:
        told = f"ID {entry.id}, {entry.name}, {date_of(entry)}, L1 at {entry.l1_table_offset:#x}"
        yield Evidence("snapshot", told, entry.offset, entry.length, "former snapshot table", snapshot=entry.id)


@rule(
    "QCOW2-RECOVERABLE-SNAPSHOT",
    Severity.HIGH,
    "a snapshot that no table lists can be read",
    note="consistent with a deleted snapshot: its tables survive and its clusters were not reused as far as the image "
    "tells; open it as deleted:OFFSET. A cluster freed and mapped again at the same place cannot be told apart",
    when="a former entry's L1 and L2 tables are intact and no cluster belongs to anything else; Medium when a part is",
    depth=Depth.DEEP,
    validated=QEMU_MADE,
)
def recoverable_snapshot(facts: Facts) -> Iterator[Finding]:
    for item in survey_of(facts).deleted:
        if not item.l1_intact or not item.intact + item.shared + item.compressed:
            continue
        whole = item.complete and not item.unreadable_bytes
        entry = item.entry
        evidence = [
            Evidence("open_as", item.selector, entry.offset, entry.length, "former snapshot table", snapshot=entry.id),
            Evidence("name", entry.name, entry.offset, entry.length, "former snapshot table", snapshot=entry.id),
            Evidence("readable_fraction", round(item.readable, 4), snapshot=entry.id),
            Evidence("l2_tables", item.l2_tables, entry.l1_table_offset, entry.l1_size * 8, "former L1 table"),
            Evidence("lost_l2_tables", item.lost_tables),
            Evidence("intact_clusters", item.intact),
            Evidence("shared_clusters", item.shared),
            Evidence("zeroed_clusters", item.zeroed),
            Evidence("reused_clusters", item.reused),
        ]
        yield variant(
            "QCOW2-RECOVERABLE-SNAPSHOT",
            evidence,
            severity=None if whole else Severity.MEDIUM,
            title="" if whole else "a snapshot that no table lists can be read in part",
            confidence="likely",
        )


@rule(
    "QCOW2-RESIDUAL-BITMAP-DIR",
    Severity.LOW,
    "an entry of a former bitmap directory",
    note="consistent with a removed backup or checkpoint bitmap",
    when="free space or table slack parses as a bitmap directory entry that is not a live one",
    harmless="normal after backups",
    depth=Depth.DEEP,
    validated=QEMU_MADE,
)
def residual_bitmap_dir(facts: Facts) -> Iterator[Evidence]:
    for entry in survey_of(facts).bitmaps:
        told = f"{entry.name}, granularity {entry.granularity}, table at {entry.table_offset:#x}"
        yield Evidence("bitmap", told, entry.offset, entry.length, "former bitmap directory")


# --- hidden inside clusters in use ---------------------------------------------------------------


@rule(
    "QCOW2-ZERO-ALLOC-DATA",
    Severity.LOW,
    "data under a zero flag",
    note="hidden from the guest by the flag: consistent with a zeroing request that kept the old bytes",
    when="a cluster whose entry says zeros is not zeros and no other state shows it",
    harmless="frequent where guests issue WRITE ZEROES",
    depth=Depth.DEEP,
    validated=QEMU_MADE,
)
def zero_alloc_data(facts: Facts) -> Iterator[Evidence]:
    if not facts.header.external_data:
        for piece in hidden.zero_flagged(facts.image, facts.census):
            yield evidence_of(piece)


@rule(
    "QCOW2-SUBCLUSTER-RESIDUE",
    Severity.LOW,
    "data in subclusters that are not allocated",
    note="consistent with zeroed or discarded data, or with older content of a reused cluster",
    when="with extended L2 entries, a subcluster without its allocation bit in any state is not zeros",
    harmless="frequent",
    depth=Depth.DEEP,
    validated=QEMU_MADE,
)
def subcluster_residue(facts: Facts) -> Iterator[Evidence]:
    for piece in hidden.subclusters(facts.image, facts.census):
        yield evidence_of(piece)


@rule(
    "QCOW2-COMPRESSED-SLACK",
    Severity.LOW,
    "data between compressed clusters",
    note="consistent with overwritten compressed clusters",
    when="bytes no live stream consumes are not zeros; Medium when a whole cluster can be decompressed there",
    harmless="gaps are normal after rewrites",
    depth=Depth.DEEP,
    validated=QEMU_MADE,
)
def compressed_slack(facts: Facts) -> Iterator[Finding]:
    streams_found, rest = _Group(), _Group()
    for piece in streams.compressed_slack(facts.image, facts.census):
        (streams_found if piece.looks == "stream" else rest).add(piece)
    if streams_found.count:
        evidence = [
            replace(evidence_of(piece), field="cluster_sha256", value=piece.signature) for piece in streams_found.kept
        ]
        yield variant(
            "QCOW2-COMPRESSED-SLACK",
            evidence,
            severity=Severity.MEDIUM,
            title="overwritten compressed clusters can be decompressed",
            count=streams_found.count,
        )
    yield from _finding("QCOW2-COMPRESSED-SLACK", rest)


@rule(
    "QCOW2-TAIL-BEYOND-DISK",
    Severity.LOW,
    "data behind the end of the disk in its last cluster",
    note="the guest cannot reach it: consistent with an edited size or with embedding",
    when="the disk size is not whole clusters, and the last one is not zeros behind it",
    depth=Depth.DEEP,
)
def tail_beyond_disk(facts: Facts) -> Iterator[Evidence]:
    for piece in hidden.tail(facts.image, facts.census):
        yield evidence_of(piece)


# --- external data files -------------------------------------------------------------------------


def _hidden_in_data_file(facts: Facts) -> tuple[_Group, _Group]:
    """Return what the data file holds under zero flags, and where the image says nothing is."""
    flagged, unmapped = _Group(), _Group()
    member = chain(facts).data
    if member is None or member.status != "found" or not member.path:
        return flagged, unmapped
    try:
        data = FileSource(member.path, regular_only=True)
    except (Qcow2Error, OSError):
        return flagged, unmapped
    try:
        for piece in hidden.data_file_residue(facts.image, data):
            (flagged if piece.kind == "zero-flagged" else unmapped).add(piece)
    finally:
        data.close()
    return flagged, unmapped


@rule(
    "QCOW2-DATAFILE-RESIDUE",
    Severity.MEDIUM,
    "the data file holds bytes the image does not show",
    note="visible in the data file but not through the image: consistent with zeroed or discarded data, or with a file "
    "that held something else before",
    when="bytes where the image says nothing, or beyond the disk, are not zeros; Low under zero flags alone",
    harmless="zeroing keeps old bytes in data files that are not raw",
    depth=Depth.DEEP,
    validated=QEMU_MADE,
)
def datafile_residue(facts: Facts) -> Iterator[Finding]:
    if facts.header.external_data:
        flagged, unmapped = facts.once(_hidden_in_data_file)
        yield from _finding("QCOW2-DATAFILE-RESIDUE", unmapped)
        yield from _finding("QCOW2-DATAFILE-RESIDUE", flagged, Severity.LOW, "the data file keeps zeroed bytes")


@rule(
    "QCOW2-RAW-DATAFILE-DIVERGES",
    Severity.HIGH,
    "the raw data file and the image are two different disks",
    note="the image promises that its data file can be read as a raw disk, and it cannot: one reader sees what "
    "another does not",
    when="autoclear bit 1 is set and the data file is not zeros where the image reads as zeros",
    depth=Depth.DEEP,
)
def raw_datafile_diverges(facts: Facts) -> Iterator[Evidence]:
    if facts.header.external_data and facts.header.autoclear_features & Autoclear.RAW_EXTERNAL_DATA:
        for group in facts.once(_hidden_in_data_file):
            for piece in group.kept:
                if piece.offset < facts.image.disk_size:
                    yield evidence_of(piece)


# --- memory snapshots ----------------------------------------------------------------------------


@rule(
    "QCOW2-VMSTATE-RESIDUE",
    Severity.MEDIUM,
    "the start of a VM state that no snapshot owns",
    note="consistent with a deleted memory snapshot",
    when="an unreferenced cluster, or the active state behind the disk, starts with QEVM and a version",
    depth=Depth.DEEP,
    validated=QEMU_MADE,
)
def vm_state_residue(facts: Facts) -> Iterator[Evidence]:
    for piece in survey_of(facts).of(["free", "leaked", "trailing"], ["vm-state"]).kept:
        yield from _vm_state(facts, piece.offset, f"{piece.kind} clusters")
    for offset in _active_vm_clusters(facts):
        applied = facts.census.owner(offset) & Owner.SNAPSHOT_DATA  # a live snapshot's own, applied since
        if not applied and facts.read(offset, 7) == b"QEVM\0\0\0":
            yield from _vm_state(facts, offset, "active state behind the disk")


def _vm_state(facts: Facts, offset: int, structure: str) -> Iterator[Evidence]:
    head = facts.read(offset, 512)
    yield Evidence("version", int.from_bytes(head[4:8], "big"), offset, 8, structure)
    machine = machine_type(head)
    if machine:
        yield Evidence("machine", machine, offset, 512, structure)


def _first_vm_slot(facts: Facts) -> int:
    return -(-facts.header.size // facts.header.l2_span)


def _active_vm_clusters(facts: Facts) -> Iterator[int]:
    """Yield host offsets of stored clusters the active state maps behind the disk."""
    first = _first_vm_slot(facts)
    for batch in facts.census.tables():
        for row in np.flatnonzero((batch.active > 0) & (batch.index >= first)).tolist():
            entries = batch.entries[row]
            plain = (entries & np.uint64(structures.COMPRESSED)) == 0
            offsets = entries[plain] & np.uint64(structures.OFFSET_MASK)
            yield from np.unique(offsets[offsets != 0])[:1024].tolist()


@rule(
    "QCOW2-VMSTATE-TRACE",
    Severity.LOW,
    "the active state still has room for a VM state",
    note="consistent with an earlier savevm, also after its snapshot was deleted; the number of entries tells the size",
    when="an active L2 table behind the disk holds only empty and zero entries, and no live snapshot has a VM state "
    "of that size",
    harmless="live snapshots with a VM state leave it too and are left out by their size",
    depth=Depth.STANDARD,
    validated=QEMU_MADE,
)
def vm_state_trace(facts: Facts) -> Iterator[Evidence]:
    first = _first_vm_slot(facts)
    slots: list[tuple[int, int, int]] = []
    for batch in facts.census.tables():
        for row in np.flatnonzero((batch.active > 0) & (batch.index >= first)).tolist():
            entries = batch.entries[row]
            offsets = entries & np.uint64(structures.OFFSET_MASK | structures.COMPRESSED)
            if batch.bitmaps is None:
                zeros = int((entries == np.uint64(structures.ZERO)).sum())
            else:
                zeros = int((batch.bitmaps[row] != 0).sum())
            if not offsets.any() and zeros:
                slots.append((int(batch.index[row]), int(batch.offsets[row]), zeros))
    total = sum(zeros for _, _, zeros in slots)
    live = {-(-entry.vm_state_size // facts.cluster_size) for entry in facts.image.snapshots if entry.vm_state_size}
    if total and total not in live:
        for index, offset, zeros in slots:
            at = facts.header.l1_table_offset + index * 8
            yield Evidence("l1_slot", index, at, 8, "L1", guest_offset=index * facts.header.l2_span)
            yield Evidence("zero_entries", zeros, offset, facts.cluster_size, f"L2[{index}]")
        yield Evidence("estimated_vm_state_size", total * facts.cluster_size)
