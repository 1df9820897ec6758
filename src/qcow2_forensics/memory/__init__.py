"""Guest-physical memory from QEMU's migration streams.

::

    containers    which bytes of a file are the stream (bare, libvirt, Proxmox, compressed)
    sections      the sections of the stream
    pages         the page records of its RAM section
    page_index    page records become a compact run index
    devices       the device sections and the registers of each processor
    layout        which RAM block lies at which guest-physical address, why, and what the page tables say about it
    guest_memory  GuestMemory: reading, scanning; index_cache: its cacheable form
    shared_scan   a scan of several memories in which equal pieces are scanned once
    kernel        which kernel a memory holds;  kernel_place: where it lies

The package needs numpy, so nothing that reads disks imports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from ..errors import NotQcow2, SnapshotNotFound
from ..format.source import PathOrSource, Source, as_source, close_source, source_name
from ..limits import DEFAULT_LIMITS, Limits
from ..reader.opening import Passphrase, leftover_vm_state, open_disk, open_vm_state
from ..reader.states import Leftover, SnapshotName
from ..text import cut
from .containers import StreamWindow, find_stream
from .guest_memory import GuestMemory
from .kernel import Kernel, find_kernel, uses_five_levels
from .kernel_place import SYMBOLS as KERNEL_SYMBOLS
from .kernel_place import LinuxPlace, place_linux
from .model import Block, Chunk, Cpu, Device, Layout, MemoryRun, NotInMemory, Region
from .sections import MAGIC
from .shared_scan import Finder, Match, pattern_finder, scan_memories

__all__ = [
    "KERNEL_SYMBOLS",
    "Block",
    "Chunk",
    "Cpu",
    "Device",
    "Finder",
    "GuestMemory",
    "Kernel",
    "Layout",
    "LinuxPlace",
    "Match",
    "MemoryRun",
    "NotInMemory",
    "Region",
    "StreamWindow",
    "find_kernel",
    "find_stream",
    "open_guest_memory",
    "pattern_finder",
    "place_linux",
    "scan_memories",
    "uses_five_levels",
]


def open_guest_memory(
    origin: PathOrSource,
    snapshot: SnapshotName = None,
    passphrase: Passphrase = None,
    limits: Limits = DEFAULT_LIMITS,
    *,
    allow_truncated: bool = False,
    layout: str | None = None,
    assume: Mapping[str, str] | None = None,
) -> GuestMemory:
    """Open the guest memory in a qcow2 snapshot (the latest that holds any when None) or in a stream file.

    ``snapshot`` may be "leftover": the VM state that the active state still maps past the end of the disk. It is also
    what None means where no snapshot holds memory.

    ``origin`` is a qcow2 image, a bare migration stream, a libvirt save file or a Proxmox state volume,
    which may itself be a qcow2 disk. ``layout`` states where RAM blocks lie, as :class:`GuestMemory` has it; ``assume``
    is what a damaged header should say, as in :func:`open_disk`.
    Close the result, or use it as a context manager.

    Raises what :func:`open_vm_state` and :class:`GuestMemory` raise.
    """
    with ExitStack() as undo:
        source = as_source(origin)
        if source is not origin:
            undo.callback(close_source, source)
        stream = find_stream(source, limits=limits)
        if stream is None:
            stream = _inside_qcow2(source, snapshot, passphrase, limits, assume)
        elif snapshot is not None:
            raise SnapshotNotFound(str(snapshot), ())
        if stream is not source:
            undo.callback(close_source, stream)
        memory = GuestMemory(stream, limits, allow_truncated=allow_truncated, layout=layout)
        memory.on_close(undo.pop_all().close)
        return memory


def _inside_qcow2(
    source: Source,
    snapshot: SnapshotName,
    passphrase: Passphrase,
    limits: Limits,
    assume: Mapping[str, str] | None,
) -> Source:
    """Return the stream of a snapshot, or the disk itself when that is what holds a stream."""
    try:
        return open_vm_state(source, snapshot, passphrase, limits, assume=assume)
    except NotQcow2 as error:
        name = cut(source_name(source))
        raise NotQcow2(f"{name} is neither a QCOW2 image nor a QEMU memory stream") from error
    except SnapshotNotFound:
        if snapshot is not None:
            raise
        with ExitStack() as undo:
            disk = undo.enter_context(open_disk(source, None, passphrase, limits=limits, follow=False, assume=assume))
            if not disk.is_locked and disk.read(0, len(MAGIC)) == MAGIC:
                undo.pop_all()
                return disk
            if not leftover_vm_state(disk.image):
                raise
        return open_vm_state(source, Leftover(), passphrase, limits, assume=assume)
