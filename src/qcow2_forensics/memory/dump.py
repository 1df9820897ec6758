"""Guest memory as files other tools read: raw, and LiME.

A raw file is RAM at its guest-physical addresses, with zeros where there is none. A LiME file is the
valid ranges one after the other, each with a 32-byte header: magic, version 1, first and last
address.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator

from ..errors import LimitExceeded, Unsupported
from ..format.source import Source
from ..limits import PADDED_DUMP_BYTES, PADDED_DUMP_TIMES, MiB
from ..reader.writer import Writer
from ..text import quoted
from . import address_ranges
from .guest_memory import GuestMemory

_LIME_HEADER = struct.Struct("<IIQQ8x")
_LIME_MAGIC = 0x4C694D45
_PIECE = 4 * MiB


def pieces(memory: GuestMemory) -> Iterator[tuple[int, int, bool]]:
    """Tile ``[0, memory.size)`` with ``(address, length, whether it is anything but zeros)``."""
    position = 0
    for address, length in address_ranges.subtract(
        memory.valid_ranges(), memory.zero_ranges(minimum=memory.page_size), 0
    ):
        if address > position:
            yield position, address - position, False
        yield address, length, True
        position = address + length
    if position < memory.size:
        yield position, memory.size - position, False


def write_raw(memory: GuestMemory, writer: Writer) -> None:
    """Write the padded image of guest-physical memory.

    Raises :class:`LimitExceeded` where that is mostly addresses without memory.
    """
    need_regions(memory)
    most = PADDED_DUMP_BYTES + PADDED_DUMP_TIMES * sum(length for _, length in memory.valid_ranges())
    if memory.size > most:
        raise LimitExceeded("raw_memory_bytes", memory.size, most)
    for address, length, filled in pieces(memory):
        _range(memory, writer, address, length, filled)


def write_lime(memory: GuestMemory, writer: Writer) -> None:
    """Write every valid range as a LiME segment."""
    need_regions(memory)
    write_ranges(
        memory, list(memory.valid_ranges()), writer, lambda low, end: _LIME_HEADER.pack(_LIME_MAGIC, 1, low, end - 1)
    )


def write_ranges(
    memory: GuestMemory,
    ranges: Iterable[tuple[int, int]],
    writer: Writer,
    header: Callable[[int, int], bytes] = lambda _low, _end: b"",
) -> None:
    """Write sorted ranges ``(address, length)`` one after another, each behind what ``header(start, end)`` makes."""
    tiles = pieces(memory)
    address, amount, filled = 0, 0, False
    for first, length in ranges:
        start, end = first, first + length
        if before := header(start, end):
            writer.data(before)
        while start < end:
            while address + amount <= start:
                address, amount, filled = next(tiles)
            stop = min(end, address + amount)
            _range(memory, writer, start, stop - start, filled)
            start = stop


def write_stream(source: Source, writer: Writer) -> None:
    """Write the migration stream as it is."""
    for offset in range(0, source.size, _PIECE):
        writer.data(source.read(offset, min(_PIECE, source.size - offset)))


def need_regions(memory: GuestMemory) -> None:
    """Raise :class:`Unsupported` where no RAM is at a known address."""
    if not memory.regions:
        raise Unsupported(f"the memory layout of machine type {quoted(memory.machine)}")


def _range(memory: GuestMemory, writer: Writer, address: int, length: int, filled: bool) -> None:
    if not filled:
        writer.zeros(length)
        return
    for place in range(address, address + length, _PIECE):
        writer.data(memory.read(place, min(_PIECE, address + length - place)))
