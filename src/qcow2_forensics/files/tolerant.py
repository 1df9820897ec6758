"""Reading a disk that has unreadable places: the reasons are kept; on request they read as zeros and are listed.

A file system is walked through many small reads, and one unreadable cluster must not end the walk.
Whoever shows what was read checks :attr:`TolerantReader.unreadable` before vouching for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from ..errors import FormatError, Qcow2Error, ReadError
from ..format.header import SECTOR
from ..limits import READ_ERRORS_KEPT, UNREADABLE_RANGES_KEPT
from ..reader.disk import Disk, Layer, RawDisk
from ..reader.salvage import unmappable_until
from .records import Span

Unreadable = Literal["raise", "zeros"]


class TolerantReader:
    """Reads a disk. ``policy`` is ``raise``, or ``zeros`` for what cannot be read.

    ``errors`` keeps the reasons, each once; ``unreadable`` the ranges (offset, length) that were
    filled with zeros.
    """

    def __init__(self, disk: Layer, policy: Unreadable = "raise") -> None:
        self.disk = disk
        self.errors: list[str] = []
        self.unreadable: list[tuple[int, int]] = []
        self._policy = policy

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.disk.size

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes at ``offset``, fewer only at the end of the disk; raises ``Qcow2Error``."""
        try:
            return self.disk.read(offset, length)
        except Qcow2Error as error:
            self._remember(str(error))
            if self._policy == "raise" or len(self.unreadable) >= UNREADABLE_RANGES_KEPT:
                raise
            return b"".join(self._with_zeros(offset, min(length, self.disk.size - offset)))

    def place(self, offset: int, length: int) -> Iterator[Span]:
        """Yield the range itself: this is the disk."""
        yield Span(offset, length)

    def _with_zeros(self, offset: int, length: int) -> Iterator[bytes]:
        """Yield a range by halves, down to what is read or not as a whole; zeros for what cannot be read."""
        end = offset + length
        while offset < end:
            try:
                yield self.disk.read(offset, end - offset)
                return
            except Qcow2Error as error:
                stop = unmappable_until(self.disk, offset, end)
                if stop == offset:
                    unit = SECTOR if _is_cut_anywhere(error) else _smallest_cluster(self.disk)
                    middle = (offset + (end - offset) // 2) // unit * unit
                    if middle <= offset:
                        middle = offset // unit * unit + unit
                    if middle < end:
                        yield from self._with_zeros(offset, middle - offset)
                        offset = middle
                        continue
                    stop = end
                self._remember(str(error))
                self._list(offset, stop - offset)
                yield bytes(stop - offset)
                offset = stop

    def _remember(self, sentence: str) -> None:
        if sentence not in self.errors and len(self.errors) < READ_ERRORS_KEPT:
            self.errors.append(sentence)

    def _list(self, offset: int, length: int) -> None:
        if self.unreadable and sum(self.unreadable[-1]) == offset:
            offset, length = self.unreadable[-1][0], self.unreadable[-1][1] + length
            self.unreadable.pop()
        self.unreadable.append((offset, length))


def _smallest_cluster(layer: Layer | None) -> int:
    """Return the bytes that a chain reads or refuses as a whole: the smallest cluster, or subcluster, in it."""
    unit = 1 << 21
    while isinstance(layer, Disk):
        header = layer.image.header
        if header.version == 1:  # its clusters may be anywhere: the end of the file may cut one at any sector
            return SECTOR
        unit = min(unit, header.cluster_size // 32 if header.extended_l2 else header.cluster_size)
        layer = layer.backing
    return unit if layer is None or isinstance(layer, RawDisk) else SECTOR


def _is_cut_anywhere(error: Qcow2Error) -> bool:
    """Whether the sectors beside an unreadable one may be readable, though they are of one cluster."""
    return isinstance(error, ReadError) or (isinstance(error, FormatError) and error.field == "encrypted cluster")
