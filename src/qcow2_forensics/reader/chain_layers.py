"""What a chain of files is made of: the layer below an overlay, and the simplest one, a raw file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from ..format.header import SECTOR
from ..format.source import Source, close_source, source_name
from .runs import Kind


class Extent(NamedTuple):
    """``length`` guest bytes of one kind; ``depth`` counts backing files, 0 is this image.

    ``host_offset`` is in the file at that depth (its data file when it has one), None for bytes
    that are stored nowhere or only compressed.
    """

    offset: int
    length: int
    kind: Kind
    host_offset: int | None
    depth: int


class Layer(Protocol):
    """What a disk needs of its backing file; :class:`Disk` and :class:`RawDisk` are layers."""

    @property
    def size(self) -> int: ...

    @property
    def depth(self) -> int: ...

    def read(self, offset: int, length: int, /) -> bytes: ...

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]: ...

    def close(self) -> None: ...


class RawDisk:
    """A file whose bytes are the disk: a raw backing file. A cut last sector ends in zeros."""

    depth = 1  # layers from here to the bottom of the chain

    def __init__(self, source: Source) -> None:
        self.source = source
        self.name = source_name(source)
        self.size = -(-source.size // SECTOR) * SECTOR

    def read(self, offset: int, length: int, /) -> bytes:
        """Return ``length`` bytes, fewer only at the end."""
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        stored = min(length, self.source.size - offset)
        return (self.source.read(offset, stored) if stored > 0 else b"").ljust(length, b"\0")

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """Yield the range as one piece of data."""
        end = self.size if length is None else min(self.size, offset + length)
        if offset < end:
            yield Extent(offset, end - offset, Kind.DATA, offset, 0)

    def close(self) -> None:
        close_source(self.source)
