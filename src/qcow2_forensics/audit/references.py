"""Rules about names in the image and about what could harm whoever opens it (section "references")."""

from __future__ import annotations

import json
from collections.abc import Iterator

from ..disk import Disk
from ..errors import Qcow2Error
from ..findings import Evidence, Finding, Severity
from ..foreign import probe
from ..header_rules import MAX_DISK_BYTES
from ..limits import MiB
from ..source import Source
from ..structures import Autoclear, ExtensionType
from .facts import Facts
from .names import CHAIN_DEEP, Member, Name, chain, names, stands_beside
from .rules import CRAFTED, DERIVED, QEMU_MADE, rule, variant

TiB = 1 << 40
_DEVICE_DRIVERS = frozenset({"fat", "host_device", "host_cdrom", "nvme", "host_floppy"})
_DEVICE_PATHS = ("/dev/", "/proc/", "/sys/", "\\\\.\\")


def _evidence(name: Name, field: str = "", value: str | None = None) -> Evidence:
    shown = name.text if value is None else value
    return Evidence(field or f"{name.role}_file", shown, name.offset, len(name.stored), f"{name.role} file name")


def _is_device(name: Name) -> bool:
    return name.protocol in _DEVICE_DRIVERS or name.path.startswith(_DEVICE_PATHS)


@rule(
    "QCOW2-REF-ABSOLUTE",
    Severity.MEDIUM,
    "a name in the image is an absolute path",
    note="binds the image to a path of the host it was made on: consistent with management software, or with an "
    "image made to reach a chosen file",
    when="the backing or data file name starts at a root, a drive letter or a network share",
    harmless="libvirt and oVirt store absolute names; Low when the file stands beside the image",
    validated=CRAFTED,
)
def ref_absolute(facts: Facts) -> Iterator[Evidence | Finding]:
    for name in names(facts):
        if name.is_absolute and not _is_device(name):
            if stands_beside(facts, name.path):
                yield variant("QCOW2-REF-ABSOLUTE", [_evidence(name)], severity=Severity.LOW)
            else:
                yield _evidence(name)


@rule(
    "QCOW2-REF-TRAVERSAL",
    Severity.HIGH,
    "a relative name leaves the image's folder",
    note="reaches outside the folder the image stands in: consistent with a layout of shared base images, or with "
    "an image made to read a file of the examiner's",
    when="the name without its '..' steps leads above the image's folder",
    harmless="../base is common in some layouts; Medium when the caller's policy finds an image there",
)
def ref_traversal(facts: Facts) -> Iterator[Evidence | Finding]:
    for name in names(facts):
        if not name.leaves_folder:
            continue
        members = [member for member in chain(facts).backing if member.depth == 1 and member.name == name.text]
        if members and members[0].status == "found" and members[0].probed in ("qcow2", "qcow"):
            yield variant("QCOW2-REF-TRAVERSAL", [_evidence(name)], severity=Severity.MEDIUM)
        else:
            yield _evidence(name)


@rule(
    "QCOW2-REF-REMOTE",
    Severity.HIGH,
    "a name in the image has a protocol",
    note="QEMU would open a network connection or a special driver for it; it is never followed here",
    when="a colon stands before the first slash, and it is not file:, json: or a host device driver",
    harmless="storage clusters (Ceph, NBD, iSCSI) are named this way",
)
def ref_remote(facts: Facts) -> Iterator[Evidence]:
    for name in names(facts):
        if name.protocol and name.protocol not in {"file", "json", *_DEVICE_DRIVERS}:
            yield _evidence(name, value=name.text)
            yield _evidence(name, "protocol", name.protocol)


