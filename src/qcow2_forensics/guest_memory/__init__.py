"""Guest-physical memory from QEMU's migration streams.

::

    containers   which bytes of a file are the stream (bare, libvirt, Proxmox, compressed)
    grammar      the sections of the stream
    pages        the page records of its RAM section
    index        page records become a compact run index
    devices      the device sections and the registers of each processor
    layout       which RAM block lies at which guest-physical address, and why
    memory       GuestMemory: reading, scanning, the cacheable form

The package needs numpy, so nothing that reads disks imports it.
"""

from __future__ import annotations

from ..limits import DEFAULT_LIMITS, Limits
from ..source import PathOrSource
from .containers import StreamWindow, find_stream
from .memory import GuestMemory
from .model import Block, Chunk, Cpu, Device, Layout, MemoryRun, Region

__all__ = [
    "Block",
    "Chunk",
    "Cpu",
    "Device",
    "GuestMemory",
    "Layout",
    "MemoryRun",
    "Region",
    "StreamWindow",
    "find_stream",
    "open_guest_memory",
]


def open_guest_memory(
    origin: PathOrSource,
    snapshot: str | None = None,
    passphrase: str | bytes | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> GuestMemory:
    """Return the guest memory in a qcow2 snapshot (the latest that holds any when None) or a stream file.

    ``origin`` is a qcow2 image, a bare migration stream, a libvirt save file or a Proxmox state volume.
    """
    raise NotImplementedError
