"""The header: its fields, feature bits and the values they may have ("Header").

Everything on disk is big-endian. Parsing never refuses: which values are acceptable is for
:mod:`.header_rules` to say.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

MAGIC = b"QFI\xfb"

SECTOR = 512  # the unit of compressed sizes, encryption and image sizes


def padded(length: int, unit: int = 8) -> int:
    """Return ``length`` rounded up to a multiple of ``unit``."""
    return -(-length // unit) * unit


class Incompatible(enum.IntFlag):
    """Incompatible feature bits: a reader must know every one that is set."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    EXTERNAL_DATA = 1 << 2
    COMPRESSION_TYPE = 1 << 3
    EXTENDED_L2 = 1 << 4


KNOWN_INCOMPATIBLE = 0x1F
_EXTERNAL_DATA, _EXTENDED_L2 = int(Incompatible.EXTERNAL_DATA), int(Incompatible.EXTENDED_L2)  # asked for all the time


class Compatible(enum.IntFlag):
    """Compatible feature bits: unknown ones are safe to ignore."""

    LAZY_REFCOUNTS = 1 << 0


class Autoclear(enum.IntFlag):
    """Autoclear feature bits: software that does not know one clears it when it writes."""

    BITMAPS = 1 << 0
    RAW_EXTERNAL_DATA = 1 << 1


class Crypt(enum.IntEnum):
    """Values of ``crypt_method``."""

    NONE = 0
    AES = 1
    LUKS = 2


class Compression(enum.IntEnum):
    """Values of ``compression_type``."""

    ZLIB = 0
    ZSTD = 1


class HeaderField(NamedTuple):
    """Where a header field is: byte offset, and the :mod:`struct` format that gives its length."""

    name: str
    offset: int
    format: str

    @property
    def length(self) -> int:
        return struct.calcsize(self.format)


_COMMON = (
    HeaderField("magic", 0, ">4s"),
    HeaderField("version", 4, ">I"),
    HeaderField("backing_file_offset", 8, ">Q"),
    HeaderField("backing_file_size", 16, ">I"),
)
_V2 = (
    *_COMMON,
    HeaderField("cluster_bits", 20, ">I"),
    HeaderField("size", 24, ">Q"),
    HeaderField("crypt_method", 32, ">I"),
    HeaderField("l1_size", 36, ">I"),
    HeaderField("l1_table_offset", 40, ">Q"),
    HeaderField("refcount_table_offset", 48, ">Q"),
    HeaderField("refcount_table_clusters", 56, ">I"),
    HeaderField("nb_snapshots", 60, ">I"),
    HeaderField("snapshots_offset", 64, ">Q"),
)
_V3 = (
    *_V2,
    HeaderField("incompatible_features", 72, ">Q"),
    HeaderField("compatible_features", 80, ">Q"),
    HeaderField("autoclear_features", 88, ">Q"),
    HeaderField("refcount_order", 96, ">I"),
    HeaderField("header_length", 100, ">I"),
)
_COMPRESSION_TYPE = HeaderField("compression_type", 104, ">B")
_QCOW1 = (
    *_COMMON,
    HeaderField("mtime", 20, ">I"),
    HeaderField("size", 24, ">Q"),
    HeaderField("cluster_bits", 32, ">B"),
    HeaderField("l2_bits", 33, ">B"),
    HeaderField("crypt_method", 36, ">I"),
    HeaderField("l1_table_offset", 40, ">Q"),
)

QCOW1_HEADER_LENGTH = 48
V2_HEADER_LENGTH = 72
V3_HEADER_LENGTH = 104
_MOST_BITS = 64  # a header may claim 2^32 - 1; two to that power is a number of half a gigabyte

FEATURE_ROW = 48  # bytes of a row of the feature name table: type, bit, and 46 of name
# What old versions of QEMU left after a version 2 header: refcount_order 4 and header_length 104, as in version 3.
V2_LEFTOVER = (96, bytes.fromhex("0000000400000068"))


