"""Rules about bytes of clusters in use that no state shows, and about old VM states."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..census import IndexMap, Owner, Tables
from ..census.arrays import I64
from ..findings import Evidence, Severity
from ..format.entries import ZERO
from ..format.image import Image
from ..limits import VM_STATE_CLUSTERS
from ..reader.opening import leftover_vm_state
from ..reader.vm_state import STREAM_HEAD
from ..residue import Piece, hidden, live_mappings, streams
from .facts import Facts, subscribes
from .reference_names import opened_data_file
from .residual import Group, finding_of, survey_of
from .residue_evidence import evidence_of, of_pieces
from .rules import QEMU_MADE, Chapter, Depth, OneFinding
from .undecodable_streams import decoded_streams
from .vm_states import machine_type

rule = Chapter(__name__, "Hidden data and old VM states", depth=Depth.DEEP)


# --- hidden inside clusters in use ---------------------------------------------------------------


rule(
    "QCOW2-ZERO-ALLOC-DATA",
    Severity.LOW,
    "clusters marked as zeros hold data",
    note="the guest reads zeros there: consistent with a request to zero the range that left the old bytes in place",
    when="a cluster whose entry says zeros is not zeros and no other state shows it",
    harmless="frequent where guests issue WRITE ZEROES",
    validated=QEMU_MADE,
)(of_pieces(lambda facts: hidden.zero_flagged(facts.image, facts.census)))


rule(
    "QCOW2-SUBCLUSTER-RESIDUE",
    Severity.LOW,
    "unallocated subclusters hold data",
    note="consistent with zeroed or discarded data, or with older content of a reused cluster",
    when="with extended L2 entries, a subcluster without its allocation bit in any state is not zeros",
    harmless="frequent",
    validated=QEMU_MADE,
)(of_pieces(lambda facts: hidden.subclusters(facts.image, facts.census)))


@rule(
    "QCOW2-COMPRESSED-SLACK",
    Severity.LOW,
    "data between compressed clusters",
    note="consistent with overwritten compressed clusters",
    when="bytes no live stream consumes are not zeros; Medium when a whole cluster can be decompressed there",
    harmless="gaps are normal after rewrites",
    validated=QEMU_MADE,
)
def compressed_slack(facts: Facts) -> Iterator[OneFinding]:
    streams_found, rest = Group(), Group()
    for piece in streams.compressed_slack(facts.image, facts.once(decoded_streams)):
        (streams_found if piece.looks == "stream" else rest).add(piece)
    if streams_found.count:
        evidence = [
            evidence_of(piece)._replace(field="cluster_sha256", value=piece.signature) for piece in streams_found.kept
        ]
        yield OneFinding(
            evidence,
            severity=Severity.MEDIUM,
            title="overwritten compressed clusters can be decompressed",
            count=streams_found.count,
        )
    yield from finding_of(rest)


@rule(
    "QCOW2-TAIL-BEYOND-DISK",
    Severity.LOW,
    "the last cluster holds data past the end of the disk",
    note="the guest cannot reach it: consistent with a disk that was made smaller, with an edited size or with embedding",
    when="the disk does not end with a whole cluster, and the rest of its last cluster is not zeros; what a snapshot of a "
    "larger disk shows is left out",
    harmless="QEMU keeps these bytes when it makes a disk smaller",
    validated=QEMU_MADE,
)
def tail_beyond_disk(facts: Facts) -> Iterator[Evidence]:
    for piece in hidden.tail(facts.image):
        if not _in_a_snapshot(facts, piece):
            yield evidence_of(piece)


def _in_a_snapshot(facts: Facts, piece: Piece) -> bool:
    """Whether a snapshot, whose disk is larger, shows a piece at its own guest offset."""
    if piece.guest_offset is None or not facts.census.owner(piece.offset) & Owner.SNAPSHOT_DATA:
        return False
    host, cluster = piece.offset // facts.cluster_size * facts.cluster_size, piece.guest_offset // facts.cluster_size
    for snapshot in facts.image.snapshots:
        if snapshot.disk_size is None or snapshot.disk_size < piece.guest_offset + piece.length:
            continue
        state = live_mappings.StateTable(snapshot, snapshot.l1_table_offset, snapshot.l1_size)
        entry = live_mappings.l2_entry(facts.image, state, cluster)
        if int(entry.hosts[0]) == host and not entry.zero_flags[0]:
            return True
    return False


# --- external data files -------------------------------------------------------------------------


def _hidden_in_data_file(facts: Facts) -> tuple[Group, Group]:
    """Return what the data file holds under zero flags, and where the image says nothing is."""
    from ..residue.data_file import data_file_residue

    flagged, unmapped = Group(), Group()
    with opened_data_file(facts) as data:
        for piece in data_file_residue(facts.image, data) if data is not None else ():
            (flagged if piece.kind == "zero-flagged" else unmapped).add(piece)
    return flagged, unmapped


@rule(
    "QCOW2-DATAFILE-RESIDUE",
    Severity.MEDIUM,
    "the data file holds bytes the image does not show",
    note="visible in the data file but not through the image: consistent with zeroed or discarded data, or with a file "
    "that held something else before",
    when="bytes where the image says nothing, or beyond the disk, are not zeros; Low under zero flags alone",
    harmless="zeroing keeps old bytes in data files that are not raw",
    validated=QEMU_MADE,
)
def datafile_residue(facts: Facts) -> Iterator[OneFinding]:
    if facts.header.external_data:
        flagged, unmapped = facts.once(_hidden_in_data_file)
        yield from finding_of(unmapped)
        yield from finding_of(flagged, Severity.LOW, "the data file keeps zeroed bytes")


@rule(
    "QCOW2-RAW-DATAFILE-DIVERGES",
    Severity.HIGH,
    "the raw data file and the image show different disks",
    note="the image declares that its data file can be read as a raw disk, but the two differ: which bytes are seen depends "
    "on the reader",
    when="autoclear bit 1 is set and the data file is not zeros where the image reads as zeros",
)
def raw_datafile_diverges(facts: Facts) -> Iterator[Evidence]:
    if facts.header.raw_data_file:
        for group in facts.once(_hidden_in_data_file):
            for piece in group.kept:
                if piece.offset < facts.image.disk_size:
                    yield evidence_of(piece)


# --- memory snapshots ----------------------------------------------------------------------------


@rule(
    "QCOW2-VMSTATE-RESIDUE",
    Severity.MEDIUM,
    "the start of a VM state that belongs to no snapshot",
    note="consistent with a deleted memory snapshot",
    when="a cluster that nothing refers to, or that the active state maps past the end of the disk, starts with QEVM and a version",
    validated=QEMU_MADE,
)
def vm_state_residue(facts: Facts) -> Iterator[Evidence]:
    for piece in survey_of(facts).of(["free", "leaked", "trailing"], ["vm-state"]).kept:
        yield from _vm_state(facts, piece.offset, f"{piece.kind} clusters")
    behind = facts.census.seen(TablesBehindDisk)
    facts.leave_out("clusters past the end of the disk that were not looked at for a VM state", behind.left_out)
    for offset in behind.hosts:
        if _is_unlisted_stream(facts, offset):
            yield from _vm_state(facts, offset, "active state past the end of the disk")


@rule(
    "QCOW2-VMSTATE-LEFTOVER",
    Severity.HIGH,
    "guest memory that no snapshot lists can be opened",
    note="the active state maps a VM state past the end of the disk: consistent with a memory snapshot that was applied "
    "and deleted, or with a savevm that failed; 'leftover' names it wherever a snapshot is named",
    when="what the active state maps past the end of the disk starts with QEVM and a version, and belongs to no listed snapshot",
    depth=Depth.STANDARD,
    validated=QEMU_MADE,
)
def vm_state_leftover(facts: Facts) -> Iterator[Evidence]:
    offset = leftover_vm_state(facts.image)
    if offset and _is_unlisted_stream(facts, offset):
        yield from _vm_state(facts, offset, "active state past the end of the disk")


def _is_unlisted_stream(facts: Facts, offset: int) -> bool:
    """Whether a migration stream starts at a host offset, and no listed snapshot owns it."""
    applied = facts.census.owner(offset) & Owner.SNAPSHOT_DATA  # a live snapshot's own, applied since
    return not applied and facts.read(offset, len(STREAM_HEAD)) == STREAM_HEAD


def _vm_state(facts: Facts, offset: int, structure: str) -> Iterator[Evidence]:
    head = facts.read(offset, 512)
    yield Evidence("version", int.from_bytes(head[4:8], "big"), offset, 8, structure)
    machine = machine_type(head)
    if machine:
        yield Evidence("machine", machine, offset, 512, structure)


@subscribes()
class TablesBehindDisk:
    """What the active state's L2 tables past the end of the disk hold, where QEMU puts a VM state.

    ``hosts`` are the host offsets that they name, each table's once and rising; ``left_out`` counts those not kept.
    """

    def __init__(self, image: Image, _clusters: IndexMap) -> None:
        self._first = -(-image.header.size // image.header.l2_span)
        self.hosts: list[int] = []
        self.left_out = 0
        self._empty = [np.empty((0, 3), np.int64)]

    def tables(self, batch: Tables) -> None:
        """Take in a batch of tables."""
        rows = np.flatnonzero((batch.active > 0) & (batch.index >= self._first))
        if not len(rows):
            return
        columns = batch.columns.rows(rows)
        bare = columns.entries == np.uint64(ZERO) if columns.bitmaps is None else columns.bitmaps != 0
        zeros = np.count_nonzero(bare, axis=1).astype(np.uint64)
        empty = ~(columns.hosts.any(axis=1) | columns.compressed.any(axis=1)) & (zeros != 0)
        self._empty.append(np.column_stack((batch.index[rows], batch.offsets[rows], zeros))[empty].astype(np.int64))
        hosts = np.sort(columns.hosts, axis=1)
        fresh = hosts != 0
        fresh[:, 1:] &= hosts[:, 1:] != hosts[:, :-1]
        distinct = hosts[fresh]
        room = VM_STATE_CLUSTERS - len(self.hosts)
        self.hosts += distinct[:room].tolist()
        self.left_out += max(0, len(distinct) - room)

    @property
    def empty(self) -> I64:
        """The tables that hold zero entries and name no cluster: rows (L1 slot, file offset, zero entries)."""
        return np.concatenate(self._empty)


@rule(
    "QCOW2-VMSTATE-TRACE",
    Severity.LOW,
    "the active state has empty tables where a VM state was",
    note="consistent with an earlier savevm, also after its snapshot was deleted; the number of entries gives its size",
    when="an active L2 table past the end of the disk holds only empty and zero entries, and no live snapshot has a VM state "
    "of that size",
    harmless="live snapshots with a VM state leave it too and are left out by their size",
    depth=Depth.STANDARD,
    validated=QEMU_MADE,
)
def vm_state_trace(facts: Facts) -> Iterator[Evidence]:
    tables = facts.census.seen(TablesBehindDisk).empty.tolist()
    total = sum(zeros for _, _, zeros in tables)
    live = {-(-entry.vm_state_size // facts.cluster_size) for entry in facts.image.snapshots if entry.vm_state_size}
    if total and total not in live:
        for slot, offset, zeros in tables:
            at = facts.header.l1_table_offset + slot * 8
            yield Evidence("l1_slot", slot, at, 8, "L1", guest_offset=slot * facts.header.l2_span)
            yield Evidence("zero_entries", zeros, offset, facts.cluster_size, f"L2[{slot}]")
        yield Evidence("estimated_vm_state_size", total * facts.cluster_size)
