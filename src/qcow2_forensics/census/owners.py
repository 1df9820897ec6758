"""Who can claim a host cluster, and ranges of clusters."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Owner(enum.IntFlag):
    """Who claims a host cluster; several bits when several do. 0 is nobody."""

    HEADER = 1 << 0
    REFCOUNT_TABLE = 1 << 1
    REFCOUNT_BLOCK = 1 << 2
    L1 = 1 << 3  # of the active state
    L2 = 1 << 4  # reached from the active state
    SNAPSHOT_TABLE = 1 << 5
    SNAPSHOT_L1 = 1 << 6
    SNAPSHOT_L2 = 1 << 7  # reached from a snapshot
    BITMAP_DIRECTORY = 1 << 8
    BITMAP_TABLE = 1 << 9
    BITMAP_DATA = 1 << 10
    CRYPTO = 1 << 11  # the LUKS header
    DATA = 1 << 12  # guest data of the active state, under a zero flag too
    SNAPSHOT_DATA = 1 << 13  # guest data of a snapshot
    COMPRESSED = 1 << 14  # holds (part of) a compressed cluster of any state


GUEST_DATA = Owner.DATA | Owner.SNAPSHOT_DATA | Owner.COMPRESSED
METADATA = Owner(0x7FFF & ~GUEST_DATA)


class Range(NamedTuple):
    """``length`` host bytes at ``offset``, whole clusters."""

    offset: int
    length: int
