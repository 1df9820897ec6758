"""What guest memory is made of, as plain immutable records.

Everything here is made once per stream, or once per run of pages, and holds ordinary Python
integers: nothing of numpy leaves the index.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import Qcow2Error, ReadError

# Registers of a processor that are shown to people; the others are in JSON.
REGISTERS_SHOWN = ("rip", "rsp", "cr0", "cr3", "cr4", "efer", "lstar", "gs_base", "kernel_gs_base")
_NESTED_GUEST = 1 << 21  # of QEMU's hflags


class NotInMemory(ReadError):
    """An address that is not RAM, or RAM that the stream does not hold; ``offset`` is the address."""

    def __init__(self, message: str, *, address: int, length: int) -> None:
        Qcow2Error.__init__(self, f"{message} (guest-physical address {address:#x}, {length} bytes)")
        self.offset = address
        self.length = length


class Region(NamedTuple):
    """A range of guest-physical addresses and the part of a RAM block that answers for it."""

    address: int
    length: int
    block: str
    block_offset: int

    @property
    def end(self) -> int:
        """The first address after the region."""
        return self.address + self.length


class MemoryRun(NamedTuple):
    """A piece of guest memory: bytes at a stream offset, or ``length`` times one fill byte.

    At most one of ``offset`` (a position in the stream that :class:`GuestMemory` was made from) and
    ``fill`` (0..255) is not None; both are None for a page that the stream holds compressed or as differences.
    """

    address: int
    length: int
    offset: int | None
    fill: int | None


class Chunk(NamedTuple):
    """A contiguous, completely readable range to hand to a scanner.

    A signature that starts within the first ``own`` bytes is this chunk's; the bytes after them are
    overlap, and signatures that start there are the next chunk's as well.
    """

    address: int
    length: int
    own: int


@dataclass(frozen=True, slots=True)
class Block:
    """One RAM block of the stream, as the machine named it, in the order of the stream."""

    name: str
    size: int
    address: int | None = None
    """Where the block lies inside its container, which only x-ignore-shared streams state."""
    pages_offset: int | None = None
    """Where a mapped-ram stream keeps the block's pages."""
    recorded: int = 0
    """Bytes the stream holds; the rest was never sent and reads as an error."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the RAM blocks lie in guest-physical space and how that was decided."""

    method: str
    """What decided the split at 4 GiB: "cmos", "srat", "machine" (the table of machine types) or "none"."""
    order: str
    """"single", "srat", "offsets", or "names": what decided the order of the blocks."""
    below_4g: int
    """Bytes of RAM below 4 GiB, without hot-plugged modules."""
    above_4g: int
    """Bytes of RAM above 4 GiB, without hot-plugged modules."""
    notes: tuple[str, ...] = ()
    """One sentence per decision, in the order they were made."""
    assumptions: tuple[str, ...] = ()
    """What the stream does not show, with the addresses in doubt; empty is best."""
    unplaced: tuple[str, ...] = ()
    """Blocks that lie at no known address: firmware, video memory, device ROMs."""
    reasons: tuple[str, ...] = ()
    """Why each region lies where it does, parallel to the regions."""
    checks: tuple[str, ...] = ()
    """What the guest's page tables say about the layout, or why they say nothing."""
    doubts: tuple[tuple[int, int], ...] = ()
    """``(address, length)`` of the ranges that may hold something else: an assumption that nothing confirms, or a contradiction."""


@dataclass(frozen=True, slots=True)
class Device:
    """One device section of the stream; ``offset`` and ``length`` are its body in the stream."""

    name: str
    instance: int
    version: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Cpu:
    """The registers of one virtual processor, by their usual lower-case names (``cr3``, ``rip``)."""

    index: int
    architecture: str
    registers: Mapping[str, int] = field(default_factory=dict)

    @property
    def runs_nested_guest(self) -> bool:
        """Whether a guest of this guest was running: the registers are then those of the inner one (x86)."""
        return self.architecture == "x86" and bool(self.registers.get("hflags", 0) & _NESTED_GUEST)
