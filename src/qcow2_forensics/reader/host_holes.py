"""Which stored bytes the host's file system keeps as holes: ranges that were never written.

``qemu-img map`` looks through an image at the file below it and marks data that lies in a hole as
zeros. It does so for raw files always, and for an image when that occupies visibly less room than
its refcounts account for, as a preallocated image does. Nothing here changes what is read.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from ..errors import Qcow2Error
from ..format.entries import refcount_block_offset
from ..format.image import Image
from ..format.source import Source

_BLOCK_UNIT = 512  # of st_blocks, whatever the file system's own block size
_ARRAY_CODES = {8: "B", 16: "H", 32: "I", 64: "Q"}


class HostRun(NamedTuple):
    """``length`` host bytes at ``offset`` that are stored, or a hole that reads as zeros."""

    offset: int
    length: int
    is_hole: bool


def host_runs(source: Source, offset: int, length: int) -> Iterator[HostRun]:
    """Yield runs that tile a host range; what lies past the end of the file is a hole.

    A source that is no file, or a file system without holes, gives one stored run.
    """
    end = offset + length
    stored = max(offset, min(end, source.size))
    fd = _descriptor(source)
    while offset < stored:
        data, hole = (offset, stored) if fd is None else _next_data(fd, offset, stored)
        if data > offset:
            yield HostRun(offset, data - offset, True)
        if hole > data:
            yield HostRun(data, hole - data, False)
        offset = hole
    if end > offset:
        yield HostRun(offset, end - offset, True)


def _descriptor(source: Source) -> int | None:
    fileno = getattr(source, "fileno", None)
    return int(fileno()) if fileno is not None and hasattr(os, "SEEK_DATA") else None


def _next_data(fd: int, offset: int, end: int) -> tuple[int, int]:
    """Return start and end of the first stored run at or after ``offset``, both at most ``end``."""
    try:
        data = min(end, os.lseek(fd, offset, os.SEEK_DATA))
        return data, min(end, os.lseek(fd, data, os.SEEK_HOLE)) if data < end else end
    except OSError as error:
        if error.errno == errno.ENXIO:  # no data up to the end of the file
            return end, end
        return offset, end  # the file system has no such call


def looks_preallocated(image: Image) -> bool:
    """Whether the file occupies clearly less room than its refcounts account for.

    The measure is QEMU's: at least two clusters and a ninth more are counted than are stored.
    Refcounts that cannot be read count for nothing.
    """
    header = image.header
    fd = _descriptor(image.source)
    if fd is None or header.version == 1 or header.refcount_order > 6:
        return False
    stored = os.fstat(fd).st_blocks * _BLOCK_UNIT // header.cluster_size
    wanted = max(stored * 10 // 9, stored + 2)
    counted = 0
    try:
        for used in _used_clusters(image):
            counted += used
            if counted >= wanted:
                return True
    except Qcow2Error:
        pass  # a damaged refcount table says nothing about preallocation
    return False


def _used_clusters(image: Image) -> Iterator[int]:
    """Yield for each refcount block how many clusters inside the file it counts."""
    header = image.header
    left = -(-image.file_size // header.cluster_size)
    per_block = header.cluster_size * 8 // header.refcount_bits
    slots = min(-(-left // per_block), header.refcount_table_clusters * header.cluster_size // 8)
    for entry in image.table(header.refcount_table_offset, slots, "refcount table"):
        offset = refcount_block_offset(entry)
        count = min(left, per_block)
        left -= count
        if offset:
            block = image.read_exactly(offset, header.cluster_size, "refcount block")
            yield _nonzero(block[: -(-count * header.refcount_bits // 8)], header.refcount_bits)


def _nonzero(block: bytes, bits: int) -> int:
    if bits < 8:
        mask = (1 << bits) - 1
        table = bytes(sum(bool(byte >> shift & mask) for shift in range(0, 8, bits)) for byte in range(256))
        return sum(block.translate(table))
    counts = array(_ARRAY_CODES[bits], block)
    return len(counts) - counts.count(0)
