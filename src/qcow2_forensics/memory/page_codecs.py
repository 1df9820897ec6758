"""Pages that a stream does not hold as they are: compressed, or as differences to what it held before.

::

    compressed   u32 length, then that many bytes of zlib
    XBZRLE       u8 1, u16 length, then runs: how many bytes stay, how many are new, the new ones

Both are settings of a migration (QEMU before 9 compresses). A run index holds the place of such a page as a
number below those of fill bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Final

from ..errors import ReadError
from ..format.source import Source

MISSING: Final = -1 - 256  # a value no run has: the stream has no record of these pages
PACKED: Final = -(1 << 62)  # plus a stream offset below 2^60: a compressed page there
DELTA: Final = -(1 << 61)  # the same: the last of the differences that make a page
_OFFSETS: Final = 1 << 60

Deltas = Mapping[int, tuple[int, ...]]
"""For a page that ends in differences: the value it began as, and the stream offsets of all its differences."""


def is_special(value: int) -> bool:
    """Return whether a value is of a page that has to be decoded."""
    return value < MISSING


def offset_of(value: int) -> int:
    """Return where the stream holds a page that has to be decoded."""
    return value - (PACKED if value < PACKED + _OFFSETS else DELTA)


def decode(source: Source, value: int, history: tuple[int, ...], page_size: int) -> bytes:
    """Return a page; ``history`` is its entry in :data:`Deltas`, if it is made of differences.

    Raises :class:`ReadError` for what cannot be decoded.
    """
    if value < PACKED + _OFFSETS:
        return _unpacked(source, offset_of(value), page_size)
    base, *offsets = history
    page = bytearray(page_of(source, base, (), page_size))
    for offset in offsets:
        _apply(source, offset, page)
    return bytes(page)


def page_of(source: Source, value: int, history: tuple[int, ...], page_size: int) -> bytes:
    """Return the page that a value of a run index stands for: stored, one byte repeated, or to be decoded."""
    if value < 0:
        special = is_special(value)
        return decode(source, value, history, page_size) if special else bytes([-1 - value]) * page_size
    return stored(source, value, page_size)


def stored(source: Source, offset: int, length: int) -> bytes:
    """Return exactly ``length`` bytes of a stream; raises :class:`ReadError` where it ends before."""
    data = source.read(offset, length)
    if len(data) < length:
        raise ReadError("the migration stream ends early", offset=offset, length=length)
    return data


def _unpacked(source: Source, offset: int, page_size: int) -> bytes:
    length = int.from_bytes(source.read(offset, 4), "big")
    decoder = zlib.decompressobj()
    try:
        page = decoder.decompress(source.read(offset + 4, min(length, 2 * page_size)), page_size + 1)
    except zlib.error as error:
        raise ReadError(f"compressed page: {error}", offset=offset, length=length) from error
    if len(page) != page_size:
        raise ReadError(f"compressed page of {len(page)} bytes", offset=offset, length=length)
    return page


def _apply(source: Source, offset: int, page: bytearray) -> None:
    length = int.from_bytes(source.read(offset + 1, 2), "big")
    data = source.read(offset + 3, length)
    at = place = 0
    while at < len(data):
        same, at = _count(data, at)
        fresh, at = _count(data, at)
        place += same
        if len(data) < length or not fresh or at + fresh > len(data) or place + fresh > len(page):
            raise ReadError("differences that do not fit their page", offset=offset, length=length)
        page[place : place + fresh] = data[at : at + fresh]
        place, at = place + fresh, at + fresh


def _count(data: bytes, at: int) -> tuple[int, int]:
    """Read a little-endian base-128 number of at most two bytes; return it and what follows it."""
    low = data[at] if at < len(data) else 0
    if low < 0x80:
        return low, at + 1
    high = data[at + 1] if at + 1 < len(data) else 0
    return low & 0x7F | high << 7, at + 2
