"""Bytes that follow each other in a file and in the guest's disk, as pieces that a carver can use.

::

    clusters   | JPEG starts | goes on | goes on | zeros | text | PNG starts | goes on |
    pieces     [ one                           ]         [ two  ][ three               ]

Zeros at either end of a piece are left out. Nothing here needs numpy before there is a byte to describe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from ..limits import MiB
from ..reader.runs import joined
from . import content
from .model import Piece

_CHUNK = 1 * MiB  # read at once, or one cluster

Read = Callable[[int, int], bytes]


class HostRange(NamedTuple):
    """A range of a file, the guest offset of its first byte, and the state that has it there."""

    offset: int
    length: int
    kind: str  # among model.KINDS
    guest_offset: int | None = None
    snapshot: str = ""


def _join(first: HostRange, second: HostRange) -> HostRange | None:
    """Return two ranges of one kind as one where they follow each other in the file and in the guest's disk."""
    guest = None if first.guest_offset is None else first.guest_offset + first.length
    if (second.offset, second.kind, second.guest_offset) != (first.offset + first.length, first.kind, guest):
        return None
    return first._replace(length=first.length + second.length)


def pieces(read: Read, ranges: Iterable[HostRange], cluster_size: int) -> Iterator[Piece]:
    """Yield what ranges hold, given in the order of the file.

    A piece ends at a cluster of zeros, and where a cluster begins as a file of a known kind does.
    """
    for found in joined(ranges, _join):
        growing: _Growing | None = None
        for offset, part in _parts(read, found, cluster_size):
            holds_bytes = part.count(0) < len(part)
            if growing is not None and (not holds_bytes or content.starts_file(part)):
                yield growing.piece()
                growing = None
            if holds_bytes:
                growing = growing or _Growing(found, offset)
                growing.add(part)
        if growing is not None:
            yield growing.piece()


def piece_of(data: bytes, offset: int, kind: str, snapshot: str = "") -> Iterator[Piece]:
    """Yield the one piece from the first to the last byte that is not zero; nothing when all are."""
    if data.count(0) < len(data):
        growing = _Growing(HostRange(offset, len(data), kind, None, snapshot), offset)
        growing.add(data)
        yield growing.piece()


def _parts(read: Read, found: HostRange, cluster_size: int) -> Iterator[tuple[int, bytes]]:
    """Yield offset and bytes of the parts of a range, cut where clusters of the file start."""
    at, stop = found.offset, found.offset + found.length
    chunk = max(_CHUNK, cluster_size)
    while at < stop:
        end = min(stop, at // cluster_size * cluster_size + chunk)
        data = read(at, end - at)
        start = at
        while start < end:
            cut = min(end, (start // cluster_size + 1) * cluster_size)
            yield start, data[start - at : cut - at]
            start = cut
        at = end


class _Growing:
    """A piece that parts are added to, in the order of the file; none of them is all zeros."""

    def __init__(self, found: HostRange, offset: int) -> None:
        import numpy as np  # here: triage of a clean header never gets so far

        self._found = found
        self._start = offset
        self._length = 0
        self._zeros = 0  # at its end so far
        self._head = b""
        self._text = content.TextCheck()
        self._counts = np.zeros(256, np.int64)

    def add(self, part: bytes) -> None:
        """Take in the next bytes."""
        import numpy as np

        if not self._length:
            whole, part = len(part), part.lstrip(b"\0")
            self._start += whole - len(part)
        self._counts += np.bincount(np.frombuffer(part, np.uint8), minlength=256)
        self._head += part[: max(0, content.LONGEST - len(self._head))]
        kept = part.rstrip(b"\0")
        self._text.add(bytes(self._zeros) + kept)
        self._length += len(part)
        self._zeros = len(part) - len(kept)

    def piece(self) -> Piece:
        """Return the piece, without the zeros at its end."""
        counts, length = self._counts.copy(), self._length - self._zeros
        counts[0] -= self._zeros
        head, found = self._head[:length], self._found
        guest = found.guest_offset
        return Piece(
            self._start,
            length,
            found.kind,
            "text" if self._text.is_text else "data",
            length - int(counts[0]),
            content.entropy_of(counts),
            content.signature(head),
            content.preview(head),
            None if guest is None else guest + self._start - found.offset,
            found.snapshot,
        )
