"""The variable-length metadata beside the header: extensions, snapshot table, bitmap directory.

Each reader returns what could be parsed and the problems met; lengths are checked against the
file and the limits before anything is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from ..errors import FormatError, Qcow2Error
from ..limits import KiB, Limits
from . import structures
from .rules import BITMAPS, DISK, INT64_MAX, SNAPSHOTS, Problem, snapshot_part
from .structures import SECTOR, BitmapEntry, Crypt, Extension, ExtensionType, Header, SnapshotEntry, padded

_L1_SIZE_AT, _EXTRA_SIZE_AT = 8, 36  # of the fields, in a snapshot table entry
_MAX_FORMAT_NAME = 15  # bytes, what QEMU accepts
_CHUNK = 256 * KiB
_ONLY_BITMAPS = frozenset({BITMAPS})  # one for all: there may be 65,535 problems


class Metadata(Protocol):
    """What these readers need of an image."""

    header: Header
    limits: Limits
    file_size: int

    def read(self, offset: int, length: int) -> bytes: ...

    def extension(self, kind: ExtensionType) -> Extension | None: ...


# --- header extensions -------------------------------------------------------------------------


def read_extensions(image: Metadata) -> tuple[tuple[Extension, ...], tuple[Problem, ...]]:
    """Walk the header extension area ("Header extensions"); bytes past the file end are zeros."""
    header = image.header
    if header.version == 1 or not 9 <= header.cluster_bits <= 21:
        return (), ()
    end = header.backing_file_offset or header.cluster_size
    end = min(end, header.cluster_size)
    area = image.read(0, end).ljust(end, b"\0") if header.header_length < end else b""
    found: list[Extension] = []
    problems: list[Problem] = []
    at = header.header_length
    while at + 8 <= len(area):
        kind = int.from_bytes(area[at : at + 4], "big")
        length = int.from_bytes(area[at + 4 : at + 8], "big")
        if kind == ExtensionType.END:
            if length > end - at - 8:  # QEMU refuses it, but nothing depends on it
                problems.append(_extension_problem(at, kind, length, "reaches past the header extension area"))
            break
        if length > end - at - 8:
            problems.append(_extension_problem(at, kind, length, "reaches past the header extension area", DISK))
            break
        if len(found) == image.limits.header_extensions:
            problems.append(_too_many_extensions(at, image.limits.header_extensions))
            break
        extension = Extension(kind, at, area[at + 8 : at + 8 + length])
        found.append(extension)
        problems.extend(_extension_rules(header, extension))
        at += 8 + padded(length)
    return tuple(found), tuple(problems)


def _extension_problem(at: int, kind: int, length: int, what: str, *blocks: str) -> Problem:
    message = f"header extension {kind:#010x} of {length} bytes {what}"
    return Problem("QCOW2-EXTENSION-INVALID", message, "extension", kind, at, frozenset(blocks))


def _too_many_extensions(at: int, limit: int) -> Problem:
    message = f"there are more than {limit} header extensions"
    return Problem("QCOW2-EXTENSION-INVALID", message, "header extensions", limit + 1, at, frozenset({DISK}), limit)


def _extension_rules(header: Header, extension: Extension) -> Iterator[Problem]:
    kind, at, length = extension.type, extension.offset, extension.length
    if kind == ExtensionType.BACKING_FORMAT and length > _MAX_FORMAT_NAME:
        yield _extension_problem(at, kind, length, "is longer than a format name", DISK)
    elif kind == ExtensionType.CRYPTO:
        if header.crypt_method != Crypt.LUKS:
            yield _extension_problem(at, kind, length, "names a LUKS header, but the image is not LUKS", DISK)
        elif length != structures.CRYPTO_EXTENSION.size:
            yield _extension_problem(at, kind, length, "does not have 16 bytes", DISK)
        elif structures.CRYPTO_EXTENSION.unpack(extension.data)[0] % header.cluster_size:
            yield _extension_problem(at, kind, length, "names an unaligned LUKS header", DISK)
    elif kind == ExtensionType.BITMAPS and length != structures.BITMAPS_EXTENSION.size:
        yield _extension_problem(at, kind, length, "does not have 24 bytes", BITMAPS)


# --- snapshot table ----------------------------------------------------------------------------


def read_snapshot_table(image: Metadata) -> tuple[tuple[SnapshotEntry, ...], tuple[Problem, ...]]:
    """Parse the snapshot table up to its first entry that cannot be."""
    header, limits = image.header, image.limits
    if header.version == 1 or header.nb_snapshots == 0:
        return (), ()
    if header.snapshots_offset == 0:
        place = header.offset_of("snapshots_offset") or 0
        return (), (_table_problem(place, "snapshots_offset", 0, "the snapshot table lies on the header", SNAPSHOTS),)
    if header.snapshots_offset % header.cluster_size or header.nb_snapshots > limits.snapshots:
        return (), ()  # the header's own problem says so
    found: list[SnapshotEntry] = []
    problems: list[Problem] = []
    reader = _Window(image)
    unaligned, most_l1 = header.cluster_size - 1, limits.l1_bytes // 8
    at = header.snapshots_offset
    for index in range(header.nb_snapshots):
        problem = _read_snapshot(reader, index, at, found, limits, header)
        if problem is not None:
            problems.append(problem)
            break
        entry = found[-1]
        place = entry.l1_table_offset
        if not place or place & unaligned or place > INT64_MAX or entry.l1_size > most_l1:
            problems.extend(_snapshot_rules(header, limits, entry))
        at += padded(entry.length)
        if at - header.snapshots_offset > limits.snapshot_table_bytes:
            size = at - header.snapshots_offset
            text = "the snapshot table is too large"
            problems.append(
                _table_problem(at, "snapshot_table", size, text, SNAPSHOTS, limit=limits.snapshot_table_bytes)
            )
            break
    return tuple(found), tuple(problems)


class _Window:
    """Forward reads in chunks: one read for a small table, bounded memory for a huge one."""

    def __init__(self, image: Metadata) -> None:
        self._image = image
        self._start = 0
        self._data = b""

    def look(self, offset: int, length: int) -> tuple[bytes, int]:
        """Return data and where in it ``offset`` is; ``length`` bytes follow there unless the file ends."""
        at = offset - self._start
        if at < 0 or at + length > len(self._data):
            self._start, at = offset, 0
            self._data = self._image.read(offset, max(length, _CHUNK))
        return self._data, at


def _read_snapshot(
    reader: _Window, index: int, at: int, found: list[SnapshotEntry], limits: Limits, header: Header
) -> Problem | None:
    data, start = reader.look(at, structures.SNAPSHOT_ENTRY_LENGTH)
    if len(data) < start + structures.SNAPSHOT_ENTRY_LENGTH:
        return _table_problem(at, "snapshot", index, f"snapshot table entry {index} lies past the end of the file")
    head = structures.parse_snapshot_head(data, start)
    if head.extra_length > limits.snapshot_extra_bytes:
        text = f"snapshot table entry {index} has too much extra data"
        return _table_problem(
            at + _EXTRA_SIZE_AT, "extra_data_size", head.extra_length, text, limit=limits.snapshot_extra_bytes
        )
    length = head.total_length
    if len(data) < start + length:
        data, start = reader.look(at, length)
    if len(data) < start + length:
        return _table_problem(at, "snapshot", index, f"snapshot table entry {index} reaches past the end of the file")
    if header.version >= 3 and head.extra_length < 16:
        text = f"snapshot table entry {index} lacks the extra data version 3 requires"
        return _table_problem(at + _EXTRA_SIZE_AT, "extra_data_size", head.extra_length, text)
    tail = data[start + structures.SNAPSHOT_ENTRY_LENGTH : start + length]
    found.append(structures.build_snapshot_entry(index, at, head, tail))
    return None


def _table_problem(at: int, field: str, value: int, message: str, *blocks: str, limit: int | None = None) -> Problem:
    parts = frozenset(blocks or (SNAPSHOTS,))
    return Problem("QCOW2-SNAPSHOT-TABLE-INVALID", message, field, value, at, parts, limit)


def _snapshot_rules(header: Header, limits: Limits, entry: SnapshotEntry) -> Iterator[Problem]:
    part = snapshot_part(entry.index)
    if entry.l1_table_offset % header.cluster_size or entry.l1_table_offset > INT64_MAX or not entry.l1_table_offset:
        text = f"the L1 table of snapshot table entry {entry.index} is at an impossible offset"
        yield _table_problem(entry.offset, "l1_table_offset", entry.l1_table_offset, text, part)
    if entry.l1_size * 8 > limits.l1_bytes:
        text = f"the L1 table of snapshot table entry {entry.index} is too large"
        yield _table_problem(
            entry.offset + _L1_SIZE_AT, "l1_size", entry.l1_size, text, part, limit=limits.l1_bytes // 8
        )


# --- bitmap directory --------------------------------------------------------------------------


def read_bitmap_directory(image: Metadata) -> tuple[tuple[BitmapEntry, ...], tuple[Problem, ...]]:
    """Parse the bitmap directory ("Bitmaps extension"); its faults never block the disk."""
    extension = image.extension(ExtensionType.BITMAPS)
    if extension is None or extension.length != structures.BITMAPS_EXTENSION.size:
        return (), ()
    try:
        return _read_directory(image, extension)
    except Qcow2Error as error:
        return (), (_bitmap_problem(extension.offset, str(error)),)


def _bitmap_problem(at: int, message: str) -> Problem:
    return Problem("QCOW2-BITMAP-INVALID", message, "bitmap_directory", 0, at, _ONLY_BITMAPS)


def _read_directory(image: Metadata, extension: Extension) -> tuple[tuple[BitmapEntry, ...], tuple[Problem, ...]]:
    facts = structures.parse_bitmaps_extension(extension.data)
    limits, cluster_size = image.limits, image.header.cluster_size
    if facts.reserved:
        raise FormatError("the bitmaps extension has reserved bits set", offset=extension.offset)
    if not 1 <= facts.nb_bitmaps <= limits.bitmaps:
        raise FormatError(f"the bitmaps extension counts {facts.nb_bitmaps} bitmaps", offset=extension.offset)
    if facts.directory_offset % cluster_size or not facts.directory_offset:
        raise FormatError("the bitmap directory is not aligned to a cluster", offset=facts.directory_offset)
    if facts.directory_size > limits.bitmap_directory_bytes:
        raise FormatError(f"the bitmap directory has {facts.directory_size} bytes", offset=facts.directory_offset)
    if facts.directory_offset + facts.directory_size > image.file_size:
        raise FormatError("the bitmap directory reaches past the end of the file", offset=facts.directory_offset)
    data = image.read(facts.directory_offset, facts.directory_size)
    found: list[BitmapEntry] = []
    problems: list[Problem] = []
    at = 0
    for index in range(facts.nb_bitmaps):
        entry = structures.parse_bitmap_entry(data, at, facts.directory_offset + at)
        if entry is None:
            text = f"bitmap directory entry {index} reaches past the directory"
            problems.append(_bitmap_problem(facts.directory_offset + at, text))
            break
        found.append(entry)
        for message in _bitmap_faults(limits, image.header, entry):
            problems.append(_bitmap_problem(entry.offset, message))
        at += padded(entry.length)
    return tuple(found), tuple(problems)


def _bitmap_faults(limits: Limits, header: Header, entry: BitmapEntry) -> Iterator[str]:
    cluster_size = header.cluster_size
    if entry.type != structures.DIRTY_TRACKING_BITMAP:
        yield f"a bitmap has the unknown type {entry.type}"
    if not 9 <= entry.granularity_bits <= 31:
        yield f"a bitmap has the granularity 2^{entry.granularity_bits}"
    if len(entry.name_bytes) > limits.name_bytes:
        yield "a bitmap has too long a name"
    elif not entry.name_bytes:
        yield "a bitmap has no name"
    if entry.extra:
        yield "a bitmap has extra data, which QEMU refuses"
    if entry.table_offset % cluster_size:
        yield "a bitmap table is not aligned to a cluster"
    if not entry.table_offset or not entry.table_size:
        yield "a bitmap has no table"
    elif entry.is_cut_short(cluster_size, header.size // SECTOR * SECTOR):
        yield "a bitmap table ends before the disk"
    if entry.table_size > limits.bitmap_table_entries:
        yield "a bitmap table is too large"
    if entry.table_size * cluster_size > limits.bitmap_data_bytes:
        yield "a bitmap has too much data"
    if entry.flags & ~7:
        yield "a bitmap has unknown flags"
