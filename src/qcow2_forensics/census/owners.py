"""What a census is made of: owners of host clusters, ranges, and batches of L2 tables."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]


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


@dataclass(frozen=True)
class Tables:
    """A batch of L2 tables: row ``i`` is the table at ``offsets[i]``.

    ``entries`` has one row per table; ``bitmaps`` is the second word of extended entries, else
    None. ``tree`` is who is told as the owner: -1 the active state, else a snapshot's index; ``index``
    the slot of its L1 table that names the table, the lowest of several. ``shared`` says that slots of
    other numbers do too, ``active`` how many of the active L1 do, ``snapshots`` how many of snapshots'.
    """

    offsets: U64
    index: U64
    shared: Mask
    active: U64
    snapshots: U64
    tree: I64
    entries: U64
    bitmaps: U64 | None
    cluster_bits: int
    entry_size: int

    def __len__(self) -> int:
        return len(self.offsets)

    def without(self, rows: list[int]) -> Tables:
        """Return the batch without some of its tables."""
        kept = np.ones(len(self), dtype=np.bool_)
        kept[rows] = False
        return Tables(
            self.offsets[kept],
            self.index[kept],
            self.shared[kept],
            self.active[kept],
            self.snapshots[kept],
            self.tree[kept],
            self.entries[kept],
            None if self.bitmaps is None else self.bitmaps[kept],
            self.cluster_bits,
            self.entry_size,
        )

    def entry_offset(self, row: int, column: int) -> int:
        """Return the file offset of an entry."""
        return int(self.offsets[row]) + column * self.entry_size

    def guest_offset(self, row: int, column: int) -> int:
        """Return the guest offset an entry maps."""
        return (int(self.index[row]) * int(self.entries.shape[1]) + column) << self.cluster_bits

    def guest_clusters(self, places: Places) -> U64:
        """Return the guest cluster numbers of flat places in ``entries``."""
        width = self.entries.shape[1]
        guests: U64 = self.index[places // width] * np.uint64(width) + (places % width).astype(np.uint64)
        return guests

    def where(self, mask: Mask) -> Iterator[tuple[int, int]]:
        """Yield (row, column) of the set places of a mask shaped like ``entries``."""
        rows, columns = np.nonzero(mask)
        yield from zip(rows.tolist(), columns.tolist(), strict=True)
