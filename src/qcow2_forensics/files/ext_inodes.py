"""Times from the inodes of ext2, ext3 and ext4 themselves: The Sleuth Kit leaves out the bits that extend their seconds.

An inode has 32 bits of seconds for each time, with a sign. Where inodes are larger than 128 bytes, two bits of what follows count
further rounds of 2^32 seconds, and thirty the nanoseconds::

    stored   0xFFFFFF00, no more bits     1969
             0x00000010, one round        2106
"""

from __future__ import annotations

import struct
from typing import Any

from .records import SECOND, Times

_WINDOW = 64 << 10  # bytes of an inode table read at once
_64BIT, _META_GROUPS = 0x80, 0x10  # incompatible features
_PLAIN = 128  # bytes of an inode without what extends it
_ROUND_BITS = 3


class ExtInodes:
    """The inode tables of a file system that begins at ``start`` of an image, an ``Img_Info`` of pytsk3."""

    def __init__(self, image: Any, start: int) -> None:
        self._image = image
        self._start = start
        head = self._read(1024, 1024)
        self._block = 1024 << min(int.from_bytes(head[0x18:0x1C], "little"), 16)
        self._first_block, self._per_group = _number(head, 0x14), _number(head, 0x28)
        self._size = int.from_bytes(head[0x58:0x5A], "little") if _number(head, 0x4C) else _PLAIN
        features = _number(head, 0x60)
        self._descriptor = int.from_bytes(head[0xFE:0x100], "little") if features & _64BIT else 32
        if features & _META_GROUPS:
            raise OSError("its group descriptors are in groups of their own")
        if not self._per_group or not _PLAIN <= self._size <= self._block or not 32 <= self._descriptor <= 1024:
            raise OSError("its superblock does not say where inodes are")
        self._tables: dict[int, int] = {}  # group -> offset of its inode table
        self._window = b""
        self._window_at = 0

    def times(self, inode: int) -> Times | None:
        """Return the times of an inode, None for a number that is none; raises ``OSError``."""
        if inode < 1:
            return None
        group, index = divmod(inode - 1, self._per_group)
        if group not in self._tables:
            self._tables[group] = self._table(group)
        data = self._inode(self._tables[group] + index * self._size)
        accessed, changed, modified = struct.unpack_from("<3i", data, 8)
        extra = min(int.from_bytes(data[0x80:0x82], "little"), len(data) - _PLAIN) if len(data) > _PLAIN else 0
        end = _PLAIN + extra

        def whole(seconds: int, at: int) -> int:
            more = _number(data, at) if at + 4 <= end else 0
            return (seconds + ((more & _ROUND_BITS) << 32)) * SECOND + (more >> 2)

        created = whole(struct.unpack_from("<i", data, 0x90)[0], 0x94) if end >= 0x94 else 0
        return Times(whole(modified, 0x88), whole(accessed, 0x8C), whole(changed, 0x84), created)

    def _table(self, group: int) -> int:
        at = (self._first_block + 1) * self._block + group * self._descriptor
        descriptor = self._read(at, self._descriptor)
        high = _number(descriptor, 0x28) if self._descriptor >= 64 else 0
        return (_number(descriptor, 8) | high << 32) * self._block

    def _inode(self, at: int) -> bytes:
        inside = at - self._window_at
        if not 0 <= inside <= len(self._window) - self._size:
            self._window_at = at & -_WINDOW
            self._window = self._read(self._window_at, 2 * _WINDOW, short=True)
            inside = at - self._window_at
        data = self._window[inside : inside + self._size]
        if len(data) < self._size:
            raise OSError("the disk ends within an inode table")
        return data

    def _read(self, offset: int, length: int, *, short: bool = False) -> bytes:
        data = bytes(
            self._image.read(self._start + offset, min(length, max(0, self._image.get_size() - self._start - offset)))
        )
        if len(data) < length and not short:
            raise OSError("the disk ends within its metadata")
        return data


def _number(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")
