"""Sets of byte ranges, for asking how much of a file lies in them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator


class Spans:
    """The union of ``(offset, length)`` ranges; built once, asked often."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for offset, length in sorted(ranges):
            if length <= 0:
                continue
            if self._ends and offset <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], offset + length)
            else:
                self._starts.append(offset)
                self._ends.append(offset + length)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for start, end in zip(self._starts, self._ends, strict=True):
            yield start, end - start

    @property
    def total(self) -> int:
        """Bytes in the set."""
        return sum(self._ends) - sum(self._starts)

    def overlap(self, ranges: Iterable[tuple[int, int]]) -> int:
        """Return how many bytes of ``ranges`` are in the set."""
        return sum(self._one(offset, offset + length) for offset, length in ranges)

    def _one(self, start: int, end: int) -> int:
        found = 0
        at = max(0, bisect_right(self._starts, start) - 1)
        while at < len(self._starts) and self._starts[at] < end:
            found += max(0, min(end, self._ends[at]) - max(start, self._starts[at]))
            at += 1
        return found
