"""The start of each snapshot's VM state: whether it is there, and which machine it is of."""

from __future__ import annotations

from ..errors import Qcow2Error, reason
from ..format.header_rules import INT64_MAX
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from ..limits import FINDINGS_PER_RULE, Budget, MiB
from ..reader.disk import Disk
from ..reader.mapping import Kind, Run
from ..reader.vm_state import MAGIC, vm_state_offset
from .facts import Facts

_CONFIGURATION = 7  # section type: the machine's name follows
_HEAD = 512  # bytes
_DECODING = MiB  # bytes that decoding a crafted stream costs at least


def machine_type(data: bytes) -> str:
    """Return the machine name in the first section of a VM state stream, empty without one."""
    if data[:4] != MAGIC or len(data) < 13 or data[8] != _CONFIGURATION:
        return ""
    length = int.from_bytes(data[9:13], "big")
    return data[13 : 13 + length].decode("utf-8", "replace") if length <= 256 else ""


class _Starts:
    """Reads the first bytes of VM states.

    QEMU stores none of them compressed. Crafted snapshots can name one stream, or many that overlap: each is decoded
    once, and all together have a budget.
    """

    def __init__(self, image: Image) -> None:
        self._decoded: dict[tuple[int | None, int], tuple[bytes, str]] = {}
        self._budget = Budget("bytes of compressed VM states", image.file_size, image.limits)

    def read(self, disk: Disk, run: Run) -> tuple[bytes, str]:
        """Return the bytes at the start of ``run``, or why there are none."""
        if run.kind != Kind.COMPRESSED:
            return disk.read_mapped(run.offset, _HEAD), ""
        key = run.host_offset, run.size
        if key not in self._decoded:
            self._budget.spend(_DECODING + run.size + disk.image.cluster_size)
            try:
                self._decoded[key] = disk.read_mapped(run.offset, _HEAD), ""
            except Qcow2Error as error:
                self._decoded[key] = b"", reason(error)
        return self._decoded[key]


class VmStateHead:
    """The start of one snapshot's VM state, or why it cannot be read."""

    def __init__(self, facts: Facts, entry: SnapshotEntry, starts: _Starts) -> None:
        self.entry = entry
        self.head = b""
        self.host: int | None = None
        self.why = ""
        size = facts.header.size if entry.disk_size is None else entry.disk_size
        self.offset = vm_state_offset(size, facts.header.l2_span)
        if self.offset + entry.vm_state_size > INT64_MAX:
            self.why = "the VM state lies beyond any disk"
            return
        try:
            disk = Disk(facts.image, snapshot=entry)
            run = next(disk.mapping.runs(self.offset, 1))
            self.host = run.host_offset
            if run.kind == Kind.HOLE:
                self.why = "nothing is mapped where the VM state should start"
            elif not facts.header.crypt_method:
                head, self.why = starts.read(disk, run)
                self.head = head[: entry.vm_state_size]
        except (Qcow2Error, OSError) as error:
            self.why = reason(error)


def vm_state_heads(facts: Facts) -> list[VmStateHead]:
    """Return the start of the VM state of every snapshot that has one; for :meth:`Facts.once`."""
    held = [entry for entry in facts.image.snapshots if entry.vm_state_size]
    facts.leave_out("VM states that were not looked at", len(held) - FINDINGS_PER_RULE)
    starts = _Starts(facts.image)
    return [VmStateHead(facts, entry, starts) for entry in held[:FINDINGS_PER_RULE]]
