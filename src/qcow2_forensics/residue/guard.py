"""A source that refuses ranges: bytes of a deleted snapshot that belong to something else by now."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

from ..errors import ReadError
from ..source import Source


class GuardedSource:
    """``source`` with ranges whose reading raises :class:`ReadError` with the reason.

    ``streams`` are (offset, length) of reads that are refused only as such: others may share their
    sectors. Everything else about the source (its path, its identity, how it is closed) shows through.
    """

    def __init__(
        self, source: Source, ranges: Iterable[tuple[int, int, str]], streams: Iterable[tuple[int, int, str]] = ()
    ) -> None:
        self._source = source
        self._streams = {(offset, length): reason for offset, length, reason in streams}
        merged: list[tuple[int, int, str]] = []
        for offset, length, reason in sorted(ranges):
            if merged and merged[-1][2] == reason and merged[-1][1] == offset:
                merged[-1] = (merged[-1][0], offset + length, reason)
            else:
                merged.append((offset, offset + length, reason))
        self._ranges = merged
        self._starts = [start for start, _, _ in merged]

    @property
    def size(self) -> int:
        return self._source.size

    def read(self, offset: int, length: int, /) -> bytes:
        """Return bytes as the source does; raises when the range touches a guarded one."""
        at = bisect_right(self._starts, offset + length - 1) - 1
        if length > 0 and at >= 0 and self._ranges[at][1] > offset:
            start, _, why = self._ranges[at]
            raise ReadError(why, offset=max(start, offset), length=length)
        if (reason := self._streams.get((offset, length))) is not None:
            raise ReadError(reason, offset=offset, length=length)
        return self._source.read(offset, length)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)
