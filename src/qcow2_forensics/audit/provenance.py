"""Rules about who wrote the image and how."""

from __future__ import annotations

from collections.abc import Iterator

from ..findings import Evidence, Severity
from ..format.extensions import Extension, ExtensionType
from ..format.header import (
    FEATURE_ROW,
    KNOWN_INCOMPATIBLE,
    V2_HEADER_LENGTH,
    V2_LEFTOVER,
    Compatible,
    Compression,
    FeatureName,
)
from ..limits import SAMPLES
from ..residue import content
from ..text import decoded, listed, plural
from .facts import Facts
from .rules import QEMU_MADE, Chapter, Depth, OneFinding, of_fields
from .writer_layouts import counts_nothing, layout

rule = Chapter(__name__, "Provenance and writer")

_LENGTHS_LISTED = 20  # of extra data: writers have one or two
_KNOWN_EXTENSIONS = frozenset(ExtensionType)

# (kind, bit) -> the name QEMU has given it since the bit exists.
_QEMU_NAMES = {
    (0, 0): b"dirty bit",
    (0, 1): b"corrupt bit",
    (0, 2): b"external data file",
    (0, 3): b"compression type",
    (0, 4): b"extended L2 entries",
    (1, 0): b"lazy refcounts",
    (2, 0): b"bitmaps",
    (2, 1): b"raw external data",
}


def _feature_table(facts: Facts) -> Extension | None:
    return facts.image.extension(ExtensionType.FEATURE_NAMES) if facts.header.version == 3 else None


# --- writer --------------------------------------------------------------------------------------

_BY_ROWS = {
    3: "QEMU 1.7 to 3.x, or the OCaml writer of hyperkit (same three names)",
    4: "QEMU 4.0 to 5.0",
    6: "QEMU between the releases 5.0 and 5.2",
    7: "QEMU 5.1",
    8: "QEMU 5.2 or later",
}


@rule(
    "QCOW2-WRITER-PROFILE",
    Severity.INFO,
    "which software last rewrote the header",
    note="a range of versions: every later QEMU that rewrites the header updates it, so this is about the last rewrite of "
    "the header and not about the creation of the image",
    when="always",
    validated=QEMU_MADE,
)
def writer_profile(facts: Facts) -> Iterator[OneFinding]:
    evidence = list(_signs(facts))
    readings = [item.value for item in evidence if item.field == "reading"]
    title = (
        f"header last written by {readings[0]}"
        if readings
        else "unknown writer: the header and the layout are of none that is known"
    )
    yield OneFinding(evidence, title=title)


def _signs(facts: Facts) -> Iterator[Evidence]:
    header, image = facts.header, facts.image
    found = layout(facts)
    if header.version == 1:
        if found is not None:
            yield facts.field(found.field)._replace(field="reading", value=found.writer)
        yield facts.field("cluster_bits")
        yield facts.field("l2_bits")
        return
    reading = _header_reading(facts)
    if reading is not None:
        yield reading
    first = facts.read(header.refcount_table_offset, 8)
    if header.refcount_table_offset and len(first) == 8 and first[0] & 0x80:
        at = header.refcount_table_offset
        yield Evidence("reading", "tcmu-runner before its fix: flag in refcount table", at, 8, "refcount table")
    if found is not None:
        name = "layout" if reading is not None else "reading"
        yield facts.field(found.field)._replace(field=name, value=found.writer)
    elif reading is None and header.version == 3 and counts_nothing(facts):
        words = "a library that counts no cluster of its own, as Go libraries do"
        yield Evidence("reading", words, header.refcount_table_offset, 8, "refcount table")
    yield from _version3_facts(facts)
    lengths = sorted({entry.extra_length for entry in image.snapshots})
    if lengths:
        yield Evidence(
            "snapshot_extra_data", listed([str(length) for length in lengths], _LENGTHS_LISTED), header.snapshots_offset
        )