class Header(NamedTuple):
    """The fields of a version 1, 2 or 3 header, with the defaults a version implies.

    ``mtime`` and ``l2_bits`` exist in version 1 only; there ``l1_size`` is not stored but follows
    from the size.
    """

    version: int
    backing_file_offset: int = 0
    backing_file_size: int = 0
    cluster_bits: int = 0
    size: int = 0
    crypt_method: int = 0
    l1_size: int = 0
    l1_table_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = V2_HEADER_LENGTH
    compression_type: int = 0
    mtime: int = 0
    l2_bits: int = 0

    @property
    def fields(self) -> tuple[HeaderField, ...]:
        """The fields stored in this header, in file order."""
        if self.version == 1:
            return _QCOW1
        if self.version == 2:
            return _V2
        return (*_V3, _COMPRESSION_TYPE) if self.header_length > _COMPRESSION_TYPE.offset else _V3

    def offset_of(self, name: str) -> int | None:
        """Return the file offset in bytes of a field, None when this version does not store it."""
        return next((field.offset for field in self.fields if field.name == name), None)

    @property
    def cluster_size(self) -> int:
        """Bytes per cluster."""
        return 1 << min(self.cluster_bits, _MOST_BITS)

    @property
    def extended_l2(self) -> bool:
        """Whether L2 entries are 16 bytes, with 32 subclusters per cluster."""
        return bool(self.incompatible_features & _EXTENDED_L2)

    @property
    def external_data(self) -> bool:
        """Whether guest clusters live in an external data file."""
        return bool(self.incompatible_features & _EXTERNAL_DATA)

    @property
    def raw_data_file(self) -> bool:
        """Whether the external data file is declared to be the raw disk."""
        return self.external_data and bool(self.autoclear_features & Autoclear.RAW_EXTERNAL_DATA)

    @property
    def l2_entry_size(self) -> int:
        """Bytes per L2 entry: 8, or 16 when extended."""
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Entries in one L2 table."""
        return 1 << self.l2_bits if self.version == 1 else self.cluster_size // self.l2_entry_size

    @property
    def l2_span(self) -> int:
        """Guest bytes one L2 table maps."""
        return self.cluster_size * self.l2_entries

    @property
    def refcount_bits(self) -> int:
        """Bits per refcount: 1 to 64."""
        return 1 << min(self.refcount_order, _MOST_BITS)


def parse_header(data: bytes) -> Header:
    """Return the header at the start of ``data``; bytes missing at the end count as zeros.

    ``data`` must begin with the magic. An unknown version is parsed like version 3, so that its
    fields can be shown; refusing it is up to the caller.
    """
    data = data[: _COMPRESSION_TYPE.offset + 1].ljust(_COMPRESSION_TYPE.offset + 1, b"\0")
    version = int.from_bytes(data[4:8], "big")
    layout = _QCOW1 if version == 1 else _V2 if version == 2 else _V3
    values = {field.name: struct.unpack_from(field.format, data, field.offset)[0] for field in layout[1:]}
    if version == 1:
        values["header_length"] = QCOW1_HEADER_LENGTH
        values["refcount_order"] = 0
        # Larger numbers are not shifted by; the rules refuse them with a reason.
        if values["cluster_bits"] <= 63 and values["l2_bits"] <= 63:
            span = 1 << (values["cluster_bits"] + values["l2_bits"])
            values["l1_size"] = -(-values["size"] // span)
    elif version != 2 and values["header_length"] > _COMPRESSION_TYPE.offset:
        values["compression_type"] = data[_COMPRESSION_TYPE.offset]
    return Header(**values)


class FeatureName(NamedTuple):
    """One row of the feature name table: ``kind`` 0 incompatible, 1 compatible, 2 autoclear."""

    kind: int
    bit: int
    name: bytes


def parse_feature_names(data: bytes) -> list[FeatureName]:
    """Return the rows of a feature name table; a cut row at the end is left out."""
    return [
        FeatureName(data[at], data[at + 1], data[at + 2 : at + FEATURE_ROW].split(b"\0", 1)[0])
        for at in range(0, len(data) - FEATURE_ROW + 1, FEATURE_ROW)
    ]
