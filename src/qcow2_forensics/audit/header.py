"""The header, its extensions, and the tables it names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial

from ..findings import Evidence, Severity
from ..format.extensions import ExtensionType
from ..format.header import (
    MAGIC,
    QCOW1_HEADER_LENGTH,
    V2_HEADER_LENGTH,
    V3_HEADER_LENGTH,
    Compatible,
    Crypt,
    Incompatible,
    padded,
)
from ..format.snapshot_table import SnapshotEntry
from ..limits import FINDINGS_PER_RULE
from ..text import snapshot_date
from .facts import Facts, shortened, snapshot_field, snapshot_fields
from .rules import QEMU_MADE, Chapter, Deferred, Depth, OneFinding, of_fields

rule = Chapter(__name__, "Header, extensions and the tables they name")

# --- observations every examiner wants -----------------------------------------------------------


rule(
    "QCOW2-CORRUPT",
    Severity.HIGH,
    "the image is marked corrupt",
    note="consistent with QEMU having blocked a write onto metadata, or with the bit being set by hand",
    when="incompatible feature bit 1 is set",
    validated=QEMU_MADE,
)(of_fields(lambda facts: facts.header.incompatible_features & Incompatible.CORRUPT, "incompatible_features"))


@rule(
    "QCOW2-BACKING-FILE",
    Severity.MEDIUM,
    "guest data depends on a backing file",
    note="ranges that this image does not map are read from another file",
    when="the header names a backing file",
    harmless="every overlay has one",
    validated=QEMU_MADE,
)
def backing_file(facts: Facts) -> Iterator[Evidence]:
    image, header = facts.image, facts.header
    name = image.backing_name_bytes
    if not name:
        return
    at = header.backing_file_offset
    yield Evidence("backing file name", image.backing_name, at, len(name), "header")
    try:
        name.decode()
    except UnicodeDecodeError:
        yield Evidence("backing file name, bytes", name.hex(), at, len(name), "header")
    yield facts.field("backing_file_size")
    extension = image.extension(ExtensionType.BACKING_FORMAT) if header.version > 1 else None
    if extension is not None:
        yield Evidence(
            "backing format", image.backing_format, extension.data_offset, extension.length, "header extension"
        )


@rule(
    "QCOW2-ENCRYPTED",
    Severity.MEDIUM,
    "guest data is encrypted",
    note="the content cannot be read without the passphrase or key",
    when="crypt_method is not 0",
    validated=QEMU_MADE,
)
def encrypted(facts: Facts) -> Iterator[Evidence]:
    method = facts.header.crypt_method
    if method == Crypt.NONE:
        return
    names = {Crypt.AES: "AES (legacy)", Crypt.LUKS: "LUKS"}
    yield facts.field("crypt_method")
    yield facts.field("crypt_method", names.get(Crypt(method)) if method in tuple(Crypt) else f"unknown ({method})")
    place = facts.image.crypto_header if facts.header.version > 1 else None
    if place:
        yield Evidence("LUKS header", place[0], place[0], place[1], "LUKS header")


@rule(
    "QCOW2-EXTERNAL-DATA",
    Severity.MEDIUM,
    "guest data is stored in another file",
    note="this file holds only the metadata; the guest's bytes are in the data file",
    when="incompatible feature bit 2 is set",
    validated=QEMU_MADE,
)
def external_data(facts: Facts) -> Iterator[Evidence]:
    if not facts.header.external_data:
        return
    yield facts.field("incompatible_features")
    extension = facts.image.extension(ExtensionType.DATA_FILE)
    if extension is not None:
        name = facts.image.data_file_name
        yield Evidence("data file name", name, extension.data_offset, extension.length, "header extension")
    raw = facts.header.raw_data_file
    yield facts.field(
        "autoclear_features",
        f"raw external data: {'yes, the data file is declared to be the disk itself' if raw else 'no'}",
    )


@rule(
    "QCOW2-INTERNAL-SNAPSHOTS",
    Severity.LOW,
    "the image holds internal snapshots",
    note="each is a further state of the guest's disk, some with its memory",
    when="the header counts at least one snapshot",
    validated=QEMU_MADE,
)
def internal_snapshots(facts: Facts) -> Iterator[Evidence]:
    if facts.header.nb_snapshots:
        yield facts.field("nb_snapshots")
        yield facts.field("snapshots_offset")
        entries = facts.image.snapshots
        if entries:
            start = facts.header.snapshots_offset
            length = entries[-1].offset + entries[-1].length - start
            whole = len(entries) == facts.header.nb_snapshots
            words = "snapshot table, bytes" if whole else "readable part of the snapshot table, bytes"
            yield Evidence(words, length, start, length, "snapshot table")


@rule(
    "QCOW2-SNAPSHOT",
    Severity.LOW,
    "internal snapshot",
    note="a state of the guest's disk at one time, which can be opened as a disk of its own; its date is UTC, from the clock of the host",
    when="an entry of the snapshot table can be read; one finding each",
    validated=QEMU_MADE,
)
def snapshot(facts: Facts) -> Iterator[OneFinding]:
    facts.leave_out("snapshots that are not described", len(facts.image.snapshots) - FINDINGS_PER_RULE)
    for entry in facts.image.snapshots[:FINDINGS_PER_RULE]:
        yield OneFinding(_snapshot_facts(entry))


def _snapshot_facts(entry: SnapshotEntry) -> Iterator[Evidence]:
    return snapshot_fields(
        entry,
        {
            "id": shortened(entry.id),
            "name": shortened(entry.name),
            "date": snapshot_date(entry.date_sec, entry.date_nsec),
            "vm_clock_nsec": entry.vm_clock_nsec,
            "l1_table_offset": entry.l1_table_offset,
            "l1_size": entry.l1_size,
            "vm_state_size": entry.vm_state_size,
            "disk_size": entry.disk_size,
            "icount": entry.icount,
            "extra_data_size": entry.extra_length,
        },
    )


@rule(
    "QCOW2-DIRTY",
    Severity.LOW,
    "the image was not closed cleanly",
    note="consistent with a writer that did not close the image, or an image copied while in use; refcounts may be stale",
    when="incompatible feature bit 0 is set",
    harmless="copies of a running machine's disk",
    validated=QEMU_MADE,
)
def dirty(facts: Facts) -> Iterator[Evidence]:
    if facts.header.incompatible_features & Incompatible.DIRTY:
        yield facts.field("incompatible_features")
        lazy = bool(facts.header.compatible_features & Compatible.LAZY_REFCOUNTS)
        yield facts.field("compatible_features", f"lazy refcounts: {'yes' if lazy else 'no'}")


rule(
    "QCOW2-QCOW1",
    Severity.LOW,
    "the image has the old format, version 1",
    note="consistent with an image that was made by old software or for it",
    when="the version is 1",
    needs="header",
    validated=QEMU_MADE,
)(of_fields(lambda facts: facts.header.version == 1, "version"))


# --- what the format does not allow --------------------------------------------------------------


@rule(
    "QCOW2-HEADER-INVALID",
    Severity.HIGH,
    "header fields contradict the format",
    note="consistent with damage or a crafted image",
    when="a header field is outside what the format or QEMU allows; Medium where QEMU still opens the image",
    needs="header",
)
def header_invalid(facts: Facts) -> Iterator[Evidence | OneFinding]:
    tolerated, harmless = [], []
    for problem in facts.image.header_problems:
        if problem.code != "QCOW2-HEADER-INVALID":
            continue
        if problem.blocks:
            yield facts.problem_evidence(problem)
        else:
            tolerated.append(facts.problem_evidence(problem))
    yield from _cut_header(facts)
    if facts.has_census:
        yield from _tables_outside(facts)
    if facts.image.has_geometry and facts.header.backing_file_offset and not facts.header.backing_file_size:
        harmless.append(facts.field("backing_file_size", "0: the backing file name is empty"))
    if tolerated:
        yield OneFinding(tolerated, severity=Severity.MEDIUM)
    if harmless:
        yield OneFinding(harmless, severity=Severity.LOW)


def _cut_header(facts: Facts) -> Iterator[Evidence]:
    version = facts.header.version
    needed = {1: QCOW1_HEADER_LENGTH, 2: V2_HEADER_LENGTH}.get(version, V3_HEADER_LENGTH)
    if facts.image.file_size < needed:
        words = f"file size: the header of version {version} has {needed} bytes"
        yield Evidence(words, facts.image.file_size, len(MAGIC), needed - len(MAGIC), "header")


def _tables_outside(facts: Facts) -> Iterator[Evidence]:
    header, end = facts.header, facts.image.file_size
    tables = [("l1_table_offset", header.l1_size), ("refcount_table_offset", header.refcount_table_clusters)]
    for name, size in tables:
        if size and getattr(header, name) >= end:
            place = facts.field(name)
            words = f"{name}: the table lies past the end of the file at {end:#x}"
            yield Evidence(words, place.value, place.offset, place.length, "header")


@rule(
    "QCOW2-EXTENSION-INVALID",
    Severity.MEDIUM,
    "header extensions contradict the format",
    note="consistent with manual editing or another writer",
    when="an extension is longer than its area, has a wrong size or is there twice, or the end mark is missing",
    harmless="the end mark may be missing where the backing file name follows immediately",
)
def extension_invalid(facts: Facts) -> Iterator[Evidence]:
    for problem in facts.problems("QCOW2-EXTENSION-INVALID"):
        yield facts.problem_evidence(problem, "header extension")
    seen: Counter[int] = Counter()
    for extension in facts.image.extensions:
        seen[extension.type] += 1
        if seen[extension.type] > 1:
            words = f"header extension {extension.type:#010x} comes again"
            yield Evidence(words, extension.type, extension.offset, 8 + extension.length, "header extension")
    if facts.image.extensions:
        yield from _missing_end(facts)


def _missing_end(facts: Facts) -> Iterator[Evidence]:
    header, last = facts.header, facts.image.extensions[-1]
    limit = min(header.backing_file_offset or header.cluster_size, header.cluster_size)
    at = last.offset + 8 + padded(last.length)
    overrun = any(problem.offset == at for problem in facts.problems("QCOW2-EXTENSION-INVALID"))
    if limit - at < 8 and limit != at and not overrun:
        yield Evidence("end mark of the header extensions", "missing", min(at, limit), None, "header extension")


@rule(
    "QCOW2-SNAPSHOT-TABLE-INVALID",
    Severity.HIGH,
    "the snapshot table contradicts the format",
    note="consistent with damage or a crafted image; its entries cannot be trusted",
    when="an entry lies past the end of the file, has impossible lengths, or names an impossible L1 table",
)
def snapshot_table_invalid(facts: Facts) -> Iterator[Deferred]:
    for problem in facts.problems("QCOW2-SNAPSHOT-TABLE-INVALID"):
        structure = "header" if problem.field in ("nb_snapshots", "snapshots_offset") else "snapshot table"
        yield Deferred(partial(facts.problem_evidence, problem, structure), problem.offset)


@rule(
    "QCOW2-BITMAP-INVALID",
    Severity.MEDIUM,
    "dirty bitmaps contradict the format",
    note="consistent with damage or editing; QEMU refuses the whole image while the bitmaps count as current",
    when="the bitmaps extension, its directory or a directory entry breaks a rule, or a bitmap is too short for the disk",
)
def bitmap_invalid(facts: Facts) -> Iterator[Evidence]:
    for problem in facts.problems("QCOW2-BITMAP-INVALID"):
        yield facts.problem_evidence(problem, "bitmap directory")
    if facts.depth >= Depth.STANDARD and facts.has_census:
        words = {problem.offset for problem in facts.image.problems}
        for reason in facts.census.reasons:
            if reason.bitmap and reason.offset not in words:
                yield Evidence(reason.what, None, reason.offset, structure="bitmap directory")


# --- what QEMU never writes --------------------------------------------------------------------


rule(
    "QCOW2-SNAPSHOT-WITH-DATAFILE",
    Severity.HIGH,
    "the image has internal snapshots and an external data file",
    note="a combination that QEMU never writes",
    when="the header counts snapshots and incompatible feature bit 2 is set",
)(
    of_fields(
        lambda facts: facts.header.nb_snapshots and facts.header.incompatible_features & Incompatible.EXTERNAL_DATA,
        "nb_snapshots",
        "incompatible_features",
    )
)


@rule(
    "QCOW2-SNAPSHOT-L1-ALIAS",
    Severity.HIGH,
    "a snapshot shares its L1 table with another state",
    note="consistent with a crafted snapshot table: QEMU copies the L1 table for every snapshot",
    when="a snapshot names the L1 table of the active state or of another snapshot",
)
def snapshot_l1_alias(facts: Facts) -> Iterator[Deferred]:
    header = facts.header
    seen: dict[int, str | None] = {header.l1_table_offset: None} if header.l1_size else {}
    for entry in facts.image.snapshots:
        if not entry.l1_size:
            continue
        if entry.l1_table_offset in seen:
            yield Deferred(partial(_alias, entry, seen[entry.l1_table_offset]), entry.offset)
        else:
            seen[entry.l1_table_offset] = entry.id


def _alias(entry: SnapshotEntry, other: str | None) -> Evidence:
    words = f"l1_table_offset, also of {'the active state' if other is None else f'snapshot {shortened(other)}'}"
    return snapshot_field(entry, words, entry.l1_table_offset, "l1_table_offset")


@rule(
    "QCOW2-L1-OVERSIZED",
    Severity.INFO,
    "the L1 table is longer than the disk needs",
    note="consistent with a disk that was larger before, or with a saved VM state",
    when="the L1 table has more entries than the disk size needs",
    harmless="QEMU may allocate more than needed when a disk grows",
    validated=QEMU_MADE,
)
def l1_oversized(facts: Facts) -> Iterator[Evidence]:
    header = facts.header
    needed = -(-header.size // header.l2_span)
    if header.version > 1 and header.l1_size > max(needed, 1):
        yield facts.field("l1_size")
        yield Evidence("entries needed", needed)
