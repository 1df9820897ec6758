"""Whether what the active state maps past the end of the disk is one saved machine state and nothing else.

Applying a snapshot makes its L1 table the active one, with the VM state it maps past the end of the disk. The first
bytes prove nothing: the stream has to be sound up to the devices, and to use what is mapped.
"""

from __future__ import annotations

from ..errors import Qcow2Error
from ..limits import SAMPLES
from ..reader.disk import Disk
from ..reader.mapping import Kind
from ..reader.vm_state import MAGIC, vm_state_offset
from .facts import Facts


class _Stream:
    """Bytes past the end of the disk of the active state as a source."""

    def __init__(self, disk: Disk, offset: int, size: int) -> None:
        self._disk = disk
        self._offset = offset
        self.size = size

    def read(self, offset: int, length: int, /) -> bytes:
        length = min(length, self.size - offset)
        return self._disk.read_mapped(self._offset + offset, length) if length > 0 else b""


def applied_vm_state(facts: Facts, clusters: int) -> bool:
    """Whether the ``clusters`` that are mapped past the end of the disk hold one sound VM state."""
    header = facts.header
    if header.crypt_method or header.external_data:
        return False
    sizes = {header.size, *(entry.disk_size for entry in facts.image.snapshots if entry.disk_size is not None)}
    offsets = sorted({vm_state_offset(size, header.l2_span) for size in sizes})
    try:
        disk = Disk(facts.image)
        for offset in offsets[:SAMPLES]:
            if offset >= header.size and disk.read_mapped(offset, len(MAGIC)) == MAGIC:
                return _is_sound(facts, disk, offset, clusters * header.cluster_size)
    except (Qcow2Error, OSError):
        return False
    return False


def _is_sound(facts: Facts, disk: Disk, offset: int, size: int) -> bool:
    """Whether a stream begins at a guest offset, uses a whole number of clusters, and leaves only devices over."""
    from ..memory.sections import read_stream

    if any(run.kind in (Kind.HOLE, Kind.ZERO) for run in disk.mapping.runs(offset, size)):
        return False  # something is mapped elsewhere too
    stream = read_stream(_Stream(disk, offset, size), facts.limits)
    return stream.complete and size - stream.devices_offset <= facts.limits.device_state_bytes
