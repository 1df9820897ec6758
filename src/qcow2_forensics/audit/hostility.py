"""Rules about what could harm whoever opens the image."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..errors import Qcow2Error
from ..findings import Evidence, Severity
from ..format.header_rules import MAX_DISK_BYTES
from ..format.source import BytesSource
from ..limits import MiB
from ..reader.disk import Disk
from ..reader.foreign import probe
from .facts import Facts, snapshot_field
from .reference_names import names, opened_data_file
from .rules import DERIVED, QEMU_MADE, Chapter, Deferred, Depth, OneFinding
from .trailers import trailers

rule = Chapter(__name__, "Hostile images")

TiB = 1 << 40


@rule(
    "QCOW2-SIZE-ABSURD",
    Severity.MEDIUM,
    "the disk is far larger than the file",
    note="consistent with an empty thin disk, or with an image made to exhaust whatever expands it",
    when="the size is above what QEMU accepts, or above 64 TiB and a million times the file; Info from 10,000 times",
    harmless="an empty thin disk of 1 TiB takes 200 KiB",
    validated=QEMU_MADE,
)
def size_absurd(facts: Facts) -> Iterator[OneFinding]:
    size, stored = facts.header.size, max(facts.image.file_size, 1)
    ratio = size // stored
    evidence = [facts.field("size"), Evidence("file_size", stored), Evidence("ratio", ratio)]
    if size > MAX_DISK_BYTES or (size > 64 * TiB and ratio > 1_000_000):
        yield OneFinding(evidence)
    elif ratio > 10_000:
        yield OneFinding(evidence, severity=Severity.INFO)


@rule(
    "QCOW2-TABLE-ABSURD",
    Severity.HIGH,
    "a table is far larger than the image can need",
    note="consistent with an image made to exhaust the memory or time of whatever parses it",
    when="an L1 or refcount table above 1 MiB and four times its need, more than 10,000 snapshots, more than 1,024 "
    "bytes of extra data, or a bitmap table above four times its need",
)
def table_absurd(facts: Facts) -> Iterator[Evidence | Deferred]:
    header, image = facts.header, facts.image
    if header.version == 1:
        return
    needed = -(-header.size // header.l2_span)
    if header.l1_size * 8 > MiB and header.l1_size > 4 * needed:
        yield facts.field("l1_size")
        yield Evidence("l1_size_needed", needed)
    if header.refcount_order <= 6:
        per_block = header.cluster_size * 8 // header.refcount_bits
        blocks = -(-image.file_size // header.cluster_size // per_block)
        clusters = max(1, -(-blocks * 8 // header.cluster_size))
        table = header.refcount_table_clusters
        if table * header.cluster_size > MiB and table > 4 * clusters:
            yield facts.field("refcount_table_clusters")
            yield Evidence("refcount_table_clusters_needed", clusters)
    if header.nb_snapshots > 10_000:
        yield facts.field("nb_snapshots")
    for problem in facts.problems("QCOW2-SNAPSHOT-TABLE-INVALID"):
        if problem.field == "extra_data_size" and problem.limit is not None:
            yield facts.problem_evidence(problem, "snapshot table")
    yield from _absurd_snapshots(facts)
    yield from _absurd_bitmaps(facts)


def _absurd_snapshots(facts: Facts) -> Iterator[Deferred]:
    span, size = facts.header.l2_span, facts.header.size
    for entry in facts.image.snapshots:
        if entry.l1_size * 8 <= MiB:
            continue
        mapped = (entry.disk_size or size) + entry.vm_state_size
        if entry.l1_size > 4 * (-(-mapped // span) + 1):
            yield Deferred(partial(snapshot_field, entry, "l1_size", entry.l1_size), entry.offset)


def _absurd_bitmaps(facts: Facts) -> Iterator[Evidence]:
    header = facts.header
    for bitmap in facts.image.bitmaps:
        needed = -(-header.size >> bitmap.granularity_bits + 3 + header.cluster_bits)  # a bit each, in whole clusters
        if bitmap.table_size > 4 * needed + 4:
            yield Evidence("bitmap_table_size", bitmap.table_size, bitmap.offset + 8, 4, "bitmap directory")


# --- one file, two readings ----------------------------------------------------------------------


@rule(
    "QCOW2-NESTED-IMAGE",
    Severity.MEDIUM,
    "the disk itself starts as another image",
    note="a trap when the disk is later handled as raw and its format guessed (the class of CVE-2014-0134), or a "
    "nested disk; a LUKS header is guest full-disk encryption",
    when="the first bytes of the guest disk are an image format's magic",
    harmless="LUKS at the start is ordinary full-disk encryption (Info)",
    validated=QEMU_MADE,
)
def nested_image(facts: Facts) -> Iterator[Evidence | OneFinding]:
    head = _guest_head(facts)
    if head is None:
        return
    kind = probe(head)
    evidence = Evidence("content_starts_as", kind, structure="guest disk", guest_offset=0, length=512)
    if kind == "luks":
        yield OneFinding([evidence], severity=Severity.INFO, title="the disk starts with LUKS")
    elif kind != "raw":
        yield evidence


def _guest_head(facts: Facts) -> BytesSource | None:
    """Return the first sector of the active disk where this image (or its data file) stores it unencrypted."""
    image = facts.image
    if image.header.crypt_method:
        return None
    try:
        with opened_data_file(facts) as data:
            if image.header.external_data and data is None:
                return None
            return BytesSource(Disk(image, data=data).read(0, 512))
    except (Qcow2Error, OSError):
        return None  # other rules say why the disk cannot be read


@rule(
    "QCOW2-POLYGLOT",
    Severity.HIGH,
    "the file is also valid as another format",
    note="the same bytes can be parsed two ways: consistent with crafting to pass a filter, or with a file appended "
    "to or embedded in the image",
    when="an ISO 9660 volume, a partition table, a PDF or tar header is in the header cluster, or a ZIP directory, a VHD "
    "footer or a DMG trailer ends the file",
    harmless="Low where other bytes follow the trailer and it lies in guest data: a file of the guest that happens to "
    "be stored last",
)
def polyglot(facts: Facts) -> Iterator[Evidence | OneFinding]:
    image = facts.image
    # Only bytes QEMU zero-fills are looked at: guest data may hold anything.
    head = image.read(0, min(facts.cluster_size, 0x9000))
    if head[0x8001:0x8006] == b"CD001" and head[0x8000] in (0, 1, 2):
        yield Evidence("signature", "ISO 9660", 0x8001, 5, "header cluster")
    if head[510:512] == b"\x55\xaa" and _partitions(head):
        yield Evidence("signature", "MBR partition table", 510, 2, "header cluster")
    if facts.cluster_size >= 4096:
        if head[512:520] == b"EFI PART":
            yield Evidence("signature", "GPT", 512, 8, "header cluster")
        if (at := head.find(b"%PDF-", 0, 1024)) >= 0:
            yield Evidence("signature", "PDF", at, 5, "header cluster")
        if head[257:262] == b"ustar":
            yield Evidence("signature", "tar", 257, 5, "header cluster")
    for trailer in trailers(image):
        evidence = Evidence("signature", trailer.what, trailer.offset, trailer.length, "end of file")
        if trailer.slack and _is_guest_data(facts, trailer.offset):
            slack = Evidence("bytes_after_it", trailer.slack, trailer.offset + trailer.length, trailer.slack)
            what = "guest data near the end" if facts.depth >= Depth.STANDARD else "what is near the end"
            title = f"{what} of the file can be read as another format"
            yield OneFinding([evidence, slack], severity=Severity.LOW, title=title)
        else:
            yield evidence


def _is_guest_data(facts: Facts, offset: int) -> bool:
    """Whether a state maps the bytes; at triage, which reads no tables, they are taken for guest data."""
    if facts.depth < Depth.STANDARD or not facts.has_census or facts.census_error is not None:
        return True
    from ..census import GUEST_DATA

    return bool(facts.census.owner(offset) & GUEST_DATA)


def _partitions(head: bytes) -> bool:
    entries = [head[at : at + 16] for at in range(446, 510, 16)]
    used = [entry for entry in entries if entry[4] and int.from_bytes(entry[12:16], "little")]
    return bool(used) and all(entry[0] in (0, 0x80) for entry in entries)


# --- gatekeepers ---------------------------------------------------------------------------------


@rule(
    "QCOW2-GATEKEEPER",
    Severity.INFO,
    "whether upload checks of cloud services would accept this image",
    note="from header facts alone; services check more around it",
    when="always",
    validated=DERIVED,
)
def gatekeeper(facts: Facts) -> Iterator[Evidence]:
    header = facts.header
    refusals: list[str] = []
    if header.version not in (2, 3):
        refusals.append(f"version {header.version}")
    if header.backing_file_offset:
        refusals.append("a backing file offset")
    if header.version == 3 and header.external_data:
        refusals.append("an external data file")
    if header.version == 3 and header.incompatible_features >> 4:
        refusals.append("an incompatible feature bit above 3 (extended L2 entries are bit 4)")
    yield _verdict("OpenStack format inspector (Nova, Glance, Cinder, Ironic)", refusals)
    names_in = [f"a {name.role} file" for name in names(facts)]
    yield _verdict("KubeVirt CDI", [*names_in, *(["version 1"] if header.version == 1 else [])])
    yield _verdict("CloudStack import", names_in)
    unformatted = ["a backing file without a recorded format"] if _unformatted(facts) else []
    yield _verdict("libvirt", unformatted)


def _unformatted(facts: Facts) -> bool:
    image = facts.image
    if not image.backing_name or "backing_format" in image.unreadable_facts:
        return False
    return facts.header.version == 1 or not image.backing_format


def _verdict(gate: str, refusals: list[str]) -> Evidence:
    return Evidence(gate, f"refuses: {', '.join(refusals)}" if refusals else "accepts", structure="gatekeeper")
