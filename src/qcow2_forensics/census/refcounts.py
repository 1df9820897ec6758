"""The refcounts as they are on disk ("Host cluster management")."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ..format.header_rules import INT64_MAX, REFCOUNTS
from ..format.image import Image
from ..reader.cache import Fifo
from .arrays import I64, U64, Mask, run_starts, stretches
from .columns import refcount_block_offsets

Block = npt.NDArray[np.unsignedinteger]
Window = tuple[int, int, Block | None, bool]

_CACHE_BYTES = 4 << 20  # of decoded blocks
_READ = 1 << 20  # bytes of neighbouring blocks decoded at once
_GAP = 1 << 16  # bytes between two blocks that are read over


class StoredRefcounts:
    """Refcount table and blocks of one image; what lies past the end of the file is zero, as for QEMU.

    ``known`` is False when header fields rule out finding them; then none can be read.
    """

    def __init__(self, image: Image) -> None:
        header = image.header
        self._image = image
        self.bits = header.refcount_bits if header.refcount_order <= 6 else 16
        self.most = (1 << self.bits) - 1
        self.cluster_size = header.cluster_size
        self.per_block = header.cluster_size * 8 // self.bits
        broken = [problem for problem in image.header_problems if REFCOUNTS in problem.blocks]
        self.known = all(problem.field == "refcount_table_clusters" and not problem.value for problem in broken)
        count = header.refcount_table_clusters * header.cluster_size // 8 if self.known else 0
        data = image.read(header.refcount_table_offset, count * 8).ljust(count * 8, b"\0")
        self.table: U64 = np.frombuffer(data, dtype=">u8").astype(np.uint64)
        self.offsets: U64 = refcount_block_offsets(self.table)
        bad = (self.offsets & np.uint64(header.cluster_size - 1)) != 0
        self.unreadable: Mask = bad | (self.offsets > np.uint64(INT64_MAX - header.cluster_size))
        room = max(4, _CACHE_BYTES // (self.per_block * max(1, self.bits // 8)))
        self._blocks: Fifo[int, Block] = Fifo(room)

    def block(self, offset: int) -> Block:
        """Return the decoded refcounts of the block at a host offset."""
        found = self._blocks.entries.get(offset)
        if found is None:
            data = self._image.read(offset, self.cluster_size).ljust(self.cluster_size, b"\0")
            found = decode(data, self.bits)
            self._blocks.add(offset, found)
        return found

    def used(self, blocks: U64) -> I64:
        """Return how many refcounts are above 0 in each block of a sorted list of aligned host offsets."""
        size = self.cluster_size
        counts = np.zeros(len(blocks), np.int64)
        for start, stop in stretches(len(blocks), np.diff(blocks) > max(size, _GAP)):
            first = start
            while first < stop:  # those that are near one another at once
                begin = int(blocks[first])
                last = int(np.searchsorted(blocks[first:stop], begin + max(size, _READ))) + first
                length = int(blocks[last - 1]) - begin + size
                values = decode(self._image.read(begin, length).ljust(length, b"\0"), self.bits)
                rows = (blocks[first:last] - np.uint64(begin)) // np.uint64(size)
                counts[first:last] = np.count_nonzero(values.reshape(-1, self.per_block), axis=1)[rows]
                first = last
        return counts

    def blank(self, start: int, stop: int) -> bool:
        """Whether the table has no block for any cluster from ``start`` to ``stop``."""
        return not self.offsets[start // self.per_block : -(-stop // self.per_block)].any()

    def windows(self, clusters: int, start: int = 0, limit: int = 1 << 22) -> Iterator[Window]:
        """Yield ``(start, stop, refcounts, readable)`` tiling the clusters from ``start`` to ``clusters``.

        ``refcounts`` is None where all are zero, or cannot be read.
        """
        while start < clusters:
            slot = start // self.per_block
            stop = min(clusters, (slot + 1) * self.per_block)
            if slot >= len(self.table) or not self.known:
                stop = min(clusters, start + limit)
                yield start, stop, None, self.known
            elif self.unreadable[slot]:
                yield start, stop, None, False
            elif not self.offsets[slot]:
                # One window for a run of empty slots.
                run = self.offsets[slot : slot + max(1, limit // self.per_block)] == 0
                count = len(run) if run.all() else int(np.argmin(run))
                stop = min(clusters, (slot + count) * self.per_block)
                yield start, stop, None, True
            else:
                block = self.block(int(self.offsets[slot]))
                first = start - slot * self.per_block
                yield start, stop, block[first : first + stop - start], True
            start = stop

    def lookup(self, clusters: U64) -> tuple[U64, Mask]:
        """Return the refcounts of clusters anywhere, and which of them could be read."""
        slots = clusters // np.uint64(self.per_block)
        inside = slots < np.uint64(len(self.table))
        values = np.zeros(len(clusters), dtype=np.uint64)
        readable = np.full(len(clusters), self.known)
        if not inside.any():
            return values, readable
        places = np.flatnonzero(inside)
        readable[places] = ~self.unreadable[slots[places]]
        blocks = self.offsets[slots[places]]
        blocks[~readable[places]] = 0
        blocks[blocks >= np.uint64(self._image.file_size)] = 0  # zeros, however many there are
        order = np.argsort(blocks, kind="stable")
        starts = run_starts(blocks[order])
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True):
            offset = int(blocks[order[start]])
            if offset:
                here = places[order[start:stop]]
                values[here] = self.block(offset)[clusters[here] % np.uint64(self.per_block)]
        return values, readable

    def entry_offset(self, cluster: int) -> int | None:
        """Return the file offset of the byte where a cluster's refcount begins, None without a block."""
        slot, index = divmod(cluster, self.per_block)
        if slot >= len(self.table) or self.unreadable[slot] or not self.offsets[slot]:
            return None
        return int(self.offsets[slot]) + index * self.bits // 8

    def slot_offset(self, slot: int) -> int:
        """Return the file offset of a refcount table entry."""
        return self._image.header.refcount_table_offset + slot * 8


def decode(data: bytes, bits: int) -> Block:
    """Return the refcounts in a block; narrow ones are packed from the lowest bit up."""
    if bits >= 8:
        return np.frombuffer(data, dtype=f">u{bits // 8}").astype(f"u{bits // 8}")
    packed = np.frombuffer(data, dtype=np.uint8)
    per_byte = 8 // bits
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    return ((packed[:, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(-1)
