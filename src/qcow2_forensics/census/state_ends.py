"""How much of what an L2 table maps its states show: the disk up to its end, the VM state up to its size.

The VM state begins where the L2 table past the end of the disk does, so what is shown of a table is its beginning::

    table    [ disk .......... | past the end ]   [ VM state ... | past vm_state_size ]
    shown    <---------------->                   <------------->
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..format.header import SECTOR
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from .arrays import I64, U64
from .checked_metadata import SnapshotL1

_MOST = 1 << 62  # bytes; larger sizes are no sizes

ACTIVE, SNAPSHOTS, VM_STATES = range(3)  # columns of what is shown


class StateEnds:
    """Where the disk and the VM state of each state end; trees are -1 for the active state, else a snapshot's index."""

    def __init__(self, image: Image, snapshots: Sequence[SnapshotEntry | SnapshotL1]) -> None:
        self.span = image.header.l2_span
        active = image.disk_size
        sizes = (active if entry.disk_size is None else entry.disk_size // SECTOR * SECTOR for entry in snapshots)
        disks, memories = [active, *sizes], [0, *(entry.vm_state_size for entry in snapshots)]
        self._disks = np.minimum(np.asarray(disks, np.uint64), np.uint64(_MOST)).astype(np.int64)
        self._vm_starts = -(-self._disks // self.span) * self.span
        self._vm_ends = self._vm_starts + np.minimum(np.asarray(memories, np.uint64), np.uint64(_MOST >> 1)).astype(
            np.int64
        )

    def entries(self) -> I64:
        """Return how many L1 entries each state needs for its disk and its VM state, the active one first."""
        return -(-self._disks // self.span) + -(-(self._vm_ends - self._vm_starts) // self.span)

    def shown(self, index: U64, tree: I64) -> U64:
        """Return how many bytes of the tables in some L1 slots are shown, as ``(slots, 3)``: see the columns above."""
        starts = index.astype(np.int64) * self.span
        state = tree + 1
        disk = np.clip(self._disks[state] - starts, 0, self.span)
        memory = np.clip(self._vm_ends[state] - starts, 0, self.span)
        memory[starts < self._vm_starts[state]] = 0
        active = tree < 0
        shown: U64 = np.column_stack((np.where(active, disk, 0), np.where(active, 0, disk), memory)).astype(np.uint64)
        return shown
