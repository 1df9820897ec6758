"""What is read from the records of an NTFS file system itself: where they are, and the times in them.

Records hold names and times, and the content of small files. The Sleuth Kit shows no times before 1970 and after 2105.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from ..text import decoded
from .records import NTFS_FILE_NAME, Span, Times

_STANDARD_INFORMATION, _ATTRIBUTE_LIST = 16, 32
_LONGEST_LIST = 1 << 20  # bytes of an $ATTRIBUTE_LIST that are looked at
_SIZE_IN_BOOT_SECTOR = 0x40  # of a record: clusters, or the exponent of a power of two, negative
_REFERENCE = 0xFFFF_FFFF_FFFF  # the number of a record, below its sequence number
_FILE_NAME_BYTES = 66  # of a $FILE_NAME attribute before the name itself
_SHORT_NAME = 2  # name space of a $FILE_NAME attribute that holds the short form of another
_FILETIME_EPOCH = 116_444_736_000_000_000  # 1970 in units of 100 ns since 1601


class RecordPlaces:
    """The places of records, by the runs of the MFT and the size of a record in bytes."""

    def __init__(self, runs: Sequence[Span], size: int) -> None:
        self._runs = runs
        self._starts = [0, *accumulate(length for _, length in runs)]
        self._size = size

    def of_file(self, entry: Any, inode: int, attributes: Iterable[Any]) -> Iterator[Span]:
        """Yield where the records of a file are, a ``File`` of pytsk3: it may have more than one."""
        numbers = {inode}
        for item in attributes:
            if int(item.info.type) == _ATTRIBUTE_LIST:
                length = min(int(item.info.size), _LONGEST_LIST)
                numbers |= set(_listed(entry.read_random(0, length, _ATTRIBUTE_LIST, int(item.info.id))))
        for number in sorted(numbers):
            yield from self.of(number)

    def of(self, number: int) -> Iterator[Span]:
        """Yield where a record is, in pieces where the MFT is fragmented within it; nothing past its end."""
        at, end = number * self._size, min((number + 1) * self._size, self._starts[-1])
        while at < end:
            index = bisect_right(self._starts, at) - 1
            length = min(end, self._starts[index + 1]) - at
            yield Span(self._runs[index].offset + at - self._starts[index], length)
            at += length


def record_size(boot_sector: bytes, cluster: int) -> int:
    """Return the size of a record in bytes."""
    stored = int.from_bytes(boot_sector[_SIZE_IN_BOOT_SECTOR : _SIZE_IN_BOOT_SECTOR + 1], "little", signed=True)
    return 1 << min(-stored, 20) if stored < 0 else stored * cluster


def _listed(attribute_list: bytes) -> Iterator[int]:
    """Yield the numbers of the records that an ``$ATTRIBUTE_LIST`` names."""
    at = 0
    while at + 26 <= len(attribute_list):
        yield int.from_bytes(attribute_list[at + 16 : at + 24], "little") & _REFERENCE
        at += max(26, int.from_bytes(attribute_list[at + 4 : at + 6], "little"))


def standard_times(entry: Any, attributes: Iterable[Any]) -> Times | None:
    """Return the times of a file, a ``File`` of pytsk3; None where it has none. Raises ``OSError``."""
    for attribute in attributes:
        if int(attribute.info.type) == _STANDARD_INFORMATION and int(attribute.info.size) >= 32:
            return _four(entry.read_random(0, 32, _STANDARD_INFORMATION, int(attribute.info.id)))
    return None


def name_times(entry: Any, name: Any, attributes: Iterable[Any]) -> Iterator[tuple[Any, Times]]:
    """Yield the $FILE_NAME attribute of this very name and its times, which tools seldom can set.

    A record has one for each of its names, and another one for the short form of a name.
    """
    held: list[tuple[bool, Any, Times]] = []
    stored = decoded(name.name or b"").encode("utf-16-le", "surrogatepass")
    for attribute in attributes:
        if int(attribute.info.type) != NTFS_FILE_NAME or int(attribute.info.size) < _FILE_NAME_BYTES:
            continue
        try:
            size = min(int(attribute.info.size), _FILE_NAME_BYTES + 2 * 255)
            data = entry.read_random(0, size, NTFS_FILE_NAME, int(attribute.info.id))
        except (OSError, RuntimeError):
            continue
        if len(data) < _FILE_NAME_BYTES or data[65] == _SHORT_NAME:
            continue
        parent = int.from_bytes(data[:6], "little")
        own = parent == int(name.par_addr) and data[66 : 66 + 2 * data[64]] == stored
        held.append((own, attribute, _four(data[8:40])))
    own_only = [item for item in held if item[0]]
    for _, attribute, times in own_only[:1] or held:
        yield attribute, times


def _four(data: bytes) -> Times:
    """Return the four times that follow each other in a record."""
    if len(data) < 32:
        raise OSError("a record ends within its times")
    created, modified, changed, accessed = (_filetime(value) for value in struct.unpack("<4Q", data))
    return Times(modified, accessed, changed, created)


def _filetime(value: int) -> int:
    return (value - _FILETIME_EPOCH) * 100 if value else 0
