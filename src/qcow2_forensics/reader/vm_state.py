"""The QEMU migration stream a snapshot holds, as positional bytes.

QEMU stores the VM state past the end of the disk, mapped by the snapshot's own L1 table: it starts at the
first L2 table that maps nothing of the disk, counted from the disk size the snapshot recorded,
not from the current one.

The active L1 table may map one too: after a snapshot was applied and then deleted, or after a savevm
that failed. No snapshot lists that state; it is called ``leftover``.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import FormatError
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from ..format.source import Closing
from ..text import cut
from .disk import Disk
from .mapping import Run
from .states import LEFTOVER

MAGIC = b"QEVM"
STREAM_HEAD = MAGIC + bytes(3)  # and a version below 256


def leftover_size(disk: Disk) -> int:
    """Return how far the active L1 table maps stored clusters past the end of the disk, in bytes; ``disk`` is the active state."""
    header = disk.image.header
    end = start = leftover_start(disk.image)
    for run in disk.mapping.runs(start, max(0, header.l1_size * header.l2_span - start)):
        if run.host_offset is not None:
            end = run.offset + run.length
    return end - start


def leftover_offset(disk: Disk) -> int | None:
    """Return where in the file that begins, None when its first cluster is not stored; ``disk`` is the active state."""
    return next(disk.mapping.runs(leftover_start(disk.image), 1)).host_offset


def has_leftover(disk: Disk) -> bool:
    """Whether what is mapped past the end of the disk begins as a migration stream; also where it is encrypted and locked."""
    # The start first: there may be any number of tables past the end of the disk.
    start = leftover_start(disk.image)
    if not disk.is_locked and (leftover_offset(disk) is None or disk.read_mapped(start, len(MAGIC)) != MAGIC):
        return False
    return leftover_size(disk) > 0


def leftover_start(image: Image) -> int:
    """Return the guest offset in bytes where a VM state of the active state starts."""
    return vm_state_offset(image.header.size, image.header.l2_span)


def vm_state_offset(disk_size: int, l2_span: int) -> int:
    """Return the guest offset in bytes where the VM state of a snapshot starts."""
    return -(-disk_size // l2_span) * l2_span


class VmState(Closing):
    """The VM state of one snapshot as a source; ``disk`` must be opened at that snapshot.

    With ``leftover`` it is what the active state maps past the end of the disk, and ``snapshot`` is None.
    """

    snapshot: SnapshotEntry | None

    def __init__(self, disk: Disk, *, leftover: bool = False) -> None:
        self._disk = disk
        self.rebuilt = disk.rebuilt  # the recovered state that it is
        self.stored_size = disk.stored_size
        if leftover:
            self.snapshot = None
            self.name = f"{disk.name}[{self.label}]"
            self.size = leftover_size(disk)
            self.offset = leftover_start(disk.image)
            return
        if disk.snapshot is None or not disk.snapshot.vm_state_size:
            raise FormatError(f"{cut(disk.name)}: this state holds no VM state", field="vm_state_size")
        self.snapshot = disk.snapshot
        self.name = f"{disk.name}[{self.snapshot.id}]"
        self.size = self.snapshot.vm_state_size
        recorded = self.snapshot.disk_size
        self.offset = vm_state_offset(
            disk.image.header.size if recorded is None else recorded, disk.image.header.l2_span
        )
        if self.offset + self.size > 2**63:
            raise FormatError(
                f"the VM state of snapshot {cut(self.snapshot.id)} is {self.size} bytes",
                offset=self.snapshot.offset,
                field="vm_state_size",
            )

    @property
    def label(self) -> str:
        """How to choose this state where no snapshot lists it: ``leftover`` or ``recovered:N``; empty for a snapshot's."""
        return "" if self.snapshot is not None else LEFTOVER if self.rebuilt is None else self.rebuilt.label

    @property
    def unlisted(self) -> str:
        """The label with what it means, empty for a snapshot's."""
        why = (
            "past the end of the disk, listed by no snapshot"
            if self.rebuilt is None
            else "a VM state that nothing maps any more"
        )
        return self.label and f"{self.label} ({why})"

    def read(self, offset: int, length: int, /) -> bytes:
        """Return ``length`` bytes of the stream at ``offset``, fewer only at its end."""
        if offset < 0 or length < 0:
            raise ValueError(f"negative offset or length: {offset}, {length}")
        return self._disk.read_mapped(self.offset + offset, min(length, self.size - offset))

    def runs(self, offset: int = 0, length: int | None = None) -> Iterator[Run]:
        """Yield runs that tile the range, clipped to the stream; offsets count from its start."""
        length = self.size - offset if length is None else min(length, self.size - offset)
        if length > 0:
            for run in self._disk.mapping.runs(self.offset + offset, length):
                yield run._replace(offset=run.offset - self.offset)

    def close(self) -> None:
        self._disk.close()
