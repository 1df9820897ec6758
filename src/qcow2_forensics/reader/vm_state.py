"""The QEMU migration stream a snapshot holds, as positional bytes.

QEMU stores the VM state behind the disk, mapped by the snapshot's own L1 table: it starts at the
first L2 table that maps nothing of the disk, counted from the disk size the snapshot recorded,
not from the current one.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

from ..errors import FormatError
from ..format.snapshot_table import SnapshotEntry
from ..text import printable
from .disk import Disk
from .mapping import Run


def vm_state_offset(disk_size: int, l2_span: int) -> int:
    """Return the guest offset in bytes where the VM state of a snapshot starts."""
    return -(-disk_size // l2_span) * l2_span


class VmState:
    """The VM state of one snapshot as a source; ``disk`` must be opened at that snapshot."""

    def __init__(self, disk: Disk) -> None:
        if disk.snapshot is None or not disk.snapshot.vm_state_size:
            raise FormatError(f"{printable(disk.name)}: this state holds no VM state", field="vm_state_size")
        self.snapshot: SnapshotEntry = disk.snapshot
        self.name = f"{disk.name}[{self.snapshot.id}]"
        self.size = self.snapshot.vm_state_size
        recorded = self.snapshot.disk_size
        self.offset = vm_state_offset(
            disk.image.header.size if recorded is None else recorded, disk.image.header.l2_span
        )
        self.stored_size = disk.stored_size
        self._disk = disk
        if self.offset + self.size > 2**63:
            raise FormatError(
                f"the VM state of snapshot {printable(self.snapshot.id)} is {self.size} bytes",
                offset=self.snapshot.offset,
                field="vm_state_size",
            )

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

    def __enter__(self) -> VmState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
