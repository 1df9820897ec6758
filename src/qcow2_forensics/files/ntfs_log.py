"""The log of an NTFS file system: whether a restart page marks it as clean, and so all changes are at their places.

``$LogFile`` begins with two restart pages, which are written in turn; the newer one counts::

    page 0     RSTR   number of the last change, clients in use, flags (2: clean)
    page 1     RSTR   the same, of another time
    further    RCRD   records of changes

A log that was emptied holds bytes of 0xFF only: so mkntfs and ntfs-3g leave it.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

_EMPTY = b"\xff"
_CHUNK = 1 << 20  # of an emptied log read at a time
_LARGEST = 256 << 20  # of an emptied log that is looked through; Windows makes none above 64 MiB by itself
_SECTOR = 512  # which ends with the number of its update
_PAGES = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_VERSIONS = ((1, 1), (2, 0))  # of Windows to 7, and since 8
_NO_CLIENT, _IS_CLEAN = 0xFFFF, 2
_AREA = 48  # bytes of a restart area before its clients
_CLIENT = 160  # bytes of a client


class _Area(NamedTuple):
    """A restart area, without what is last in it."""

    number: int
    clients: int
    free: int  # the first client of each list
    in_use: int
    flags: int
    sequence_bits: int
    length: int
    client_array: int  # where it begins, after the area
    file_size: int
    last_length: int
    record_header: int
    page_data: int


class _Restart(NamedTuple):
    number: int  # of the last change
    is_clean: bool
    page: int  # bytes


def has_changes(log: Any) -> bool:
    """Return whether a log, a ``File`` of pytsk3, holds changes that may not be at their places, as ntfs-3g decides it.

    Raises ``OSError`` where that cannot be determined, because it is not as a log is written.
    """
    size = int(log.info.meta.size)
    if _read(log, 0, 4) == _EMPTY * 4:
        if size > _LARGEST or not all(_is_empty(log, at, min(_CHUNK, size - at)) for at in range(0, size, _CHUNK)):
            raise OSError("it begins as an emptied log does, and does not go on as one")
        return False
    first = _restart(log, 0)
    second = _restart(log, first.page)
    newest = max(first.number, second.number)
    return not all(page.is_clean for page in (first, second) if page.number == newest)


def _is_empty(log: Any, at: int, length: int) -> bool:
    data = _read(log, at, length)
    return data.count(_EMPTY) == length


def _restart(log: Any, at: int) -> _Restart:
    head = _read(log, at, _SECTOR)
    magic, updates, count, chkdsk, page, log_page, area, minor, major = struct.unpack_from("<4sHHQIIHHH", head)
    where = f"its restart page at {at:#x}"
    if magic not in (b"RSTR", b"CHKD"):
        raise OSError(f"{where} has no signature")
    if (major, minor) not in _VERSIONS or (magic == b"RSTR" and chkdsk):
        raise OSError(f"{where} is of version {major}.{minor}, or not as that is written")
    sized = page in _PAGES and log_page in _PAGES and count == page // _SECTOR + 1
    if not sized or not 30 <= updates <= _SECTOR - 2 * count or at not in (0, page):
        raise OSError(f"{where} has no valid size")
    update = head[updates : updates + 2]
    data = bytearray(_read(log, at, page))
    if any(data[end - 2 : end] != update for end in range(_SECTOR, page + 1, _SECTOR)):
        raise OSError(f"{where} was written in part only")
    for number in range(1, count):
        data[number * _SECTOR - 2 : number * _SECTOR] = head[updates + 2 * number : updates + 2 * number + 2]
    if area % 8 or not updates + 2 * count <= area <= _SECTOR - 2 - _AREA:
        raise OSError(f"{where} has no restart area")
    found = _Area(*struct.unpack_from("<QHHHHIHHQIHH", data, area))
    if not _is_valid(found, data, area):
        raise OSError(f"{where} has no valid restart area")
    is_clean = found.in_use == _NO_CLIENT or bool(found.flags & _IS_CLEAN)
    return _Restart(chkdsk if magic == b"CHKD" else found.number, is_clean, page)


def _is_valid(area: _Area, page: bytearray, at: int) -> bool:
    """Whether a restart area is one, and its clients are in one of two lists each."""
    room = len(page) - at
    described = area.client_array + area.clients * _CLIENT
    if area.client_array % 8 or not _AREA <= area.client_array <= _SECTOR - 2 - at:
        return False
    if not described <= area.length <= room or area.record_header % 8 or area.page_data % 8:
        return False
    if not 0 < area.file_size < 1 << 63 or area.sequence_bits != 67 - area.file_size.bit_length():
        return False
    left = area.clients
    for first in (area.free, area.in_use):
        index, before = first, _NO_CLIENT
        while index != _NO_CLIENT:
            if not left or index >= area.clients:
                return False
            left -= 1
            previous, following = struct.unpack_from("<HH", page, at + area.client_array + index * _CLIENT + 16)
            if before == _NO_CLIENT and previous != _NO_CLIENT:
                return False
            index, before = following, index
    return True


def _read(log: Any, at: int, length: int) -> bytes:
    data = bytes(log.read_random(at, length))
    if len(data) < length:
        raise OSError("it ends within what describes it")
    return data