@rule(
    "QCOW2-REF-JSON",
    Severity.HIGH,
    "a name in the image is a block driver description",
    note="json: names build any graph of block drivers: consistent with management software, or with an image made "
    "to open host files (the class of CVE-2024-4467); only a plain local image is ever followed here",
    when="the name starts with json:",
    harmless="oVirt and libvirt write json: names for some snapshots",
)
def ref_json(facts: Facts) -> Iterator[Evidence]:
    for name in names(facts):
        if name.text.startswith("json:"):
            yield _evidence(name)
            for key, value in _json_members(name.text):
                yield _evidence(name, key, value)


def _json_members(text: str) -> list[tuple[str, str]]:
    """Return the drivers and file names inside a json: name, at most 32 of them."""
    try:
        pending = [("", json.loads(text.removeprefix("json:")))]
    except (ValueError, RecursionError):
        return []
    found: list[tuple[str, str]] = []
    while pending and len(found) < 32:
        prefix, value = pending.pop(0)
        if isinstance(value, dict):
            pending += [(f"{prefix}.{key}" if prefix else str(key), item) for key, item in list(value.items())[:64]]
        elif prefix.rpartition(".")[2] in {"driver", "filename", "host", "path", "url", "server", "export"}:
            found.append((prefix, str(value)))
    return found


@rule(
    "QCOW2-REF-DEVICE",
    Severity.HIGH,
    "a name in the image is a device or a host folder",
    note="QEMU would open a device, a kernel file system, or with fat: a host folder as a disk; never followed here",
    when="the name lies below /dev, /proc or /sys, or has a host device driver",
    harmless="overlays on logical volumes use /dev names",
)
def ref_device(facts: Facts) -> Iterator[Evidence]:
    for name in names(facts):
        if _is_device(name):
            yield _evidence(name)


@rule(
    "QCOW2-REF-OBFUSCATED",
    Severity.HIGH,
    "a name in the image does not read as what it is",
    note="the name a person sees and the name software uses differ: consistent with an attempt to mislead, or with "
    "a file name in another character set",
    when="the name holds control, invisible or undecodable characters, ends in spaces, or hides text behind a NUL",
)
def ref_obfuscated(facts: Facts) -> Iterator[Evidence]:
    for name in names(facts):
        hidden = name.stored[len(name.effective) :].strip(b"\0")
        text = name.text
        if hidden or text != text.strip() or not text.isprintable():
            yield _evidence(name, "effective_name")
            yield _evidence(name, "stored_bytes", name.stored[:256].hex(" "))


@rule(
    "QCOW2-REF-SELF",
    Severity.HIGH,
    "a name leads back to the image or into its own chain",
    note="the chain is a loop, on which QEMU hangs when it opens the image: consistent with crafting or with files "
    "renamed after the image was made",
    when="the file a name means is the image itself or an image that led to it",
)
def ref_self(facts: Facts) -> Iterator[Evidence]:
    links = chain(facts)
    for member in (*links.backing, *((links.data,) if links.data else ())):
        if member.status == "loop":
            yield Evidence(f"{member.role}_file", member.name, structure="chain", file=member.path)


# --- the backing file ----------------------------------------------------------------------------


@rule(
    "QCOW2-BACKING-NO-FORMAT",
    Severity.MEDIUM,
    "the format of the backing file is not recorded",
    note="software guesses it from content that a guest can write: consistent with an old qemu-img or another writer",
    when="there is a backing file name and no, or an empty, backing format extension",
    harmless="QCOW version 1 cannot record it (Low there)",
    validated=QEMU_MADE,
)
def backing_no_format(facts: Facts) -> Iterator[Evidence | Finding]:
    if not facts.image.backing_name:
        return
    if facts.header.version == 1:
        yield variant("QCOW2-BACKING-NO-FORMAT", [facts.field("backing_file_offset")], severity=Severity.LOW)
    elif not facts.image.backing_format:
        yield facts.field("backing_file_offset")


