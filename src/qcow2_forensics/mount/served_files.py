"""Read-only files made of an image: bytes by position, a time, and where the holes are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from ..errors import Qcow2Error
from ..limits import MOUNT_TABLES_COUNTED
from ..reader.disk import Disk
from ..reader.runs import Kind

if TYPE_CHECKING:
    from ..memory import GuestMemory

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_NAME_LENGTH = 80  # of each part; with what is added it stays far below the 255 bytes of a file name


class FileContent(Protocol):
    """What a file holds. ``data_ranges`` yields (offset, end) of what may be anything but zeros, in order."""

    @property
    def size(self) -> int: ...

    @property
    def stored_bytes(self) -> int:
        """At most so many bytes are stored for it: what ``du`` shows."""

    def read(self, offset: int, length: int, /) -> bytes: ...

    def data_ranges(self, offset: int) -> Iterator[tuple[int, int]]: ...


class DiskContent:
    """One state of the disk."""

    def __init__(self, disk: Disk) -> None:
        self.read = disk.read
        self.size = disk.size
        self._disk = disk

    @cached_property
    def stored_bytes(self) -> int:
        """What ``du`` shows: counted on disks of moderate size, else at most what the image's files store."""
        if self.size > MOUNT_TABLES_COUNTED * self._disk.image.header.l2_span:
            return min(self.size, self._disk.stored_size)
        try:
            return sum(end - start for start, end in self.data_ranges(0))
        except Qcow2Error:  # the read that needs the broken table says so
            return self.size

    def data_ranges(self, offset: int) -> Iterator[tuple[int, int]]:
        for extent in self._disk.extents(offset):
            if extent.kind not in (Kind.ZERO, Kind.HOLE):
                yield extent.offset, extent.offset + extent.length


class MemoryContent:
    """Guest-physical memory as a padded raw file: zeros where there is no RAM."""

    def __init__(self, memory: GuestMemory) -> None:
        from ..memory.dump import pieces

        self.size = memory.size
        self._tiles = [(address, address + length) for address, length, filled in pieces(memory) if filled]
        self.stored_bytes = sum(end - start for start, end in self._tiles)
        self._memory = memory

    def read(self, offset: int, length: int, /) -> bytes:
        return self._memory.read(offset, min(length, self.size - offset), pad=True)

    def data_ranges(self, offset: int) -> Iterator[tuple[int, int]]:
        return ((max(start, offset), end) for start, end in self._tiles if end > offset)


class TextContent:
    """A small text that is held in memory."""

    def __init__(self, text: str) -> None:
        self._data = text.encode("utf-8")
        self.size = self.stored_bytes = len(self._data)

    def read(self, offset: int, length: int, /) -> bytes:
        return self._data[offset : offset + length]

    def data_ranges(self, offset: int) -> Iterator[tuple[int, int]]:
        yield offset, self.size


@dataclass(frozen=True, slots=True)
class File:
    """One file of the mount; ``time`` is in nanoseconds since 1970."""

    name: str
    content: FileContent
    time: int


def seek_data(content: FileContent, offset: int) -> int | None:
    """Return where the next byte that may be anything but zero is, None when there is none (``SEEK_DATA``)."""
    return next((start for start, _ in content.data_ranges(offset)), None)


def seek_hole(content: FileContent, offset: int) -> int:
    """Return where the next hole starts, at the latest the end of the file (``SEEK_HOLE``)."""
    for start, end in content.data_ranges(offset):
        if start > offset:
            break
        offset = end
    return min(offset, content.size)


def safe_name(text: str) -> str:
    """Return ``text`` as part of a file name that no shell, tool or terminal misreads: ASCII letters, digits, ``._-``."""
    return _UNSAFE.sub("_", text)[:_NAME_LENGTH].strip("._-")


class UniqueNames:
    """Gives every file a name of its own: ``stem + suffix``, numbered where another has that already, in whatever case.

    Thousands of snapshots may have one name: where its numbers go on is remembered.
    """

    def __init__(self) -> None:
        self._used: set[str] = set()
        self._last: dict[tuple[str, str], int] = {}

    def of(self, stem: str, suffix: str = "") -> str:
        """Return a name that was not given before."""
        key = stem.lower(), suffix.lower()
        name, number = f"{stem}{suffix}", self._last.get(key, 1)
        while name.lower() in self._used:
            number += 1
            name = f"{stem}-{number}{suffix}"
        self._last[key] = number
        self._used.add(name.lower())
        return name
