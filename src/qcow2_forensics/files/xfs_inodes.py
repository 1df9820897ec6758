"""Times from the inodes of XFS themselves: before 1970 libfsxfs takes the fraction of a second away, in place of adding it.

A time is 32 bits of seconds with a sign and 32 of nanoseconds, or with ``bigtime`` 64 bits of nanoseconds since 1901.
"""

from __future__ import annotations

from .readers import Reader
from .records import SECOND, Times

_MAGIC = b"IN"
_ACCESSED, _MODIFIED, _CHANGED, _FLAGS, _CREATED = 32, 40, 48, 120, 144  # in an inode
_BIGTIME = 8  # of the flags of a version 3 inode
_FIRST = -(1 << 31) * SECOND  # what bigtime counts from


def stored_times(reader: Reader, inode: int) -> Times:
    """Return the times of an inode; raises ``OSError`` where it is not found."""
    head = reader.read(0, 512)
    block, blocks = int.from_bytes(head[4:8], "big"), int.from_bytes(head[84:88], "big")
    size = int.from_bytes(head[104:106], "big")
    in_block, in_group = head[123], head[123] + head[124]  # bits of an inode number
    group, within = inode >> in_group, inode & (1 << in_group) - 1
    at = (group * blocks + (within >> in_block)) * block + (within & (1 << in_block) - 1) * size
    data = reader.read(at, 176)
    if len(data) < 176 or data[:2] != _MAGIC:
        raise OSError(f"inode {inode} is not where it belongs")
    is_extended = data[4] >= 3
    is_big = is_extended and bool(int.from_bytes(data[_FLAGS : _FLAGS + 8], "big") & _BIGTIME)

    def time(place: int) -> int:
        if is_big:
            return int.from_bytes(data[place : place + 8], "big") + _FIRST
        seconds = int.from_bytes(data[place : place + 4], "big", signed=True)
        return seconds * SECOND + int.from_bytes(data[place + 4 : place + 8], "big")

    return Times(time(_MODIFIED), time(_ACCESSED), time(_CHANGED), time(_CREATED) if is_extended else 0)
