"""The bitmap directory ("Bitmap directory"): its entries, and how it is read.

Faults of bitmaps never make the disk unreadable.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import NamedTuple

from ..errors import FormatError, Qcow2Error, reason
from ..limits import Limits
from ..text import decoded
from .extensions import BITMAPS_EXTENSION, Extension, ExtensionType, Metadata, parse_bitmaps_extension
from .header import SECTOR, Header, padded
from .header_rules import BITMAPS, Problem

_ONLY_BITMAPS = frozenset({BITMAPS})  # one for all: there may be 65,535 problems
_BITMAP = struct.Struct(">QIIBBHI")
BITMAP_ENTRY_LENGTH = _BITMAP.size  # 24


class BitmapFlag(enum.IntFlag):
    """Flags of a bitmap directory entry."""

    IN_USE = 1
    AUTO = 2
    EXTRA_DATA_COMPATIBLE = 4


DIRTY_TRACKING_BITMAP = 1  # the only type there is


class BitmapEntry(NamedTuple):
    """One bitmap directory entry; ``offset`` is its file offset, ``length`` unpadded bytes."""

    offset: int
    length: int
    table_offset: int
    table_size: int
    flags: int
    type: int
    granularity_bits: int
    extra: bytes
    name_bytes: bytes

    @property
    def name(self) -> str:
        """The name as text; undecodable bytes become lone surrogates."""
        return decoded(self.name_bytes)

    @property
    def granularity(self) -> int:
        """Guest bytes per bit."""
        return 1 << self.granularity_bits

    def is_cut_short(self, cluster_size: int, disk_size: int) -> bool:
        """Whether it was saved, and has bits for less than the disk: what changed past them is not known."""
        covered = (self.table_size * cluster_size * 8) << self.granularity_bits
        return covered < disk_size and not self.flags & BitmapFlag.IN_USE


def parse_bitmap_entry(data: bytes, at: int, file_offset: int) -> BitmapEntry | None:
    """Return the entry at ``data[at:]``, None when it does not fit."""
    if at + BITMAP_ENTRY_LENGTH > len(data):
        return None
    table_offset, table_size, flags, kind, granularity, name_length, extra_length = _BITMAP.unpack_from(data, at)
    length = BITMAP_ENTRY_LENGTH + extra_length + name_length
    if at + length > len(data):
        return None
    extra_at = at + BITMAP_ENTRY_LENGTH
    name_at = extra_at + extra_length
    return BitmapEntry(
        file_offset,
        length,
        table_offset,
        table_size,
        flags,
        kind,
        granularity,
        data[extra_at:name_at],
        data[name_at : name_at + name_length],
    )


def read_bitmap_directory(image: Metadata) -> tuple[tuple[BitmapEntry, ...], tuple[Problem, ...]]:
    """Parse the bitmap directory ("Bitmaps extension"); its faults never block the disk."""
    extension = image.extension(ExtensionType.BITMAPS)
    if extension is None or extension.length != BITMAPS_EXTENSION.size:
        return (), ()
    try:
        return _read_directory(image, extension)
    except Qcow2Error as error:
        return (), (_bitmap_problem(extension.offset, reason(error)),)


def _bitmap_problem(at: int, message: str) -> Problem:
    return Problem("QCOW2-BITMAP-INVALID", message, "bitmap_directory", 0, at, _ONLY_BITMAPS)


def _read_directory(image: Metadata, extension: Extension) -> tuple[tuple[BitmapEntry, ...], tuple[Problem, ...]]:
    facts = parse_bitmaps_extension(extension.data)
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
        entry = parse_bitmap_entry(data, at, facts.directory_offset + at)
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
    if entry.type != DIRTY_TRACKING_BITMAP:
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
