"""Table entries: which bits of an L1, L2, refcount table or bitmap table entry mean what.

Bit numbers are those of the specification. Single entries are decoded here, whole tables in
:mod:`qcow2_forensics.census.columns`; only the read path (``reader.l2_runs``, ``Mapping.plain_run``, ``Disk.read``) has
the masks in its loops, where a call would cost as much as the read.
"""

from __future__ import annotations

import sys
from array import array

from .header import SECTOR

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
SUBCLUSTER_MASK = (1 << SUBCLUSTERS) - 1  # allocated ones, in the low half of the second word
ALL_SUBCLUSTERS_ZERO = SUBCLUSTER_MASK << SUBCLUSTERS  # ones that read as zeros, in the high half

QCOW1_COMPRESSED = 1 << 63


def named_offset(entry: int) -> int:
    """Return the host offset that an L1 entry, a bitmap table entry or an L2 entry that is not compressed names, 0 for none."""
    return entry & OFFSET_MASK


def refcount_block_offset(entry: int) -> int:
    """Return the host offset of the block that a refcount table entry names, 0 for none."""
    return entry & REFTABLE_OFFSET_MASK


def is_compressed(entry: int) -> bool:
    """Whether an L2 entry is a compressed cluster descriptor."""
    return bool(entry & COMPRESSED)


def has_reserved_l1_bits(entry: int) -> bool:
    """Whether an L1 entry has bits set that have no meaning."""
    return bool(entry & L1_RESERVED)


def has_reserved_l2_bits(entry: int) -> bool:
    """Whether an L2 entry that is not compressed has bits set that have no meaning."""
    return bool(entry & L2_RESERVED)


def has_reserved_bitmap_bits(entry: int) -> bool:
    """Whether a bitmap table entry has bits set that have no meaning: without a cluster, bit 0 has one."""
    return bool(entry & BITMAP_TABLE_RESERVED or (entry & OFFSET_MASK and entry & BITMAP_ALL_ONES))


def stored_extent(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Return (host offset, size) in bytes of what an L2 entry maps: a cluster, or a compressed one; offset 0 is none."""
    if entry & COMPRESSED:
        return compressed_descriptor(entry, cluster_bits)
    return entry & OFFSET_MASK, 1 << cluster_bits


def end_of_data(entry: int, cluster_size: int, bitmap: int | None) -> int:
    """Return up to where in its cluster an L2 entry that is not compressed shows stored bytes.

    ``bitmap`` is the second word of an extended entry, None for any other.
    """
    if bitmap is None:
        return 0 if entry & ZERO else cluster_size
    return (bitmap & SUBCLUSTER_MASK).bit_length() * cluster_size // SUBCLUSTERS


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


def parse_entries(data: bytes) -> array[int]:
    """Return big-endian 64-bit table entries in the machine's byte order."""
    table = array("Q")
    table.frombytes(data)
    if sys.byteorder == "little":
        table.byteswap()
    return table
