"""Table entries: which bits of an L1, L2, refcount table or bitmap table entry mean what.

Bit numbers are those of the specification; nobody else masks or shifts an entry.
"""

from __future__ import annotations

import struct
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
SUBCLUSTER_MASK = (
    1 << SUBCLUSTERS
) - 1  # allocated ones, in the low half of the second word; zero ones in the high half

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


def parse_entries(data: bytes) -> array[int]:
    """Return big-endian 64-bit table entries as an array of Python-readable integers."""
    table = array("Q")
    table.frombytes(data)
    if _SWAP:
        table.byteswap()
    return table


_SWAP = struct.pack("=H", 1) != struct.pack(">H", 1)
