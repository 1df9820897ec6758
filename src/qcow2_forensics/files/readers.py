"""Bytes of a volume, and where on the disk they are.

A volume is read through the one reader of its disk, so that what could not be read is listed in one
place, in bytes of the disk::

    disk       TolerantReader          errors, unreadable
    partition  VolumeReader            one segment
    LVM        VolumeReader            a segment for each run of extents
    LUKS       what decrypts it        place: the payload's offset further on
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Protocol

from ..format.lvm import PositionalReader, Segment
from .records import Span


class Reader(PositionalReader, Protocol):
    """Positional bytes of one volume, and what could not be read of its disk."""

    @property
    def errors(self) -> list[str]:
        """The reasons of failed reads of the disk, each once."""
        ...

    @property
    def unreadable(self) -> list[tuple[int, int]]:
        """Ranges (offset, length) of the disk that were read as zeros."""
        ...

    def place(self, offset: int, length: int) -> Iterator[Span]:
        """Yield where on the disk a range is."""
        ...


class ReaderOver:
    """A reader of what another one gives: both have the one record of what could not be read of their disk."""

    def __init__(self, below: Reader, size: int) -> None:
        self.size = size
        self.errors = below.errors
        self.unreadable = below.unreadable


class VolumeReader(ReaderOver):
    """A volume made of segments of the volumes below it."""

    def __init__(self, parts: Iterable[tuple[Reader, Segment]]) -> None:
        self._parts = sorted(parts, key=lambda part: part[1].start)
        self._starts = [segment.start for _, segment in self._parts]
        last = self._parts[-1][1]
        super().__init__(self._parts[0][0], last.start + last.length)

    @classmethod
    def slice(cls, reader: Reader, offset: int, length: int) -> VolumeReader:
        """Return a part of a volume as one, cut at the end of it."""
        return cls([(reader, Segment(0, max(0, min(length, reader.size - offset)), offset))])

    def read(self, offset: int, length: int) -> bytes:
        pieces = []
        for reader, at, count in self._ranges(offset, length):
            data = reader.read(at, count)
            pieces.append(data)
            if len(data) < count:  # the disk ends inside the volume
                break
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def place(self, offset: int, length: int) -> Iterator[Span]:
        for reader, at, count in self._ranges(offset, length):
            yield from reader.place(at, count)

    def _ranges(self, offset: int, length: int) -> Iterator[tuple[Reader, int, int]]:
        end = min(offset + length, self.size)
        index = max(0, bisect_right(self._starts, offset) - 1)
        while offset < end:
            reader, segment = self._parts[index]
            inside = offset - segment.start
            count = min(end - offset, segment.length - inside)
            if count <= 0:
                raise OSError(f"nothing of the volume is mapped at {offset}")
            yield reader, segment.below + inside, count
            offset += count
            index += 1


def whole(reader: Reader, offset: int, length: int) -> bytes:
    """Return exactly ``length`` bytes of what a volume holds for itself; raises ``OSError`` where the volume ends before."""
    data = reader.read(offset, length)
    if len(data) < length:
        raise OSError("the volume ends inside it")
    return data
