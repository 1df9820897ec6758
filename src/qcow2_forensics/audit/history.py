"""Rules about snapshots and bitmaps: what the image remembers of its past."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from functools import partial

from ..errors import FormatError, ReadError, reason
from ..findings import Evidence, Severity
from ..format.bitmap_directory import BitmapEntry, BitmapFlag
from ..format.extensions import ExtensionType
from ..format.header import Autoclear
from ..format.snapshot_table import SNAPSHOT_ENTRY_LENGTH, SNAPSHOT_KNOWN_EXTRA, SnapshotEntry
from ..limits import BITMAP_TABLE_ENTRIES_COUNTED, BITMAPS_COUNTED, DIRTY_RANGES_LISTED
from ..reader.bitmaps import ClusterBits, dirty_ranges, dirty_totals
from ..reader.vm_state import MAGIC
from ..text import cut, is_plain, listed, snapshot_date
from .facts import Facts, shortened, snapshot_field
from .reference_names import mtime_of
from .rules import QEMU_MADE, Chapter, Deferred, Depth, OneFinding
from .vm_states import machine_type, vm_state_heads

rule = Chapter(__name__, "Snapshots and bitmaps: history")

_TABLE = "snapshot table"
_IDS_LISTED = 50  # snapshots, and gaps between them, in one finding


# --- VM state ------------------------------------------------------------------------------------


@rule(
    "QCOW2-SNAPSHOT-VMSTATE",
    Severity.MEDIUM,
    "a snapshot holds the guest's memory",
    note="guest memory was captured with the disk: analyse it with a memory framework",
    when="the VM state size of a snapshot is not zero",
    validated=QEMU_MADE,
)
def snapshot_vm_state(facts: Facts) -> Iterator[Evidence]:
    for state in facts.once(vm_state_heads):
        entry = state.entry
        if entry.extra_length < 8:
            yield snapshot_field(entry, "vm_state_size32", entry.vm_state_size32)
        else:
            yield snapshot_field(entry, "vm_state_size", entry.vm_state_size)
        yield Evidence(
            "vm_state_offset",
            state.offset,
            state.host,
            structure="VM state",
            guest_offset=state.offset,
            snapshot=shortened(entry.id),
        )
        if state.head[:4] == MAGIC:
            yield Evidence(
                "version",
                int.from_bytes(state.head[4:8], "big"),
                state.host,
                8,
                "VM state",
                snapshot=shortened(entry.id),
            )
        machine = machine_type(state.head)
        if machine:
            yield Evidence("machine", machine, state.host, structure="VM state", snapshot=shortened(entry.id))


@rule(
    "QCOW2-SNAPSHOT-VMSTATE-INVALID",
    Severity.MEDIUM,
    "a VM state does not match the snapshot table",
    note="consistent with an edited table or with another hypervisor's state format",
    when="nothing is mapped there, it does not start with QEVM, or the two size fields disagree below 4 GiB",
    harmless="an encrypted image cannot be checked without its key and is not",
)
def snapshot_vm_state_invalid(facts: Facts) -> Iterator[Evidence]:
    for state in facts.once(vm_state_heads):
        entry = state.entry
        if state.why:
            yield snapshot_field(entry, "vm_state_size", entry.vm_state_size)
            yield Evidence(
                "error", state.why, structure="VM state", guest_offset=state.offset, snapshot=shortened(entry.id)
            )
        elif not facts.header.crypt_method and state.head[:4] != MAGIC:
            shown = state.head[:16].hex(" ")
            yield Evidence("starts_with", shown, state.host, 16, "VM state", state.offset, shortened(entry.id))
    for entry in facts.image.snapshots:
        differs = entry.vm_state_size32 not in (0, entry.vm_state_size)
        if differs and entry.extra_length >= 8 and entry.vm_state_size < 1 << 32:
            yield snapshot_field(entry, "vm_state_size32", entry.vm_state_size32)
            yield snapshot_field(entry, "vm_state_size", entry.vm_state_size)


# --- the table -----------------------------------------------------------------------------------


@rule(
    "QCOW2-SNAPSHOT-ID-GAP",
    Severity.LOW,
    "snapshot IDs are missing",
    note="QEMU numbers snapshots from 1 upwards: consistent with deleted snapshots; deleting the newest leaves no gap",
    when="the decimal IDs in table order are not 1, 2, 3 and so on",
    validated=QEMU_MADE,
)
def snapshot_id_gap(facts: Facts) -> Iterator[Evidence]:
    entries = facts.image.snapshots
    ids = sorted({int(entry.id_bytes) for entry in entries if _decimal(entry)})
    if not ids or len(ids) != len(entries):
        return  # foreign or repeated IDs are SNAPSHOT-ORDER's subject
    missing = [(low + 1, high - 1) for low, high in zip([0, *ids], ids, strict=False) if high - low > 1]
    if missing:
        gaps = [str(first) if first == last else f"{first} to {last}" for first, last in missing]
        start, last_entry = facts.header.snapshots_offset, entries[-1]
        length = last_entry.offset + last_entry.length - start
        yield Evidence("missing_ids", listed(gaps, _IDS_LISTED), start, length, _TABLE)
        yield Evidence("present_ids", listed([str(one) for one in ids], _IDS_LISTED), start, length, _TABLE)


def _decimal(entry: SnapshotEntry) -> bool:
    return entry.id_bytes.isdigit() and len(entry.id_bytes) <= 10


@rule(
    "QCOW2-SNAPSHOT-ORDER",
    Severity.LOW,
    "snapshot IDs or names are unlike those that QEMU assigns",
    note="consistent with another writer or with an edited table",
    when="IDs do not increase, an ID or name repeats, or one is empty, not decimal, or not printable text",
    harmless="people may give two snapshots one name",
)
def snapshot_order(facts: Facts) -> Iterator[Deferred]:
    ids: set[bytes] = set()
    names: set[bytes] = set()
    highest = 0
    for entry in facts.image.snapshots:
        ident, name = entry.id_bytes, entry.name_bytes
        number = int(ident) if _decimal(entry) else -1
        if number < highest or ident in ids:
            yield Deferred(partial(_id, entry), entry.offset)
        else:
            highest = number
        if name in names or not name or not _readable(name):
            yield Deferred(partial(_name, entry), entry.offset)
        ids.add(ident)
        names.add(name)


def _id(entry: SnapshotEntry) -> Evidence:
    return snapshot_field(entry, "id", shortened(entry.id))


def _name(entry: SnapshotEntry) -> Evidence:
    return snapshot_field(entry, "name", shortened(entry.name))


def _readable(text: bytes) -> bool:
    try:
        return is_plain(text.decode("utf-8"))
    except UnicodeDecodeError:
        return False


@rule(
    "QCOW2-SNAPSHOT-CLOCK",
    Severity.LOW,
    "snapshot dates are implausible",
    note="consistent with a host clock that was changed, or with edited times",
    when="dates decrease along the table, are 0, are later than now or than the last change of the file, or have nanoseconds that are not whole microseconds",
    harmless="host clock errors are common; QEMU's nanoseconds are always whole microseconds",
)
def snapshot_clock(facts: Facts) -> Iterator[Evidence]:
    mtime = mtime_of(facts.image.source)
    latest = max(time.time(), mtime or 0) + 1
    previous: SnapshotEntry | None = None
    for entry in facts.image.snapshots:
        odd = entry.date_nsec >= 1_000_000_000 or entry.date_nsec % 1000
        before = previous is not None and (entry.date_sec, entry.date_nsec) < (previous.date_sec, previous.date_nsec)
        if entry.date_sec == 0 or entry.date_sec > latest or before:
            yield _date(entry)
        if odd:
            yield snapshot_field(entry, "date_nsec", entry.date_nsec)
        previous = entry
    newest = max(facts.image.snapshots, key=lambda entry: entry.date_sec, default=None)
    # A copy may carry the time of its making, never one before what it holds.
    if newest is not None and mtime is not None and mtime + 1 < newest.date_sec <= latest:
        yield _date(newest)
        yield Evidence("file_mtime", mtime)


def _date(entry: SnapshotEntry) -> Evidence:
    return snapshot_field(entry, "date", snapshot_date(entry.date_sec, entry.date_nsec), "date_sec")


@rule(
    "QCOW2-SNAPSHOT-SIZE-CHANGED",
    Severity.LOW,
    "the disk was resized after a snapshot",
    note="the snapshot's disk has another size than the current one",
    when="a snapshot records a disk size that is not the current one",
    validated=QEMU_MADE,
)
def snapshot_size_changed(facts: Facts) -> Iterator[Evidence]:
    for entry in facts.image.snapshots:
        if entry.disk_size is not None and entry.disk_size != facts.header.size:
            yield snapshot_field(entry, "disk_size", entry.disk_size)


@rule(
    "QCOW2-SNAPSHOT-WRITER",
    Severity.INFO,
    "the snapshot table shows which software wrote it",
    note="24 bytes of extra data: the table was last written by QEMU 5.2 or later; 16: 1.1 to 5.1; 0: before 1.1. "
    "Without VM state an icount of 0 is qemu-img's, -1 a running QEMU's",
    when="there are snapshots",
    harmless="record and replay uses real icounts",
    validated=QEMU_MADE,
)
def snapshot_writer(facts: Facts) -> Iterator[Evidence]:
    seen: set[tuple[str, int]] = set()
    previous: SnapshotEntry | None = None
    for entry in facts.image.snapshots:
        if previous is not None and entry.icount == previous.icount and len(entry.extra) == len(previous.extra):
            continue
        previous = entry
        for name, value in (("extra_data_size", entry.extra_length), ("icount", entry.icount)):
            # Each value once, where it is first: tables are long, writers few.
            if value is not None and len(seen) < 100 and (name, value) not in seen:
                seen.add((name, value))
                yield snapshot_field(entry, name, value)


@rule(
    "QCOW2-SNAPSHOT-UNKNOWN-EXTRA",
    Severity.LOW,
    "a snapshot has extra data beyond the known fields",
    note="consistent with a newer writer, or with data placed there; QEMU keeps it when it rewrites the table",
    when="the extra data of an entry is longer than 24 bytes",
)
def snapshot_unknown_extra(facts: Facts) -> Iterator[Evidence]:
    for entry in facts.image.snapshots:
        unknown = entry.extra[SNAPSHOT_KNOWN_EXTRA:]
        if unknown:
            at = entry.offset + SNAPSHOT_ENTRY_LENGTH + SNAPSHOT_KNOWN_EXTRA
            shown = unknown[:64].hex(" ")
            yield Evidence("extra_data", shown, at, len(unknown), _TABLE, snapshot=shortened(entry.id))


# --- bitmaps -------------------------------------------------------------------------------------


def _current(facts: Facts) -> tuple[BitmapEntry, ...]:
    return facts.image.bitmaps if facts.image.bitmaps_current else ()


def _bitmap(entry: BitmapEntry, field: str, value: int | str) -> Evidence:
    return Evidence(field, value, entry.offset, entry.length, "bitmap directory")


@rule(
    "QCOW2-BITMAPS",
    Severity.LOW,
    "the image tracks which ranges changed",
    note="a history of changes since each bitmap was created: consistent with incremental backups",
    when="the bitmaps extension is valid and lists bitmaps",
    depth=Depth.STANDARD,
    validated=QEMU_MADE,
)
def bitmaps(facts: Facts) -> Iterator[Evidence | Deferred]:
    room = BITMAP_TABLE_ENTRIES_COUNTED
    known: dict[int, ClusterBits] = {}  # bitmaps that share their clusters cost what one does
    for number, entry in enumerate(_current(facts)):
        yield Deferred(partial(_bitmap, entry, "name", entry.name), entry.offset)
        yield Deferred(partial(_bitmap, entry, "granularity", entry.granularity), entry.offset)
        yield Deferred(partial(_flags, entry), entry.offset)
        if number < BITMAPS_COUNTED:  # those that are listed; there may be 65,535
            room -= entry.table_size
            yield from (
                _dirty(facts, entry, known) if room >= 0 else [_bitmap(entry, "dirty_ranges", "too large to count")]
            )


def _flags(entry: BitmapEntry) -> Evidence:
    names = [flag.name.lower() for flag in BitmapFlag if entry.flags & flag and flag.name]
    return _bitmap(entry, "flags", ", ".join(names) or "none")


def _dirty(facts: Facts, entry: BitmapEntry, known: dict[int, ClusterBits]) -> Iterator[Evidence]:
    try:
        count, total = dirty_totals(facts.image, entry, known)
        for start, length in itertools.islice(dirty_ranges(facts.image, entry), DIRTY_RANGES_LISTED):
            yield Evidence("dirty_bytes", length, structure=f"bitmap {cut(entry.name)}", guest_offset=start)
        yield _bitmap(entry, "dirty_bytes_total", total)
        yield _bitmap(entry, "dirty_ranges", count)
    except (FormatError, ReadError) as error:
        yield _bitmap(entry, "error", reason(error))


@rule(
    "QCOW2-BITMAP-IN-USE",
    Severity.LOW,
    "a bitmap was not saved",
    note="consistent with a crash, or with a copy of a running machine's image; what it marks is not reliable",
    when="flag 1 of a bitmap is set",
    harmless="live copies",
    validated=QEMU_MADE,
)
def bitmap_in_use(facts: Facts) -> Iterator[Deferred]:
    in_use = int(BitmapFlag.IN_USE)  # a plain number: there may be 65,535 to look at
    for entry in _current(facts):
        if entry.flags & in_use:
            yield Deferred(partial(_bitmap, entry, "name", entry.name), entry.offset)


@rule(
    "QCOW2-BITMAP-STALE",
    Severity.LOW,
    "bitmaps are out of date",
    note="the image was later written by software that does not know bitmaps: what they mark cannot be relied on",
    when="there is a bitmaps extension and autoclear bit 0 is clear",
)
def bitmap_stale(facts: Facts) -> Iterator[Evidence]:
    extension = facts.image.extension(ExtensionType.BITMAPS)
    if facts.header.version == 3 and extension is not None and not facts.image.bitmaps_current:
        yield Evidence(
            "bitmaps_extension", extension.length, extension.offset, extension.length + 8, "header extension"
        )
        yield facts.field("autoclear_features")


@rule(
    "QCOW2-AUTOCLEAR-ODD",
    Severity.LOW,
    "autoclear bits are set for features that are absent",
    note="QEMU never leaves such bits, it clears unknown ones at the first write: consistent with editing or with "
    "another writer",
    when="bit 0 without a bitmaps extension, bit 1 without an external data file, or an unknown bit",
)
def autoclear_odd(facts: Facts) -> Iterator[Evidence | OneFinding]:
    header = facts.header
    if header.version != 3:
        return
    bits = header.autoclear_features
    reasons = []
    has_bitmaps = facts.image.extension(ExtensionType.BITMAPS) is not None or facts.image.unreadable("bitmaps")
    if bits & Autoclear.BITMAPS and not has_bitmaps:
        reasons.append("bit 0 without a bitmaps extension")
    if bits & Autoclear.RAW_EXTERNAL_DATA and not header.external_data:
        reasons.append("bit 1 without an external data file")
    if bits >> 2:
        reasons.append(f"unknown bits {bits >> 2 << 2:#x}")
    if reasons:
        field = facts.field("autoclear_features")
        yield OneFinding([field, Evidence("why", "; ".join(reasons))])
