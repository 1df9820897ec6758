"""The specification in Python: layouts, bit fields and flags; no policy and no I/O.

Everything on disk is big-endian. Section names in docstrings are those of QEMU's
``docs/interop/qcow2.txt``. Parsing here never refuses: rules about which values are acceptable
live in :mod:`qcow2_forensics.image`.
"""

from __future__ import annotations

import enum
import struct
from array import array
from typing import NamedTuple

MAGIC = b"QFI\xfb"

SECTOR = 512  # the unit of compressed sizes, encryption and image sizes

# --- table entries -----------------------------------------------------------------------------

COPIED = 1 << 63  # refcount is exactly one
COMPRESSED = 1 << 62  # the L2 entry is a compressed cluster descriptor
ZERO = 1  # standard L2 entries only: the cluster reads as zeros
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00  # bits 9..55 of L1 entries, L2 entries and bitmap table entries
L1_RESERVED = 0x7F00_0000_0000_01FF
L2_RESERVED = 0x3F00_0000_0000_01FE
REFTABLE_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00  # bit 63 is part of the offset here
REFTABLE_RESERVED = 0x1FF
BITMAP_TABLE_RESERVED = 0xFF00_0000_0000_01FE
BITMAP_ALL_ONES = 1  # bitmap table entry without offset: every bit is set
SUBCLUSTERS = 32  # per cluster with extended L2 entries

QCOW1_COMPRESSED = 1 << 63


