"""Reading a disk that has unreadable places: the reasons are kept; on request they read as zeros and are listed.

A file system is walked through many small reads, and one unreadable cluster must not end the walk.
Whoever shows what was read checks :attr:`TolerantReader.unreadable` before relying on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from ..errors import Qcow2Error
from ..limits import READ_ERRORS_KEPT, UNREADABLE_RANGES_KEPT
from ..reader.chain_layers import Layer
from ..reader.salvage import Missing, read_with_zeros
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
        except (Qcow2Error, OSError) as error:
            self._remember(str(error))
            if self._policy == "raise" or len(self.unreadable) >= UNREADABLE_RANGES_KEPT:
                raise
        return read_with_zeros(self.disk, offset, length, self._list)

    def place(self, offset: int, length: int) -> Iterator[Span]:
        """Yield the range itself: this is the disk."""
        yield Span(offset, length)

    def _remember(self, sentence: str) -> None:
        if sentence not in self.errors and len(self.errors) < READ_ERRORS_KEPT:
            self.errors.append(sentence)

    def _list(self, missing: Missing) -> None:
        self._remember(missing.why)
        offset, length, _ = missing
        if self.unreadable and sum(self.unreadable[-1]) == offset:
            offset, length = self.unreadable[-1][0], self.unreadable[-1][1] + length
            self.unreadable.pop()
        self.unreadable.append((offset, length))
