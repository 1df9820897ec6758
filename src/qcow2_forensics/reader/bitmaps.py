"""Persistent dirty bitmaps decoded to the guest ranges they mark as written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from ..errors import FormatError, LimitExceeded
from ..format.bitmap_directory import DIRTY_TRACKING_BITMAP, BitmapEntry
from ..format.entries import has_reserved_bitmap_bits, named_offset
from ..format.image import Image
from ..text import cut

_SET_BITS = re.compile(rb"\xff+|[^\0\xff]")  # whole bytes at once, others one by one
_PAGE = 8192  # table entries read at a time


def dirty_ranges(image: Image, bitmap: BitmapEntry) -> Iterator[tuple[int, int]]:
    """Yield (guest offset, length) in bytes of the ranges a bitmap marks, merged and in order.

    Ranges are clipped to the disk. Raises :class:`FormatError` where the table or its clusters
    cannot be read, or do not reach the end of the disk; a bitmap that is in use (flag 1) was not
    saved and may be incomplete.
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


def dirty_totals(image: Image, bitmap: BitmapEntry, known: dict[int, ClusterBits] | None = None) -> tuple[int, int]:
    """Return how many ranges :func:`dirty_ranges` yields and the bytes in them, without making any.

    Each cluster is read once, however often the table names it; ``known`` holds what is known of those of other
    bitmaps, by host offset, and takes in what is read.
    """
    disk_size, granularity = image.disk_size, 1 << bitmap.granularity_bits
    most = -(-disk_size // granularity)  # bits that mark a place on the disk
    per_cluster = image.cluster_size * 8
    known = {} if known is None else known
    known.setdefault(0, _cluster_bits((1 << per_cluster) - 1, per_cluster))  # no cluster: all ones
    ranges = ones = 0
    carried = -1  # the first bit after a cluster whose last bit is set
    for index, offset in _clusters(image, bitmap):
        first = index * per_cluster
        if first >= most:
            break
        if first + per_cluster > most:  # the last one, of which the disk has no more
            bits = int.from_bytes(_data(image, bitmap, offset), "little") if offset else (1 << per_cluster) - 1
            facts = _cluster_bits(bits & ((1 << (most - first)) - 1), most - first)
        else:
            if offset not in known:
                known[offset] = _cluster_bits(int.from_bytes(_data(image, bitmap, offset), "little"), per_cluster)
            facts = known[offset]
        ones += facts.ones
        ranges += facts.starts - (facts.first and carried == first)
        carried = min(most, first + per_cluster) if facts.last else -1
    cut = most * granularity - disk_size if carried == most else 0
    return ranges, ones * granularity - cut


class ClusterBits(NamedTuple):
    """What the bits of one cluster of a bitmap add up to."""

    ones: int
    starts: int  # set bits whose neighbour below is not
    first: bool
    last: bool


def _cluster_bits(bits: int, width: int) -> ClusterBits:
    return ClusterBits(bits.bit_count(), (bits & ~(bits << 1)).bit_count(), bool(bits & 1), bool(bits >> (width - 1)))


def _set_bits(image: Image, bitmap: BitmapEntry) -> Iterator[tuple[int, int]]:
    """Yield (first bit, count) of set bits; neighbours may come apart."""
    per_cluster = image.cluster_size * 8
    plain: dict[int, bool] = {0: True}  # clusters of one value, which a crafted table may name a million times
    for index, offset in _clusters(image, bitmap):
        base = index * per_cluster
        if base << bitmap.granularity_bits >= image.disk_size:
            return
        if offset not in plain:
            data = _data(image, bitmap, offset)
            if data.count(data[0]) < len(data) or data[0] not in (0, 0xFF):
                yield from _bits_of(data, base)
                continue
            plain[offset] = bool(data[0])
        if plain[offset]:
            yield base, per_cluster


def _clusters(image: Image, bitmap: BitmapEntry) -> Iterator[tuple[int, int]]:
    """Yield (index, host offset) of the clusters that have set bits, as far as the table shows: 0 is all ones."""
    limits, cluster_size = image.limits, image.cluster_size
    if not 9 <= bitmap.granularity_bits <= 63:
        raise FormatError(f"bitmap granularity 2^{bitmap.granularity_bits}", offset=bitmap.offset)
    if bitmap.table_size * cluster_size > limits.bitmap_data_bytes + cluster_size:
        size = bitmap.table_size * cluster_size
        raise LimitExceeded("bitmap data bytes", size, limits.bitmap_data_bytes, offset=bitmap.offset)
    if bitmap.type != DIRTY_TRACKING_BITMAP:
        raise FormatError(f"bitmap {cut(bitmap.name)} has the unknown type {bitmap.type}", offset=bitmap.offset)
    what = f"the table of bitmap {cut(bitmap.name)}"
    if not bitmap.table_size or bitmap.is_cut_short(cluster_size, image.disk_size):
        raise FormatError(f"{what} ends before the disk", offset=bitmap.offset, field="bitmap_table_size")
    for first in range(0, bitmap.table_size, _PAGE):
        count = min(_PAGE, bitmap.table_size - first)
        for index, entry in enumerate(image.table(bitmap.table_offset + first * 8, count, what), first):
            offset, reserved = named_offset(entry), has_reserved_bitmap_bits(entry)
            if reserved or offset % cluster_size:
                why = "has reserved bits set" if reserved else f"names the unaligned cluster {offset:#x}"
                raise FormatError(f"{what} {why}", offset=bitmap.table_offset + index * 8)
            if entry:
                yield index, offset


def _data(image: Image, bitmap: BitmapEntry, offset: int) -> bytes:
    return image.read_exactly(offset, image.cluster_size, f"a cluster of bitmap {cut(bitmap.name)}")


def _bits_of(data: bytes, base: int) -> Iterator[tuple[int, int]]:
    for match in _SET_BITS.finditer(data):
        at, byte = match.start(), match.group()
        if byte[0] == 0xFF:
            yield base + at * 8, len(byte) * 8
        else:
            yield from ((base + at * 8 + bit, 1) for bit in range(8) if byte[0] >> bit & 1)