def compressed_descriptor(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Return (host offset, size) in bytes of a compressed cluster ("Compressed Clusters Descriptor").

    The size is what the descriptor covers, up to the end of its last sector; the stream may end
    earlier.
    """
    split = 70 - cluster_bits
    offset = entry & ((1 << split) - 1)
    sectors = ((entry & ((1 << 62) - 1)) >> split) + 1
    return offset, sectors * SECTOR - offset % SECTOR


def qcow1_compressed_descriptor(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Return (host offset, size) in bytes of a version 1 compressed cluster."""
    split = 63 - cluster_bits
    return entry & ((1 << split) - 1), (entry >> split) & ((1 << cluster_bits) - 1)


def words(data: bytes) -> array[int]:
    """Return big-endian 64-bit table entries as an array of Python-readable integers."""
    table = array("Q")
    table.frombytes(data)
    if _SWAP:
        table.byteswap()
    return table


_SWAP = struct.pack("=H", 1) != struct.pack(">H", 1)

# --- header ------------------------------------------------------------------------------------


class Incompatible(enum.IntFlag):
    """Incompatible feature bits: a reader must know every one that is set."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    EXTERNAL_DATA = 1 << 2
    COMPRESSION_TYPE = 1 << 3
    EXTENDED_L2 = 1 << 4


KNOWN_INCOMPATIBLE = 0x1F


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
    """Where a header field stands: byte offset, :mod:`struct` format, length in bytes."""

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
_MOST_BITS = 64  # a header may claim 2^32 - 1: as a power of two, half a gigabyte of one number


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
        return bool(self.incompatible_features & Incompatible.EXTENDED_L2)

    @property
    def external_data(self) -> bool:
        """Whether guest clusters live in an external data file."""
        return bool(self.incompatible_features & Incompatible.EXTERNAL_DATA)

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
        # A guard for nonsense bits; image.py refuses them with a reason.
        if values["cluster_bits"] <= 63 and values["l2_bits"] <= 63:
            span = 1 << (values["cluster_bits"] + values["l2_bits"])
            values["l1_size"] = -(-values["size"] // span)
    elif version != 2 and values["header_length"] > _COMPRESSION_TYPE.offset:
        values["compression_type"] = data[_COMPRESSION_TYPE.offset]
    return Header(**values)


# --- header extensions -------------------------------------------------------------------------


class ExtensionType(enum.IntEnum):
    """Known header extension types."""

    END = 0x00000000
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    CRYPTO = 0x0537BE77
    DATA_FILE = 0x44415441


class Extension(NamedTuple):
    """One header extension; ``offset`` is that of its 8-byte head, ``data`` is without padding."""

    type: int
    offset: int
    data: bytes

    @property
    def length(self) -> int:
        return len(self.data)

    @property
    def data_offset(self) -> int:
        return self.offset + 8


class FeatureName(NamedTuple):
    """One row of the feature name table: ``kind`` 0 incompatible, 1 compatible, 2 autoclear."""

    kind: int
    bit: int
    name: bytes


def parse_feature_names(data: bytes) -> list[FeatureName]:
    """Return the rows of a feature name table; a cut row at the end is left out."""
    return [
        FeatureName(data[at], data[at + 1], data[at + 2 : at + 48].split(b"\0", 1)[0])
        for at in range(0, len(data) - 47, 48)
    ]


class BitmapsExtension(NamedTuple):
    """The bitmaps extension (24 bytes): count, reserved word, directory size and offset in bytes."""

    nb_bitmaps: int
    reserved: int
    directory_size: int
    directory_offset: int


BITMAPS_EXTENSION = struct.Struct(">IIQQ")


def parse_bitmaps_extension(data: bytes) -> BitmapsExtension:
    """Return the fields of a bitmaps extension; ``data`` must be 24 bytes."""
    return BitmapsExtension(*BITMAPS_EXTENSION.unpack(data))


CRYPTO_EXTENSION = struct.Struct(">QQ")  # offset and length in bytes of the LUKS header

# --- snapshot table ----------------------------------------------------------------------------

_SNAPSHOT = struct.Struct(">QIHHIIQII")
_SNAPSHOT_EXTRA = struct.Struct(">QQq")  # vm_state_size, disk_size, icount
SNAPSHOT_ENTRY_LENGTH = _SNAPSHOT.size  # 40


class SnapshotEntry(NamedTuple):
    """One entry of the snapshot table ("Snapshots"); ``index`` counts from 0 in table order.

    ``vm_state_size`` is the 64-bit field where the extra data has it, the 32-bit one elsewhere;
    ``disk_size`` and ``icount`` are None when the extra data does not reach them. Dates are
    seconds and nanoseconds of the epoch as the host's clock had them.
    """

    index: int  # type: ignore[assignment]  # stands for a method of tuple that nobody calls on an entry
    offset: int  # file offset of this entry
    length: int  # bytes with extra data, ID and name, unpadded
    l1_table_offset: int
    l1_size: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size32: int
    vm_state_size: int
    disk_size: int | None
    icount: int | None
    extra: bytes
    id_bytes: bytes
    name_bytes: bytes

    @property
    def id(self) -> str:
        """The ID as text; undecodable bytes become lone surrogates."""
        return self.id_bytes.decode("utf-8", "surrogateescape")

    @property
    def name(self) -> str:
        """The name as text; undecodable bytes become lone surrogates."""
        return self.name_bytes.decode("utf-8", "surrogateescape")

    @property
    def extra_length(self) -> int:
        return len(self.extra)


class SnapshotHead(NamedTuple):
    """The fixed 40 bytes of a snapshot table entry."""

    l1_table_offset: int
    l1_size: int
    id_length: int
    name_length: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size32: int
    extra_length: int

    @property
    def total_length(self) -> int:
        """Bytes of the whole entry, unpadded."""
        return SNAPSHOT_ENTRY_LENGTH + self.extra_length + self.id_length + self.name_length


def parse_snapshot_head(data: bytes, at: int = 0) -> SnapshotHead:
    """Return the fixed part of the entry at ``data[at:]``, which must hold at least 40 bytes."""
    return SnapshotHead._make(_SNAPSHOT.unpack_from(data, at))


def build_snapshot_entry(index: int, offset: int, head: SnapshotHead, tail: bytes) -> SnapshotEntry:
    """Return the entry from its fixed part and the bytes that follow it."""
    extra_length = head.extra_length
    name_at = extra_length + head.id_length
    if extra_length >= _SNAPSHOT_EXTRA.size:
        numbers: tuple[int, int | None, int | None] = _SNAPSHOT_EXTRA.unpack_from(tail)
    else:
        vm_state_size = int.from_bytes(tail[:8], "big") if extra_length >= 8 else head.vm_state_size32
        numbers = vm_state_size, int.from_bytes(tail[8:16], "big") if extra_length >= 16 else None, None
    return SnapshotEntry(
        index,
        offset,
        head.total_length,
        head.l1_table_offset,
        head.l1_size,
        head.date_sec,
        head.date_nsec,
        head.vm_clock_nsec,
        head.vm_state_size32,
        *numbers,
        tail[:extra_length],
        tail[extra_length:name_at],
        tail[name_at : name_at + head.name_length],
    )


# --- bitmap directory --------------------------------------------------------------------------

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
        return self.name_bytes.decode("utf-8", "surrogateescape")

    @property
    def granularity(self) -> int:
        """Guest bytes per bit."""
        return 1 << self.granularity_bits

    def is_cut_short(self, cluster_size: int, disk_size: int) -> bool:
        """Whether it was saved, and has bits for less than the disk: what changed behind them is not known."""
        reach = (self.table_size * cluster_size * 8) << self.granularity_bits
        return reach < disk_size and not self.flags & BitmapFlag.IN_USE


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


def padded(length: int, unit: int = 8) -> int:
    """Return ``length`` rounded up to a multiple of ``unit``."""
    return -(-length // unit) * unit
