"""What the ACPI tables say about memory: the ranges of the SRAT, and the PCI windows of the DSDT.

QEMU keeps its own copy of the tables it made in a RAM block, where the guest does not write.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Final, NamedTuple

from ..limits import ACPI_BYTES, PCI_WINDOWS, SRAT_CANDIDATES, SRAT_RANGES, GiB
from .model import Block

_TABLES: Final = "/rom@etc/acpi/tables"
_QWORD_MEMORY = re.compile(rb"\x8a\x2b\x00\x00", re.DOTALL)  # QWord address space descriptor, 43 bytes, of memory


class Affinity(NamedTuple):
    """One memory range of the SRAT."""

    node: int
    base: int
    length: int
    hotplug: bool
    fixed: bool
    """Non-volatile: exactly one module, at exactly this address."""


def read_tables(blocks: Sequence[Block], read_block: Callable[[str, int, int], bytes]) -> bytes:
    """Return the block in which QEMU keeps the tables, b"" when there is none."""
    block = next((block for block in blocks if block.name == _TABLES), None)
    return read_block(_TABLES, 0, min(block.size, ACPI_BYTES)) if block is not None else b""


def pci_windows(data: bytes) -> tuple[tuple[int, int], ...]:
    """Return ``(address, length)`` of the windows above 4 GiB in which PCI devices are put, lowest first.

    They are QWord address space descriptors (ACPI specification, 6.4.3.5.1) whose minimum, maximum and length agree.
    """
    found = set()
    for match in islice(_QWORD_MEMORY.finditer(data), PCI_WINDOWS):
        _, low, high, offset, length = struct.unpack_from(
            "<5Q", data.ljust(match.start() + 46, b"\0"), match.start() + 6
        )
        if low >= 4 * GiB and length and high == low + length - 1 and not offset:
            found.add((low, length))
    return tuple(sorted(found))


def memory_affinities(data: bytes) -> tuple[Affinity, ...]:
    """Return the enabled memory ranges in the order of the table, () when there is no sound one."""
    for found in islice(re.finditer(b"SRAT", data), SRAT_CANDIDATES):
        ranges = tuple(islice(_ranges(data, found.start()), SRAT_RANGES + 1))
        if 0 < len(ranges) <= SRAT_RANGES:
            return ranges
    return ()


def _ranges(data: bytes, start: int) -> Iterator[Affinity]:
    """Yield the ranges of one table. Its checksum is not set before the guest sees it, but its entries must tile it."""
    length = int.from_bytes(data[start + 4 : start + 8], "little")
    end = start + length
    if not 48 <= length <= len(data) - start or not _tiles(data, start + 48, end):
        return
    at = start + 48
    while at < end:
        kind, size = data[at], data[at + 1]
        if kind == 1 and size == 40:
            flags = int.from_bytes(data[at + 28 : at + 32], "little")
            base = int.from_bytes(data[at + 8 : at + 16], "little")
            amount = int.from_bytes(data[at + 16 : at + 24], "little")
            if flags & 1 and amount:
                node = int.from_bytes(data[at + 2 : at + 6], "little")
                yield Affinity(node, base, amount, bool(flags & 2), bool(flags & 4))
        at += size


def _tiles(data: bytes, at: int, end: int) -> bool:
    while at + 2 <= end and data[at + 1] >= 2:
        at += data[at + 1]
    return at == end
