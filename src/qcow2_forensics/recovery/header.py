"""Headers that are written anew for a recovered state; they exist in memory only."""

from __future__ import annotations

import struct

from ..format.header import MAGIC, Compression, Incompatible
from .patched_source import REBUILT_AT

_LENGTH = 112
_L1_SIZE_AT = 36  # and the table's offset after it: 32 and 64 bits


def new_header(
    *,
    cluster_bits: int,
    size: int,
    l1_size: int,
    extended_l2: bool = False,
    compression_type: int | None = None,
) -> bytes:
    """Return a version 3 header with the end of its extensions, for an image whose own header is lost.

    Its L1 table is at :data:`.patched_source.REBUILT_AT`; it has no snapshots and names no other file.
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


def l1_fields(l1_size: int) -> tuple[int, bytes]:
    """Return where in a header the L1 table is named, and the fields that name a rebuilt one."""
    return _L1_SIZE_AT, struct.pack(">IQ", l1_size, REBUILT_AT)
