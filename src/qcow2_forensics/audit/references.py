"""Rules about names in the image and about what could harm whoever opens it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

from ..errors import ForbiddenReference
from ..findings import Evidence, Severity
from ..format.extensions import ExtensionType
from ..format.header import Autoclear
from ..limits import JSON_MEMBERS_LISTED
from ..reader.references import json_options
from ..text import is_plain
from .facts import Facts
from .reference_names import CHAIN_DEEP, Member, Name, chain, is_beside, names
from .rules import QEMU_MADE, Chapter, OneFinding, of_fields

rule = Chapter(__name__, "References")

_DEVICE_DRIVERS = frozenset({"fat", "host_device", "host_cdrom", "nvme", "host_floppy"})
_JSON_SHOWN = frozenset({"driver", "filename", "host", "path", "url", "server", "export", ""})  # "": what is left out
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
    harmless="libvirt and oVirt store absolute names; Low when a file of that name is beside the image",
)
def ref_absolute(facts: Facts) -> Iterator[Evidence | OneFinding]:
    for name in names(facts):
        if name.is_absolute and not _is_device(name):
            if is_beside(facts, name.path):
                yield OneFinding([_evidence(name)], severity=Severity.LOW)
            else:
                yield _evidence(name)


@rule(
    "QCOW2-REF-TRAVERSAL",
    Severity.HIGH,
    "a relative name leaves the image's folder",
    note="leads outside the folder of the image: consistent with a layout of shared base images, or with "
    "an image made to read a file of the examiner's",
    when="the name, with its '..' steps resolved, leads above the image's folder",
    harmless="../base is common in some layouts; Medium when the caller's policy finds an image there",
)
def ref_traversal(facts: Facts) -> Iterator[Evidence | OneFinding]:
    for name in names(facts):
        if not name.leaves_folder:
            continue
        members = [member for member in chain(facts).backing if member.depth == 1 and member.name == name.text]
        there = bool(members) and members[0].status == "found" and not members[0].stands_in
        if there and members[0].probed in ("qcow2", "qcow"):
            yield OneFinding([_evidence(name)], severity=Severity.MEDIUM)
        else:
            yield _evidence(name)


@rule(
    "QCOW2-REF-REMOTE",
    Severity.HIGH,
    "a name in the image has a protocol",
    note="QEMU would open a network connection or a special driver for it; it is never followed here",
    when="a colon comes before the first slash, and it is not file:, json: or a host device driver",
    harmless="storage clusters (Ceph, NBD, iSCSI) are named this way",
)
def ref_remote(facts: Facts) -> Iterator[Evidence]:
    for name in names(facts):
        if name.protocol and name.protocol not in {"file", "json", *_DEVICE_DRIVERS}:
            yield _evidence(name)
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
            members = _json_members(name.text)
            times = Counter(key for key, _ in members)
            for key, value in members:
                yield _evidence(name, key if times[key] == 1 else f"{key}, one of {times[key]}", value)


def _json_members(text: str) -> list[tuple[str, str]]:
    """Return the drivers and file names inside a json: name, some of many, and that it goes on."""
    try:
        wanted = (pair for pair in json_options(text) if pair[0].rpartition(".")[2] in _JSON_SHOWN)
        found = [(key, str(value)) for key, value in islice(wanted, JSON_MEMBERS_LISTED + 1)]
    except ForbiddenReference:
        return []
    return found if len(found) <= JSON_MEMBERS_LISTED else [*found[:-1], ("...", "not looked at")]


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
    "a name in the image looks different from what software reads",
    note="the name a person sees and the name software uses differ: consistent with an attempt to mislead, or with "
    "a file name in another character set",
    when="the name holds control, invisible or undecodable characters, ends in spaces, or has text after a NUL",
)
def ref_obfuscated(facts: Facts) -> Iterator[Evidence]:
    for name in names(facts):
        hidden = name.stored[len(name.effective) :].strip(b"\0")
        text = name.text
        if hidden or text != text.strip() or not is_plain(text):
            yield _evidence(name, "effective_name")
            yield _evidence(name, "stored_bytes", name.stored[:256].hex(" "))


@rule(
    "QCOW2-REF-SELF",
    Severity.HIGH,
    "a name leads back to the image or to another image of its chain",
    note="the chain is a loop, on which QEMU hangs when it opens the image: consistent with crafting or with files "
    "renamed after the image was made",
    when="the file a name means is the image itself or an image that led to it",
)
def ref_self(facts: Facts) -> Iterator[Evidence]:
    for member in chain(facts).members:
        if member.status == "loop":
            yield Evidence(f"{member.role}_file", member.name, structure="chain", file=member.path)


@rule(
    "QCOW2-REF-STAND-IN",
    Severity.LOW,
    "a file of the same name stands in for one elsewhere",
    note="the name leads to another folder or machine; the file of that base name which was found instead fits what "
    "the image records, and need not be the one it was made with",
    when="a name leads nowhere that may be followed, and a fitting file is beside the image or in a folder the caller named",
    harmless="expected when evidence was copied into one folder",
)
def ref_stand_in(facts: Facts) -> Iterator[Evidence]:
    for member in chain(facts).members:
        if member.stands_in and member.status == "found":
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
def backing_no_format(facts: Facts) -> Iterator[Evidence | OneFinding]:
    if not facts.image.backing_name:
        return
    if facts.header.version == 1:
        yield OneFinding([facts.field("backing_file_offset")], severity=Severity.LOW)
    elif not facts.image.backing_format and "backing_format" not in facts.image.unreadable_facts:
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
            if any(driver != recorded for driver in drivers):
                yield from (_evidence(name, "driver", driver) for driver in drivers)


@rule(
    "QCOW2-BACKING-MISSING",
    Severity.MEDIUM,
    "a file of the backing chain is missing or cannot be opened",
    note="ranges the image does not hold are unknown without it: consistent with an incomplete acquisition",
    when="a name in the chain leads to no file, or to one the policy does not open",
    harmless="expected when a single file was collected for triage",
    validated=QEMU_MADE,
)
def backing_missing(facts: Facts) -> Iterator[Evidence]:
    for member in chain(facts).backing:
        if _is_unseen(facts, member):
            yield Evidence("backing_file", member.name, structure=f"chain member {member.depth}")
            yield Evidence(
                member.status, ", ".join(member.tried) or member.why, structure=f"chain member {member.depth}"
            )


def _is_unseen(facts: Facts, member: Member) -> bool:
    """Whether no rule about names already reports why the file was not looked at."""
    if member.status == "refused" and member.depth == 1:
        named = [name for name in names(facts) if name.role == member.role]
        return all(name.is_plain or (name.is_absolute and not _is_device(name)) for name in named)
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
def backing_deep(facts: Facts) -> Iterator[OneFinding]:
    length = chain(facts).length
    if length > CHAIN_DEEP:
        high = length > facts.limits.chain_depth
        evidence = [Evidence("chain_length", length, structure="chain")]
        yield OneFinding(evidence, severity=Severity.HIGH if high else None)


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


rule(
    "QCOW2-BACKING-WITH-RAW-DATAFILE",
    Severity.HIGH,
    "a backing file together with a raw data file",
    note="the format forbids it, QEMU opens it: what reads as zeros in the raw file comes from the backing file here",
    when="there is a backing file name and autoclear bit 1 is set",
)(
    of_fields(
        lambda facts: facts.image.backing_name and facts.header.autoclear_features & Autoclear.RAW_EXTERNAL_DATA,
        "backing_file_offset",
        "autoclear_features",
    )
)


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
    elif member.status == "loop" or _is_unseen(facts, member):
        yield Evidence("data_file", member.name, extension.data_offset, extension.length, "data file name")
        yield Evidence(member.status, ", ".join(member.tried) or member.why)
    elif facts.header.raw_data_file and member.file_size < facts.image.disk_size:
        yield Evidence("data_file_size", member.file_size, file=member.path)
        yield facts.field("size")
