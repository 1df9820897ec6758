"""A source with some ranges replaced: a header or tables that are rebuilt in memory, never on disk."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

from ..errors import ReadError
from ..format.source import Source

Patch: TypeAlias = "tuple[int, bytes]"  # host offset, and the bytes to be read there


class PatchedSource:
    """``source`` with ``patches`` (host offset, bytes) shown in place of what is there.

    Patches may lie past the end of the file; what lies between the end and them cannot be read.
    Everything else about the source (its path, its identity, how it is closed) is its own.
    """

    keeps_contract = True

    def __init__(self, source: Source, patches: Iterable[Patch]) -> None:
        self._source = source
        self._patches = sorted(patches)
        ends = [offset + len(data) for offset, data in self._patches]
        self._size = max([source.size, *ends])

    @property
    def size(self) -> int:
        return self._size

    def read(self, offset: int, length: int, /) -> bytes:
        """Return bytes as the source does; :class:`ReadError` past the end of the file, outside the patches."""
        length = min(length, self._size - offset)
        if length <= 0:
            return b""
        for at, data in self._patches:
            if at <= offset and offset + length <= at + len(data):
                return data[offset - at : offset - at + length]
        end = offset + length
        if end <= self._source.size:
            result = self._source.read(offset, length)
        else:
            result = self._source.read(offset, self._source.size - offset) if offset < self._source.size else b""
            missing = offset + len(result)
            if not any(at <= missing and end <= at + len(data) for at, data in self._patches):
                raise ReadError("nothing is stored past the end of the file", offset=missing, length=end - missing)
            result = result.ljust(length, b"\0")
        touched = [(at, data) for at, data in self._patches if at < end and at + len(data) > offset]
        if touched:
            buffer = bytearray(result)
            for at, data in touched:
                first, last = max(at, offset), min(at + len(data), end)
                buffer[first - offset : last - offset] = data[first - at : last - at]
            result = bytes(buffer)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)