@rule(
    "QCOW2-BACKING-FORMAT-MISMATCH",
    Severity.HIGH,
    "the backing file is not of the recorded format",
    note="two readers may see two different disks: consistent with a base image that was converted or replaced, or "
    "with a raw guest disk that starts with another format's magic",
    when="raw is recorded and the file starts as an image, or an image format is recorded and its magic is absent",
    validated=QEMU_MADE,
)
def backing_format_mismatch(facts: Facts) -> Iterator[Evidence]:
    for member in chain(facts).backing:
        if member.status == "found" and member.declared and member.declared != member.probed:
            yield Evidence("recorded_format", member.declared, structure="backing format", file=member.path)
            yield Evidence("content_starts_as", member.probed, 0, 512, file=member.path)
    recorded = facts.image.backing_format if facts.header.version > 1 else None
    for name in names(facts):
        if name.role == "backing" and name.text.startswith("json:") and recorded:
            drivers = [value for key, value in _json_members(name.text) if key == "driver"]
            if drivers and drivers[0] != recorded:
                yield _evidence(name, "driver", drivers[0])


@rule(
    "QCOW2-BACKING-MISSING",
    Severity.MEDIUM,
    "a file of the backing chain cannot be looked at",
    note="ranges the image does not hold are unknown without it: consistent with an incomplete acquisition",
    when="a name in the chain leads to no file, or to one the policy does not open",
    harmless="expected when a single file was collected for triage",
    validated=QEMU_MADE,
)
def backing_missing(facts: Facts) -> Iterator[Evidence]:
    for member in chain(facts).backing:
        if _worth_telling(facts, member):
            yield Evidence("backing_file", member.name, structure=f"chain member {member.depth}")
            yield Evidence(
                member.status, ", ".join(member.tried) or member.why, structure=f"chain member {member.depth}"
            )


def _worth_telling(facts: Facts, member: Member) -> bool:
    """Whether no rule about names already says why the file was not looked at."""
    if member.status == "refused" and member.depth == 1:
        return all(name.is_plain for name in names(facts) if name.role == member.role)
    return member.status in ("missing", "refused", "broken")


@rule(
    "QCOW2-BACKING-NEWER",
    Severity.LOW,
    "a backing file changed after the image that builds on it",
    note="consistent with a base that was written after the overlay was made, which makes the overlay's content "
    "wrong, or with a copy that set new file times",
    when="the backing file's time of last change is later than the overlay's",
    harmless="copy tools reset file times",
    validated=QEMU_MADE,
)
def backing_newer(facts: Facts) -> Iterator[Evidence]:
    for member in chain(facts).backing:
        if member.mtime is not None and member.overlay_mtime is not None and member.mtime > member.overlay_mtime:
            yield Evidence("backing_mtime", member.mtime, structure=f"chain member {member.depth}", file=member.path)
            yield Evidence("overlay_mtime", member.overlay_mtime, structure=f"chain member {member.depth - 1}")


@rule(
    "QCOW2-BACKING-DEEP",
    Severity.LOW,
    "the backing chain is long",
    note="consistent with a long history of incremental backups, or, above the limit, with resource exhaustion",
    when=f"more than {CHAIN_DEEP} images; High above the chain depth limit",
    harmless="backup tools make dozens",
    validated=QEMU_MADE,
)
def backing_deep(facts: Facts) -> Iterator[Finding]:
    length = chain(facts).length
    if length > CHAIN_DEEP:
        high = length > facts.limits.chain_depth
        evidence = [Evidence("chain_length", length, structure="chain")]
        yield variant("QCOW2-BACKING-DEEP", evidence, severity=Severity.HIGH if high else None)


@rule(
    "QCOW2-BACKING-HIDDEN-TAIL",
    Severity.INFO,
    "the backing file is larger than the disk",
    note="its bytes beyond the end of the disk are invisible through this image",
    when="the backing disk is larger than this one",
    harmless="overlays can be made smaller on purpose",
    validated=QEMU_MADE,
)
def backing_hidden_tail(facts: Facts) -> Iterator[Evidence]:
    for member in chain(facts).backing[:1]:
        if member.disk_size is not None and member.disk_size > facts.image.disk_size:
            yield Evidence("backing_disk_size", member.disk_size, file=member.path)
            yield facts.field("size")


