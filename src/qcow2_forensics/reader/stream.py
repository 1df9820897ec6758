"""A file object over any source, for everything that wants ``read`` and ``seek``."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from ..format.source import Source

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


class SourceStream(io.RawIOBase):
    """A read-only, seekable view of a :class:`Source`; the only thing here with a position.

    Closing it leaves the source open. Wrap it in :class:`io.BufferedReader` for line reading.
    """

    def __init__(self, source: Source, name: str = "") -> None:
        super().__init__()
        self._source = source
        self._position = 0
        self.name = name or str(getattr(source, "name", ""))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to ``offset`` from the start, the position or the end; past the end is allowed."""
        self._check_open()
        bases = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}
        if whence not in bases:
            raise ValueError(f"invalid whence {whence}")
        position = bases[whence] + offset
        if position < 0:
            raise ValueError(f"negative seek position {position}")
        self._position = position
        return position

    def tell(self) -> int:
        self._check_open()
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """Return up to ``size`` bytes, all that remain for -1, none at the end."""
        self._check_open()
        if size is None or size < 0:
            return self.readall()
        data = self._source.read(self._position, size) if size else b""
        self._position += len(data)
        return data

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def write(self, _data: ReadableBuffer, /) -> int:
        raise io.UnsupportedOperation("evidence is read-only")

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed stream")
