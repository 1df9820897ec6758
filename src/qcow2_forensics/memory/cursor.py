"""A forward reader over a stream, with the words and names its grammar is made of."""

from __future__ import annotations

from ..errors import FormatError, LimitExceeded
from ..format.source import Source
from ..limits import (
    STREAM_BYTES_PER_ENCODED,
    STREAM_BYTES_PER_RECORD,
    STREAM_READ_SPARE,
    STREAM_RECORDS_SPARE,
    Limits,
    MiB,
)
from ..text import decoded

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

    Clusters of an image may be named many times over, so that a small file holds a stream without end:
    what it may cost goes by the bytes that are stored.
    """

    def __init__(self, source: Source, limits: Limits) -> None:
        self.source = source
        self.buffer = b""
        self.base = 0
        self.index = 0
        stored = int(getattr(source, "stored_size", source.size))
        self._most_steps = self._steps_left = STREAM_RECORDS_SPARE + stored // STREAM_BYTES_PER_RECORD
        self.most_runs = min(limits.ram_runs, self._most_steps)
        self.most_decoded = STREAM_RECORDS_SPARE + stored // STREAM_BYTES_PER_ENCODED
        self._repeats = limits.stream_repeats
        self._bytes_left = STREAM_READ_SPARE + limits.stream_repeats * stored

    @property
    def position(self) -> int:
        """The stream offset of the next byte."""
        return self.base + self.index

    def fill(self, length: int) -> bool:
        """Make the buffer start at the position; return whether ``length`` bytes are there."""
        position = self.base + self.index
        self.buffer = self.read(position, max(length, WINDOW)) if position < self.source.size else b""
        self.base = position
        self.index = 0
        return len(self.buffer) >= length

    def read(self, position: int, length: int) -> bytes:
        """Return bytes from anywhere in the stream, fewer only at its end; :class:`LimitExceeded` after too many."""
        data = self.source.read(position, length)
        self._bytes_left -= len(data)
        if self._bytes_left < 0:
            raise LimitExceeded("stream_repeats", self._repeats + 1, self._repeats)
        return data

    def step(self) -> None:
        """Count something that holds no pages; :class:`FormatError` after too many."""
        self._steps_left -= 1
        if self._steps_left < 0:
            raise broken(f"more than {self._most_steps} sections and marks", self.position)

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
        return decoded(self.take(self.uint(1)))