@rule(
    "QCOW2-BACKING-WITH-RAW-DATAFILE",
    Severity.HIGH,
    "a backing file together with a raw data file",
    note="the format forbids it, QEMU opens it: what reads as zeros in the raw file comes from the backing file here",
    when="there is a backing file name and autoclear bit 1 is set",
)
def backing_with_raw_datafile(facts: Facts) -> Iterator[Evidence]:
    if facts.image.backing_name and facts.header.autoclear_features & Autoclear.RAW_EXTERNAL_DATA:
        yield facts.field("backing_file_offset")
        yield facts.field("autoclear_features")


@rule(
    "QCOW2-DATAFILE-NAME",
    Severity.MEDIUM,
    "the external data file is not named, not there or too short",
    note="the image is not self-contained: its guest data cannot be read from what was collected",
    when="incompatible bit 2 is set and the name is absent, empty, of no file, or of a raw file below the disk size",
    harmless="some deployments give the data file at run time and store no name",
    validated=QEMU_MADE,
)
def datafile_name(facts: Facts) -> Iterator[Evidence]:
    if not facts.header.external_data:
        return
    extension = facts.image.extension(ExtensionType.DATA_FILE)
    member = chain(facts).data
    if extension is None or member is None:
        place = None if extension is None else extension.offset
        yield Evidence("data_file", None, place, structure="data file name")
    elif member.status == "loop" or _worth_telling(facts, member):
        yield Evidence("data_file", member.name, extension.offset + 8, extension.length, "data file name")
        yield Evidence(member.status, ", ".join(member.tried) or member.why)
    elif facts.header.autoclear_features & Autoclear.RAW_EXTERNAL_DATA and member.file_size < facts.image.disk_size:
        yield Evidence("data_file_size", member.file_size, file=member.path)
        yield facts.field("size")


# --- sizes ---------------------------------------------------------------------------------------


@rule(
    "QCOW2-SIZE-ABSURD",
    Severity.MEDIUM,
    "the disk is far larger than the file",
    note="consistent with an empty thin disk, or with an image made to exhaust whatever expands it",
    when="the size is above what QEMU accepts, or above 64 TiB and a million times the file; Info from 10,000 times",
    harmless="an empty thin disk of 1 TiB takes 200 KiB",
    validated=QEMU_MADE,
)
def size_absurd(facts: Facts) -> Iterator[Finding]:
    size, stored = facts.header.size, max(facts.image.file_size, 1)
    ratio = size // stored
    evidence = [facts.field("size"), Evidence("file_size", stored), Evidence("ratio", ratio)]
    if size > MAX_DISK_BYTES or (size > 64 * TiB and ratio > 1_000_000):
        yield variant("QCOW2-SIZE-ABSURD", evidence)
    elif ratio > 10_000:
        yield variant("QCOW2-SIZE-ABSURD", evidence, severity=Severity.INFO)


@rule(
    "QCOW2-TABLE-ABSURD",
    Severity.HIGH,
    "a table is far larger than the image can need",
    note="consistent with an image made to exhaust the memory or time of whatever parses it",
    when="an L1 or refcount table above 1 MiB and four times its need, more than 10,000 snapshots, more than 1,024 "
    "bytes of extra data, or a bitmap table above four times its need",
)
def table_absurd(facts: Facts) -> Iterator[Evidence]:
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


