"""Sorted ranges of guest-physical addresses: what is recorded, what is zero, what is left to scan."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .model import Region
from .page_index import RunIndex, column


class AddressRanges(NamedTuple):
    """Ranges that are sorted, apart from each other and never empty, as two columns."""

    starts: array[int]
    ends: array[int]


def recorded(regions: Sequence[Region], index: Mapping[str, RunIndex], page_size: int) -> AddressRanges:
    """Return where the stream holds guest memory."""
    return _spans(regions, index, page_size, zero=False, minimum=1)


def zeros(regions: Sequence[Region], index: Mapping[str, RunIndex], page_size: int, minimum: int) -> AddressRanges:
    """Return where the stream holds runs of zero pages of at least ``minimum`` bytes."""
    return _spans(regions, index, page_size, zero=True, minimum=minimum)


def _spans(
    regions: Sequence[Region], index: Mapping[str, RunIndex], page_size: int, *, zero: bool, minimum: int
) -> AddressRanges:
    starts: list[npt.NDArray[np.int64]] = []
    ends: list[npt.NDArray[np.int64]] = []
    for region in regions:
        runs = index[region.block]
        first = np.frombuffer(runs.first, np.int64) if len(runs) else np.empty(0, np.int64)
        pages = np.frombuffer(runs.pages, np.int64) if len(runs) else np.empty(0, np.int64)
        if zero and len(runs):
            chosen = np.frombuffer(runs.value, np.int64) == -1
            first, pages = first[chosen], pages[chosen]
        shift = region.address - region.block_offset
        low = np.maximum(first * page_size + shift, region.address)
        high = np.minimum((first + pages) * page_size + shift, region.end)
        inside = low < high
        starts.append(low[inside])
        ends.append(high[inside])
    low = np.concatenate(starts) if starts else np.empty(0, np.int64)
    high = np.concatenate(ends) if ends else np.empty(0, np.int64)
    if len(low):
        begins = np.concatenate(([True], low[1:] != high[:-1]))
        low, high = low[begins], high[np.concatenate((begins[1:], [True]))]
        long = high - low >= minimum
        low, high = low[long], high[long]
    return AddressRanges(column(low), column(high))


def clip(spans: AddressRanges, address: int, length: int | None) -> Iterator[tuple[int, int]]:
    """Yield ``(address, length)`` of the parts of spans inside a range; to the end when ``length`` is None."""
    end = None if length is None else address + length
    for number in range(max(0, bisect_right(spans.starts, address) - 1), len(spans.starts)):
        low = max(spans.starts[number], address)
        high = spans.ends[number] if end is None else min(spans.ends[number], end)
        if end is not None and low >= end:
            return
        if low < high:
            yield low, high - low


def subtract(
    pieces: Iterable[tuple[int, int]], holes: Iterable[tuple[int, int]], margin: int
) -> Iterator[tuple[int, int]]:
    """Yield what is left of sorted pieces without the inside of sorted holes; ``margin`` bytes at both ends of a hole stay."""
    waiting = iter(holes)
    hole = next(waiting, None)
    for address, length in pieces:
        start, end = address, address + length
        while hole is not None and hole[0] < end:
            low, high = hole[0] + margin, hole[0] + hole[1] - margin
            if low > start:
                yield start, low - start
            start = max(start, high)
            hole = next(waiting, None)
        if start < end:
            yield start, end - start
