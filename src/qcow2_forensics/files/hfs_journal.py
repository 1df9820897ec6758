"""The journal of an HFS+ file system: whether it is empty, and so all changes are at their places.

The volume header names a block that says where the journal is, and the journal begins with a header of its own, in the
byte order of the machine that wrote it. It holds changes from ``start`` to ``end``, and none where they are equal.
"""

from __future__ import annotations

import struct

from .readers import Reader, whole

_IS_JOURNALED = 1 << 13  # attribute of a volume
_IN_VOLUME, _IS_NEW = 1, 4  # flags of a journal
_MAGIC, _ORDER = 0x4A4E4C78, 0x12345678
_HEADER = 44  # bytes under the checksum


def has_changes(reader: Reader, start: int) -> bool:
    """Return whether the journal of the file system at ``start`` holds changes that may not be at their places.

    Raises ``OSError`` where that cannot be determined, and ``Qcow2Error``.
    """
    header = whole(reader, start + 1024, 44)
    if header[:2] not in (b"H+", b"HX"):
        raise OSError("its volume header is not where it belongs")
    attributes, place, block = (int.from_bytes(header[at : at + 4], "big") for at in (4, 12, 40))
    if not attributes & _IS_JOURNALED:
        return False
    information = whole(reader, start + place * block, 52)
    flags, offset = struct.unpack_from(">I32xQ", information)
    if flags & _IS_NEW:
        return False
    if not flags & _IN_VOLUME:
        raise OSError("it is on another device")
    data = whole(reader, start + offset, _HEADER)
    order = "<" if int.from_bytes(data[:4], "little") == _MAGIC else ">"
    magic, sign, first, end, _, _, checksum, _ = struct.unpack(f"{order}2I3Q3I", data)
    if (magic, sign) != (_MAGIC, _ORDER) or checksum != _checksum(data):
        raise OSError("it has no valid header")
    return bool(first != end)


def _checksum(header: bytes) -> int:
    value = 0
    for byte in header[:36] + bytes(4) + header[40:]:
        value = (value << 8 ^ value + byte) & 0xFFFF_FFFF
    return value ^ 0xFFFF_FFFF
