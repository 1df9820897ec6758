"""Which header values are acceptable, as one list of rules.

The reader refuses to read over a problem that blocks it; the auditor reports every one. Limits
and alignments are the ones QEMU enforces when it opens an image; where a broken field does not
matter for reading the guest's disk (refcounts, snapshots, bitmaps) only that part is blocked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..errors import FormatError, LimitExceeded, Qcow2Error, Unsupported
from ..limits import Limits
from ..text import cut, plural
from .codecs import known_codecs
from .header import (
    KNOWN_INCOMPATIBLE,
    SECTOR,
    V3_HEADER_LENGTH,
    Autoclear,
    Compression,
    Crypt,
    FeatureName,
    Header,
    Incompatible,
)

INT64_MAX = 2**63 - 1
INT32_MAX = 2**31 - 1
MAX_DISK_BYTES = 2**63 - 2**30  # the largest size QEMU's block layer accepts

DISK = "disk"
SNAPSHOTS = "snapshots"
BITMAPS = "bitmaps"
REFCOUNTS = "refcounts"
EXTENSIONS = "extensions"  # those that could not be read
BACKING = "backing"  # the name of the backing file

BACKING_NAME = "backing file name"  # the field of a problem that QEMU does not see: it reads zeros there


def snapshot_part(index: int) -> str:
    """Return the name of the part that is one snapshot, by its index in the table."""
    return f"snapshot:{index}"


class Problem(NamedTuple):
    """One way the metadata contradicts the specification.

    ``code`` is the finding it belongs to; ``blocks`` names what cannot be read soundly because of
    it: ``"disk"``, ``"snapshots"``, ``"snapshot:<index>"``, ``"bitmaps"``, ``"refcounts"``,
    ``"extensions"``, ``"backing"`` (its name) or nothing. ``limit`` is set where a number is above a
    limit, ``unsupported`` where the value is not wrong but unknown here.
    """

    code: str
    message: str
    field: str = ""
    value: int | str = 0
    offset: int | None = None
    blocks: frozenset[str] = frozenset()
    limit: int | None = None
    unsupported: bool = False

    @property
    def stops_qemu(self) -> bool:
        """Whether QEMU does not open the image because of it; it also checks the length of an end mark."""
        refused = DISK in self.blocks and not self.unsupported and self.field not in ("header extensions", BACKING_NAME)
        return refused or (self.code == "QCOW2-EXTENSION-INVALID" and self.value == 0)

    def error(self) -> Qcow2Error:
        """Return the exception a strict reader raises for this problem."""
        if self.unsupported:
            return Unsupported(self.message)
        if self.limit is not None and isinstance(self.value, int):
            return LimitExceeded(self.field, self.value, self.limit, offset=self.offset)
        return FormatError(self.message, offset=self.offset, field=self.field)


def header_problems(header: Header, limits: Limits, names: list[FeatureName]) -> Iterator[Problem]:
    """Yield every rule the header breaks, in field order."""
    rules = _Rules(header)
    if header.version == 1:
        yield from _qcow1(rules, limits)
    elif header.version in (2, 3):
        yield from _qcow2(rules, limits, names)
    else:
        yield rules.bad("version", f"version {header.version} is unknown", DISK, unsupported=True)


class _Rules:
    def __init__(self, header: Header) -> None:
        self.header = header

    def bad(
        self,
        field: str,
        message: str,
        *blocks: str,
        limit: int | None = None,
        unsupported: bool = False,
        code: str = "QCOW2-HEADER-INVALID",
    ) -> Problem:
        value = getattr(self.header, field)
        return Problem(code, message, field, value, self.header.offset_of(field), frozenset(blocks), limit, unsupported)


def _qcow1(rules: _Rules, limits: Limits) -> Iterator[Problem]:
    header = rules.header
    if header.size < 2:
        yield rules.bad("size", "the disk size is below 2 bytes", DISK)
    elif header.size > MAX_DISK_BYTES:
        yield rules.bad("size", f"the disk size {header.size} is above what QEMU accepts", DISK, limit=MAX_DISK_BYTES)
    if not 9 <= header.cluster_bits <= 16:
        yield rules.bad("cluster_bits", f"cluster_bits {header.cluster_bits} is outside 9..16", DISK)
    if not 6 <= header.l2_bits <= 13:
        yield rules.bad("l2_bits", f"l2_bits {header.l2_bits} is outside 6..13", DISK)
    if header.crypt_method not in (Crypt.NONE, Crypt.AES):
        yield rules.bad("crypt_method", f"encryption method {header.crypt_method} is unknown", DISK, unsupported=True)
    if header.l1_size > INT32_MAX // 8:
        yield rules.bad("l1_size", "the L1 table is too large", DISK, limit=INT32_MAX // 8)
    if header.backing_file_offset and header.backing_file_size > limits.name_bytes:
        yield rules.bad(
            "backing_file_size", "the backing file name is too long", DISK, BACKING, limit=limits.name_bytes
        )


def _qcow2(rules: _Rules, limits: Limits, names: list[FeatureName]) -> Iterator[Problem]:
    header = rules.header
    if not 9 <= header.cluster_bits <= 21:
        yield rules.bad("cluster_bits", f"cluster_bits {header.cluster_bits} is outside 9..21", DISK)
        return  # every further rule counts in clusters
    if header.version == 3:
        yield from _version3(rules, names)
    yield from _backing_name(rules, limits)
    yield from _size_and_l1(rules, limits)
    if header.crypt_method not in tuple(Crypt):
        yield rules.bad("crypt_method", f"encryption method {header.crypt_method} is unknown", DISK, unsupported=True)
    yield from _refcounts(rules, limits)
    yield from _snapshots(rules, limits)


def _version3(rules: _Rules, names: list[FeatureName]) -> Iterator[Problem]:
    header = rules.header
    unknown = header.incompatible_features & ~KNOWN_INCOMPATIBLE
    if unknown:
        known = {row.bit: cut(row.name) for row in names if row.kind == 0}
        bits = [bit for bit in range(64) if unknown >> bit & 1]
        listed = ", ".join(f"{bit} ({known[bit]})" if bit in known else str(bit) for bit in bits)
        yield rules.bad(
            "incompatible_features",
            f"incompatible feature bit {listed}",
            DISK,
            unsupported=True,
            code="QCOW2-UNKNOWN-INCOMPATIBLE",
        )
    if header.extended_l2 and header.cluster_bits < 14:
        yield rules.bad("cluster_bits", "extended L2 entries need clusters of at least 16 KiB", DISK)
    if header.autoclear_features & Autoclear.RAW_EXTERNAL_DATA and not header.external_data:
        yield rules.bad("autoclear_features", "the raw external data bit is set without an external data file", DISK)
    if header.refcount_order > 6:
        yield rules.bad("refcount_order", "refcounts are wider than 64 bits", REFCOUNTS, limit=6)
    if header.header_length < V3_HEADER_LENGTH:
        yield rules.bad(
            "header_length", f"the header length {header.header_length} is below 104", DISK, EXTENSIONS, BITMAPS
        )
    elif header.header_length > header.cluster_size:
        parts = (DISK, EXTENSIONS, BITMAPS)
        yield rules.bad("header_length", "the header is longer than a cluster", *parts, limit=header.cluster_size)
    elif header.header_length % 8:
        yield rules.bad("header_length", f"the header length {header.header_length} is not a multiple of 8")
    flagged = bool(header.incompatible_features & Incompatible.COMPRESSION_TYPE)
    if header.compression_type not in {codec.number for codec in known_codecs()}:
        yield rules.bad(
            "compression_type", f"compression type {header.compression_type} is unknown", DISK, unsupported=True
        )
    elif flagged != (header.compression_type != Compression.ZLIB):
        yield rules.bad("compression_type", "the compression type contradicts its incompatible feature bit", DISK)


def _backing_name(rules: _Rules, limits: Limits) -> Iterator[Problem]:
    header = rules.header
    if header.backing_file_offset == 0:
        return
    if header.backing_file_offset > header.cluster_size:
        yield rules.bad("backing_file_offset", "the backing file name lies outside the first cluster", DISK, BACKING)
        return
    room = min(limits.name_bytes, header.cluster_size - header.backing_file_offset)
    if header.backing_file_size > room:
        yield rules.bad("backing_file_size", "the backing file name is too long", DISK, BACKING, limit=room)


def _size_and_l1(rules: _Rules, limits: Limits) -> Iterator[Problem]:
    header = rules.header
    if header.size > MAX_DISK_BYTES:
        yield rules.bad("size", f"the disk size {header.size} is above what QEMU accepts", DISK, limit=MAX_DISK_BYTES)
    elif header.size % SECTOR:
        yield rules.bad("size", f"the disk size {header.size} is not a multiple of 512")
    table_bytes = header.l1_size * 8
    if table_bytes > limits.l1_bytes:
        yield rules.bad("l1_size", "the L1 table is too large", DISK, limit=limits.l1_bytes // 8)
    needed = -(-header.size // header.l2_span)
    if needed > header.l1_size:
        yield rules.bad(
            "l1_size",
            f"the L1 table has {plural(header.l1_size, 'entry', 'entries')}, the disk size needs {needed}",
            DISK,
        )
    if header.l1_table_offset % header.cluster_size or header.l1_table_offset + table_bytes > INT64_MAX:
        yield rules.bad("l1_table_offset", "the L1 table is not aligned to a cluster", DISK)


def _refcounts(rules: _Rules, limits: Limits) -> Iterator[Problem]:
    header = rules.header
    if header.refcount_table_offset % header.cluster_size:
        yield rules.bad("refcount_table_offset", "the refcount table is not aligned to a cluster", REFCOUNTS)
    if header.refcount_table_clusters == 0:
        yield rules.bad("refcount_table_clusters", "there is no refcount table", REFCOUNTS)
    elif header.refcount_table_clusters * header.cluster_size > limits.refcount_table_bytes:
        most = limits.refcount_table_bytes // header.cluster_size
        yield rules.bad("refcount_table_clusters", "the refcount table is too large", REFCOUNTS, limit=most)


def _snapshots(rules: _Rules, limits: Limits) -> Iterator[Problem]:
    header = rules.header
    if header.snapshots_offset % header.cluster_size:
        yield rules.bad("snapshots_offset", "the snapshot table is not aligned to a cluster", SNAPSHOTS)
    if header.nb_snapshots > limits.snapshots:
        yield rules.bad(
            "nb_snapshots",
            "there are too many snapshots",
            SNAPSHOTS,
            limit=limits.snapshots,
            code="QCOW2-SNAPSHOT-TABLE-INVALID",
        )
