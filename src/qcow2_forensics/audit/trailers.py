"""Formats that are recognised by the end of a file: ZIP archives, fixed VHD disks and DMG images.

Readers of these formats look backwards for the record, over bytes that follow it::

    qcow2 header ... tables ... clusters | archive members | directory | end record | slack
                                                                       ^ found here
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..format.image import Image
from ..limits import KiB

_SEARCHED = 256 * KiB  # bytes at the end: a ZIP comment may be 64 KiB long, and tools search some more
_ZIP, _VHD, _DMG = b"PK\5\6", b"conectix", b"koly"
_ZIP_RECORD, _ZIP64_SIZE = 22, 0xFFFF_FFFF
_CENTRAL = b"PK\1\2"
_VHD_FOOTER = 512  # bytes; old writers cut the last one off
_DMG_TRAILER = 512


class Trailer(NamedTuple):
    """A record that ends a file of another format; ``slack`` counts the bytes after it, in whole sectors for disks."""

    what: str
    offset: int
    length: int
    slack: int


def trailers(image: Image) -> Iterator[Trailer]:
    """Yield the last sound record of each format near the end of the file."""
    start = max(0, image.file_size - _SEARCHED)
    data = image.read(start, image.file_size - start)
    for magic, find in ((_ZIP, _zip), (_VHD, _vhd), (_DMG, _dmg)):
        if not all(byte in data for byte in magic):  # rarely so, but then a search from the end takes ten times as long
            continue
        found = find(data)
        if found is not None:
            yield found._replace(offset=start + found.offset)


def _from_the_end(data: bytes, magic: bytes) -> Iterator[int]:
    """Yield where a magic is, from the end of the data on."""
    at = data.rfind(magic)
    while at >= 0:
        yield at
        at = data.rfind(magic, 0, at)


def _zip(data: bytes) -> Trailer | None:
    """Return the ZIP end record that a reader takes: the last one whose directory is where it says."""
    for at in _from_the_end(data, _ZIP):
        record = data[at : at + _ZIP_RECORD]
        if len(record) == _ZIP_RECORD:
            size = int.from_bytes(record[12:16], "little")
            length = min(_ZIP_RECORD + int.from_bytes(record[20:22], "little"), len(data) - at)
            if _has_directory(data, at, size):
                return Trailer("ZIP end record", at, length, len(data) - at - length)
    return None


def _has_directory(data: bytes, at: int, size: int) -> bool:
    if size == _ZIP64_SIZE:
        return data.rfind(b"PK\6\7", 0, at) >= 0
    if size > at:  # farther back than was read: only an end record at the very end is believed
        return len(data) - at <= _ZIP_RECORD + 0xFFFF
    return data[at - size : at - size + 4] == _CENTRAL if size else len(data) - at == _ZIP_RECORD


def _vhd(data: bytes) -> Trailer | None:
    """Return a VHD footer whose checksum is right; readers take the last whole sector of the file."""
    for at in _from_the_end(data, _VHD):
        footer = data[at : at + _VHD_FOOTER].ljust(_VHD_FOOTER, b"\0")
        total = ~(sum(footer) - sum(footer[64:68])) & 0xFFFF_FFFF
        if int.from_bytes(footer[64:68], "big") == total:
            length = min(_VHD_FOOTER, len(data) - at)
            return Trailer("VHD footer", at, length, len(data) - at - length)
    return None


def _dmg(data: bytes) -> Trailer | None:
    """Return a DMG trailer: version 4, and its own length."""
    for at in _from_the_end(data, _DMG):
        trailer = data[at : at + 12]
        if trailer[4:] == (4).to_bytes(4, "big") + _DMG_TRAILER.to_bytes(4, "big"):
            length = min(_DMG_TRAILER, len(data) - at)
            return Trailer("DMG trailer", at, length, len(data) - at - length)
    return None
