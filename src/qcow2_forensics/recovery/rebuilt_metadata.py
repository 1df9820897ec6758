"""Headers and tables that are written anew for a recovered state; they exist in memory only."""

from __future__ import annotations

import struct

import numpy as np

from ..census.arrays import I64, U64
from ..errors import LimitExceeded
from ..format.entries import COPIED
from ..format.header import MAGIC, Compression, Incompatible
from ..limits import L1_ENTRIES
from ..residue.structure_detection import Geometry
from .patched_source import Patch
from .placement import Placement

REBUILT_AT = 1 << 55  # host offset of a rebuilt L1 table: past every file, inside what an offset field can hold
_TABLES_AT = REBUILT_AT + (1 << 40)  # rebuilt L2 tables, after every L1 table
_LENGTH = 112
_SIZE_AT = 24  # of the disk, in a header
_L1_SIZE_AT = 36  # and the table's offset after it: 32 and 64 bits
_ALL_SUBCLUSTERS = 0xFFFF_FFFF


def new_header(
    *,
    cluster_bits: int,
    size: int,
    l1_size: int,
    extended_l2: bool = False,
    compression_type: int | None = None,
) -> bytes:
    """Return a version 3 header with the end of its extensions, for an image whose own header is lost.

    Its L1 table is at :data:`REBUILT_AT`; it has no snapshots and names no other file.
    """
    features = Incompatible.EXTENDED_L2 if extended_l2 else Incompatible(0)
    if compression_type not in (None, Compression.ZLIB):
        features |= Incompatible.COMPRESSION_TYPE
    fields = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        MAGIC,
        3,
        0,
        0,
        cluster_bits,
        size,
        0,
        l1_size,
        REBUILT_AT,
        1 << cluster_bits,  # a refcount table has to be somewhere; nothing reads it
        1,
        0,
        0,
        features,
        0,
        0,
        4,
        _LENGTH,
    )
    return fields + bytes([compression_type or 0]) + bytes(7) + bytes(8)


def with_l1(size: int, l1_table: bytes) -> tuple[Patch, ...]:
    """Return a rebuilt L1 table, and the fields of a header that is there which name it and the size of the disk."""
    named = struct.pack(">IQ", len(l1_table) // 8, REBUILT_AT)
    return (_SIZE_AT, size.to_bytes(8, "big")), (_L1_SIZE_AT, named), (REBUILT_AT, l1_table)


def _l1_of(placements: tuple[Placement, ...]) -> U64:
    """Return the L1 table that puts L2 tables where they were placed."""
    table = np.zeros(max((placed.slot for placed in placements), default=-1) + 1, np.uint64)
    for placed in placements:
        table[placed.slot] = np.uint64(placed.offset | COPIED)
    return table


def stored_l1(placements: tuple[Placement, ...], entries: int = 0) -> bytes:
    """Return the bytes of an L1 table of ``entries`` at least that puts L2 tables where they were placed.

    Raises :class:`LimitExceeded` for more entries than QEMU accepts: a disk size may come from the evidence.
    """
    if entries > L1_ENTRIES:
        raise LimitExceeded("entries of a rebuilt L1 table", entries, L1_ENTRIES)
    return _l1_of(placements).astype(">u8").tobytes().ljust(8 * entries, b"\0")


def l2_place(number: int, geometry: Geometry) -> int:
    """Return the host offset of a rebuilt L2 table, by its number among those of a state."""
    return _TABLES_AT + number * geometry.cluster_size


def stored_l2(number: int, hosts: U64, places: I64, geometry: Geometry) -> Patch:
    """Return a rebuilt L2 table that maps host clusters at some places in it, as many as there are places."""
    words = np.zeros(geometry.cluster_size // 8, np.uint64)
    at = places * geometry.entry_words
    words[at] = hosts[: len(at)] | np.uint64(COPIED)
    if geometry.extended_l2:
        words[at + 1] = _ALL_SUBCLUSTERS
    return l2_place(number, geometry), words.astype(">u8").tobytes()