def _absurd_snapshots(facts: Facts) -> Iterator[Evidence]:
    header = facts.header
    for entry in facts.image.snapshots:
        if entry.l1_size * 8 <= MiB:
            continue
        reach = (entry.disk_size or header.size) + entry.vm_state_size
        if entry.l1_size > 4 * (-(-reach // header.l2_span) + 1):
            yield Evidence("l1_size", entry.l1_size, entry.offset + 8, 4, "snapshot table", snapshot=entry.id)


def _absurd_bitmaps(facts: Facts) -> Iterator[Evidence]:
    header = facts.header
    for bitmap in facts.image.bitmaps:
        bits = -(-header.size >> bitmap.granularity_bits) if bitmap.granularity_bits < 64 else 1
        clusters = -(-abs(bits) // 8 // header.cluster_size)
        if bitmap.table_size > 4 * abs(clusters) + 4:
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
def nested_image(facts: Facts) -> Iterator[Evidence | Finding]:
    head = _guest_head(facts)
    if head is None:
        return
    kind = probe(head)
    evidence = Evidence("content_starts_as", kind, structure="guest disk", guest_offset=0, length=512)
    if kind == "luks":
        yield variant("QCOW2-NESTED-IMAGE", [evidence], severity=Severity.INFO, title="the disk starts with LUKS")
    elif kind != "raw":
        yield evidence


def _guest_head(facts: Facts) -> Source | None:
    """Return the first sector of the active disk where this image (or its data file) holds it plainly."""
    image = facts.image
    if image.header.crypt_method:
        return None
    from ..source import BytesSource, FileSource

    data = None
    try:
        if image.header.external_data:
            member = chain(facts).data
            if member is None or not member.path:
                return None
            data = FileSource(member.path, regular_only=True)
        return BytesSource(Disk(image, data=data).read(0, 512))
    except (Qcow2Error, OSError):
        return None  # other rules say why the disk cannot be read
    finally:
        if data is not None:
            data.close()


@rule(
    "QCOW2-POLYGLOT",
    Severity.HIGH,
    "the file is also valid as another format",
    note="the same bytes can be parsed two ways: consistent with crafting to pass a filter, or with a file appended "
    "to or embedded in the image",
    when="an ISO 9660 volume, a partition table, a PDF or tar header stands in the header cluster, or a ZIP "
    "directory ends the file",
)
def polyglot(facts: Facts) -> Iterator[Evidence]:
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
    length = min(image.file_size, 65_557)  # the longest end record: 22 bytes and a comment
    place = _zip_end(image.read(image.file_size - length, length))
    if place is not None:
        yield Evidence("signature", "ZIP end record", image.file_size - length + place, 22, "end of file")


def _partitions(head: bytes) -> bool:
    entries = [head[at : at + 16] for at in range(446, 510, 16)]
    used = [entry for entry in entries if entry[4] and int.from_bytes(entry[12:16], "little")]
    return bool(used) and all(entry[0] in (0, 0x80) for entry in entries)


def _zip_end(data: bytes) -> int | None:
    """Return where the ZIP end record starts whose comment ends exactly with the data."""
    at = data.rfind(b"PK\5\6")
    while at >= 0:
        comment = int.from_bytes(data[at + 20 : at + 22], "little")
        size = int.from_bytes(data[at + 12 : at + 16], "little")
        if at + 22 + comment == len(data):
            directory = data[at - size : at - size + 4] if size <= at else b"PK\1\2"
            if directory == b"PK\1\2" or size == 0:
                return at
        at = data.rfind(b"PK\5\6", 0, at)
    return None


# --- gatekeepers ---------------------------------------------------------------------------------


@rule(
    "QCOW2-GATEKEEPER",
    Severity.INFO,
    "what services that accept images would say to this one",
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
    yield _verdict("KubeVirt CDI, CloudStack import", names_in)
    unformatted = ["a backing file without a recorded format"] if _unformatted(facts) else []
    yield _verdict("libvirt", unformatted)


def _unformatted(facts: Facts) -> bool:
    return bool(facts.image.backing_name) and (facts.header.version == 1 or not facts.image.backing_format)


def _verdict(gate: str, refusals: list[str]) -> Evidence:
    return Evidence(gate, f"refuses: {', '.join(refusals)}" if refusals else "accepts", structure="gatekeeper")