def _header_reading(facts: Facts) -> Evidence | None:
    """Return what the header itself shows about its writer, None where only the layout shows it."""
    header = facts.header
    if header.version == 2:
        at, known = V2_LEFTOVER
        if facts.read(at, len(known)) != known:
            return None
        return Evidence("reading", "qemu-img of the compat=0.10 era, QEMU 1.1 or later", at, len(known), "header")
    table = _feature_table(facts)
    if table is not None:
        rows = table.length // FEATURE_ROW
        reading = _BY_ROWS.get(rows, f"an unknown writer of a feature table with {plural(rows, 'row')}")
        return Evidence("reading", reading, table.offset, table.length + 8, "feature name table")
    found = layout(facts)
    if found is None or "QEMU" not in found.writer:
        return None
    if header.cluster_size <= 4096:  # QEMU leaves the table out of small header clusters
        return Evidence(
            "reading", "QEMU 5.1 or later" if header.header_length >= 112 else "QEMU before 5.1", 100, 4, "header"
        )
    if header.header_length > 104:
        return None  # since QEMU 5.1, which writes the table
    return Evidence("reading", "QEMU 2.x or older", header.header_length, structure="feature name table (absent)")


def _version3_facts(facts: Facts) -> Iterator[Evidence]:
    if facts.header.version == 3:
        table = _feature_table(facts)
        if table is not None:
            place = table.offset, table.length + 8, "feature name table"
            yield Evidence("feature_table_rows", table.length // FEATURE_ROW, *place)
        yield facts.field("header_length")
        yield facts.field("compatible_features")


@rule(
    "QCOW2-FEATURES",
    Severity.INFO,
    "how the image was created",
    note="creation options and use that differ from QEMU's defaults",
    when="always",
    validated=QEMU_MADE,
)
def features(facts: Facts) -> Iterator[Evidence]:
    header = facts.header
    if header.version == 1:
        yield facts.field("cluster_bits")
        return
    if header.compression_type != Compression.ZLIB:
        yield facts.field("compression_type")
    if header.extended_l2:
        yield facts.field("incompatible_features", "extended L2 entries")
    if header.compatible_features & Compatible.LAZY_REFCOUNTS:
        yield facts.field("compatible_features", "lazy refcounts")
    if header.refcount_order != 4:
        yield facts.field("refcount_order")
    if header.cluster_bits != 16:
        yield facts.field("cluster_bits")
    if facts.depth >= Depth.STANDARD and facts.has_census:
        check = facts.census.check or {}
        for key in ("total-clusters", "allocated-clusters", "compressed-clusters"):
            if key in check:
                yield Evidence(key, check[key])


# --- odd features --------------------------------------------------------------------------------


@rule(
    "QCOW2-FEATURE-TABLE-ODD",
    Severity.LOW,
    "the feature name table is unlike QEMU's",
    note="the table only names bits for error messages: consistent with another writer or with editing",
    when="a row names an unknown bit, gives a known bit another name, repeats one, or the length is not whole rows",
    harmless="newer QEMU versions may add rows",
)
def feature_table_odd(facts: Facts) -> Iterator[Evidence]:
    table = _feature_table(facts)
    if table is None:
        return
    if table.length % FEATURE_ROW:
        yield Evidence("length", table.length, table.offset + 4, 4, "feature name table")
    seen: set[tuple[int, int]] = set()
    for number, row in enumerate(facts.image.feature_names):
        key = (row.kind, row.bit)
        if _QEMU_NAMES.get(key) != row.name or key in seen:
            yield Evidence(_row_name(row), decoded(row.name), *_row_place(table, number))
        seen.add(key)


def _row_name(row: FeatureName) -> str:
    kinds = ("incompatible", "compatible", "autoclear")
    kind = kinds[row.kind] if row.kind < len(kinds) else f"type {row.kind}"
    return f"{kind} bit {row.bit}"


def _row_place(table: Extension, number: int) -> tuple[int, int, str]:
    return table.offset + 8 + number * FEATURE_ROW, FEATURE_ROW, "feature name table"


@rule(
    "QCOW2-UNKNOWN-INCOMPATIBLE",
    Severity.HIGH,
    "unknown incompatible features",
    note="QEMU refuses the image; what the bits mean for its content is unknown",
    when="an incompatible feature bit above 4 is set",
)
def unknown_incompatible(facts: Facts) -> Iterator[Evidence]:
    unknown = facts.header.incompatible_features & ~KNOWN_INCOMPATIBLE
    if facts.header.version >= 3 and unknown:
        yield facts.field("incompatible_features", f"{unknown:#x}")
        table = _feature_table(facts)
        for number, row in enumerate(facts.image.feature_names):
            if table is not None and row.kind == 0 and row.bit < 64 and unknown >> row.bit & 1:
                yield Evidence(_row_name(row), decoded(row.name), *_row_place(table, number))


@rule(
    "QCOW2-UNKNOWN-COMPATIBLE",
    Severity.LOW,
    "unknown compatible features",
    note="an optional feature of a newer or other writer; QEMU keeps the bit",
    when="a compatible feature bit above 0 is set",
)
def unknown_compatible(facts: Facts) -> Iterator[Evidence]:
    unknown = facts.header.compatible_features >> 1 << 1
    if facts.header.version == 3 and unknown:
        yield facts.field("compatible_features", f"{unknown:#x}")


@rule(
    "QCOW2-UNKNOWN-EXTENSION",
    Severity.LOW,
    "the header has an unknown extension",
    note="QEMU keeps what it does not know when it rewrites the header: a vendor's extension, or a place to carry data",
    when="an extension type is not a known one; Medium above 256 bytes or with text or a program in it",
    harmless="vendor extensions",
)
def unknown_extension(facts: Facts) -> Iterator[Evidence | OneFinding]:
    if facts.header.header_length < V2_HEADER_LENGTH:
        return  # a cut header: where extensions start is unknown
    for extension in facts.image.extensions:
        if extension.type in _KNOWN_EXTENSIONS:
            continue
        evidence = [
            Evidence("type", f"{extension.type:#010x}", extension.offset, 8 + extension.length, "header extension"),
        ]
        if extension.data:
            start = extension.data[:16]
            evidence.append(
                Evidence("starts_with", start.hex(" "), extension.data_offset, len(start), "header extension")
            )
        looks = content.signature(extension.data) or ("text" if content.is_text(extension.data) else "")
        if extension.length > 256 or looks:
            evidence.append(
                Evidence("looks_like", looks or "data", extension.data_offset, extension.length, "header extension")
            )
            yield OneFinding(evidence, severity=Severity.MEDIUM)
        else:
            yield from evidence


@rule(
    "QCOW2-PREALLOCATED",
    Severity.INFO,
    "the disk was allocated in advance",
    note="consistent with preallocation=metadata, falloc or full: nearly every cluster is mapped, and those looked at "
    "hold zeros",
    when="at least 95 % of the disk is mapped and sampled clusters are zeros",
    depth=Depth.STANDARD,
    validated=QEMU_MADE,
)
def preallocated(facts: Facts) -> Iterator[Evidence]:
    check = facts.census.check or {}
    total, allocated = int(check.get("total-clusters", 0)), int(check.get("allocated-clusters", 0))
    if total < 16 or allocated < 0.95 * total or facts.header.crypt_method or facts.header.external_data:
        return
    size = facts.cluster_size
    count = -(-facts.image.file_size // size)
    places = range(0, count, max(1, count // SAMPLES))
    zeros = sum(not facts.read(place * size, min(size, 65536)).strip(b"\0") for place in places)
    if zeros >= 0.8 * len(places):
        yield Evidence("allocated_clusters", allocated)
        yield Evidence("total_clusters", total)
        yield Evidence("sampled_clusters", len(places))
        yield Evidence("sampled_zero_clusters", zeros)


rule(
    "QCOW2-QCOW1-MTIME",
    Severity.INFO,
    "a version 1 header with a time",
    note="a time recorded by an old writer, perhaps of the backing file; QEMU writes 0",
    when="the mtime field of a version 1 header is not zero",
)(of_fields(lambda facts: facts.header.version == 1 and facts.header.mtime, "mtime"))
