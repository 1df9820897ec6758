"""A forward reader over a stream, with the words and names its grammar is made of."""

from __future__ import annotations

from ..errors import FormatError
from ..limits import MiB
from ..source import Source

WINDOW = 4 * MiB  # bytes read at once: large enough to hide the cost of a read, small enough to forget


class Truncated(FormatError):
    """The stream ends before its grammar does."""


def broken(what: str, position: int) -> FormatError:
    """Return the error for bytes that contradict the grammar, naming the place in the stream."""
    return FormatError(f"migration stream: {what} at stream offset {position:#x}", field="vm_state")


def truncated(size: int) -> Truncated:
    """Return the error for a stream that ends early."""
    return Truncated(f"migration stream ends at {size:#x}, before its RAM is complete", field="vm_state")


class Cursor:
    """Bytes in order. ``buffer``, ``base`` and ``index`` are open to the loop over page records.

    ``base`` is the stream offset of ``buffer[0]``, ``index`` the place in the buffer, which may lie beyond
    its end after a skip.
    """

    def __init__(self, source: Source, position: int = 0) -> None:
        self.source = source
        self.buffer = b""
        self.base = position
        self.index = 0

    @property
    def position(self) -> int:
        """The stream offset of the next byte."""
        return self.base + self.index

    def fill(self, length: int) -> bool:
        """Make the buffer start at the position; tell whether ``length`` bytes are there."""
        position = self.base + self.index
        self.buffer = self.source.read(position, max(length, WINDOW)) if position < self.source.size else b""
        self.base = position
        self.index = 0
        return len(self.buffer) >= length

    def take(self, length: int) -> bytes:
        """Return the next bytes; the caller has checked that ``length`` is reasonable."""
        end = self.index + length
        if end > len(self.buffer):
            if not self.fill(length):
                raise truncated(self.source.size)
            end = length
        data = self.buffer[self.index : end]
        self.index = end
        return data

    def skip(self, length: int) -> None:
        """Go forward without reading; the next read notices the end."""
        self.index += length

    def jump(self, position: int) -> None:
        """Go to a stream offset."""
        self.base, self.index, self.buffer = position, 0, b""

    def peek(self) -> int:
        """Return the next byte without taking it, -1 at the end."""
        if self.index >= len(self.buffer) and not self.fill(1):
            return -1
        return self.buffer[self.index]

    def uint(self, length: int) -> int:
        """Return a big-endian unsigned integer of ``length`` bytes."""
        return int.from_bytes(self.take(length), "big")

    def name(self) -> str:
        """Return a counted string of at most 255 bytes; bytes that are not UTF-8 survive as surrogates."""
        return self.take(self.uint(1)).decode("utf-8", "surrogateescape")
