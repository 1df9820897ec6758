"""Persistent dirty bitmaps decoded to the guest ranges they mark as written."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .errors import FormatError, LimitExceeded, printable
from .image import Image
from .structures import BITMAP_ALL_ONES, OFFSET_MASK, BitmapEntry

_SET_BITS = re.compile(rb"[^\0]+")
_PAGE = 8192  # table entries read at a time


def dirty_ranges(image: Image, bitmap: BitmapEntry) -> Iterator[tuple[int, int]]:
    """Yield (guest offset, length) in bytes of the ranges a bitmap marks, merged and in order.

    Ranges are clipped to the disk. Raises :class:`FormatError` where the table or its clusters
    cannot be read; a bitmap that is in use (flag 1) was not saved and may be incomplete.
    """
    disk_size = image.disk_size
    pending: tuple[int, int] | None = None
    for first, count in _set_bits(image, bitmap):
        start = first << bitmap.granularity_bits
        end = min(disk_size, (first + count) << bitmap.granularity_bits)
        if start >= end:
            continue
        if pending is not None and pending[1] == start:
            pending = (pending[0], end)
            continue
        if pending is not None:
            yield pending[0], pending[1] - pending[0]
        pending = (start, end)
    if pending is not None:
        yield pending[0], pending[1] - pending[0]


def _set_bits(image: Image, bitmap: BitmapEntry) -> Iterator[tuple[int, int]]:
    """Yield (first bit, count) of set bits; neighbours may come apart."""
    limits = image.limits
    cluster_size = image.cluster_size
    if not 9 <= bitmap.granularity_bits <= 63:
        raise FormatError(f"bitmap granularity 2^{bitmap.granularity_bits}", offset=bitmap.offset)
    if bitmap.table_size * cluster_size > limits.bitmap_data_bytes + cluster_size:
        size = bitmap.table_size * cluster_size
        raise LimitExceeded("bitmap data bytes", size, limits.bitmap_data_bytes, offset=bitmap.offset)
    per_cluster = cluster_size * 8
    what = f"the table of bitmap {printable(bitmap.name)}"
    for first in range(0, bitmap.table_size, _PAGE):
        count = min(_PAGE, bitmap.table_size - first)
        for index, entry in enumerate(image.table(bitmap.table_offset + first * 8, count, what), first):
            offset = entry & OFFSET_MASK
            if offset % cluster_size:
                at = bitmap.table_offset + index * 8
                raise FormatError(f"{what} names the unaligned cluster {offset:#x}", offset=at)
            if offset:
                data = image.read_exactly(offset, cluster_size, f"a cluster of bitmap {printable(bitmap.name)}")
                yield from _bits_of(data, index * per_cluster)
            elif entry & BITMAP_ALL_ONES:
                yield index * per_cluster, per_cluster


def _bits_of(data: bytes, base: int) -> Iterator[tuple[int, int]]:
    for match in _SET_BITS.finditer(data):
        for at, byte in enumerate(match.group(), match.start()):
            if byte == 0xFF:
                yield base + at * 8, 8
            else:
                yield from ((base + at * 8 + bit, 1) for bit in range(8) if byte >> bit & 1)
