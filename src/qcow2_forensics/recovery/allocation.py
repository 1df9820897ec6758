"""Which clusters of a disk its file systems use, read through the L2 tables that are placed already.

The table of a part of the disk stores the clusters that the file system uses there, so what a bitmap of the
file system says about a slot shows which table fits it. What is not known (no file system, a bitmap that
is not placed, blocks that are allocated and seldom written) has no say.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import Qcow2Error
from ..limits import (
    DEFAULT_LIMITS,
    FILE_SYSTEM_BLOCKS,
    PLACED_FILE_SYSTEM_BLOCKS,
    PLACED_FILE_SYSTEM_BYTES,
    Budget,
    KiB,
)
from ..reader.disk import Disk

if TYPE_CHECKING:
    from .table_contents import TableReader

Bits = npt.NDArray[np.int8]
USED, FREE, UNKNOWN = 1, 0, -1

_OPEN = 256  # tables kept open
_CALL = KiB  # what one read costs beside its bytes
_WRITTEN = 4096  # bytes that are written or left out together: a page, and what qemu-img looks at for zeros
_BYTES_PER_BLOCK = 32  # stored bytes that allow one more block in a map, which takes a byte


class VolumeMap(NamedTuple):
    """Which blocks of one file system are in use: ``bits`` has USED, FREE or UNKNOWN for each block."""

    start: int  # of the file system on the disk, in bytes
    block: int  # bytes
    bits: Bits


class Expected(NamedTuple):
    """What a file system has at a guest offset: ``matches`` says whether ``length`` bytes are that."""

    offset: int
    length: int
    matches: Callable[[bytes], bool]
    what: str


class PlacedDisk:
    """The guest's disk as far as L2 tables are placed; ``slots`` are their host offsets by slot."""

    def __init__(self, reader: TableReader, slots: dict[int, int], span: int) -> None:
        self._reader = reader
        self.slots = slots
        self._span = span
        self._disks: dict[int, Disk] = {}
        stored = reader.file_size
        most = DEFAULT_LIMITS.work_repeats * stored + PLACED_FILE_SYSTEM_BYTES
        self._reads = Budget.up_to("bytes read of file systems", most)
        most = stored // _BYTES_PER_BLOCK + PLACED_FILE_SYSTEM_BLOCKS
        self._blocks = Budget.up_to("blocks of file systems", most)

    def read(self, offset: int, length: int) -> bytes | None:
        """Return guest bytes, None where a table is missing, something cannot be read, or too much was."""
        pieces: list[bytes] = []
        if length + _CALL > self._reads.left:
            return None
        self._reads.spend(length + _CALL)
        while length > 0:
            slot, inside = divmod(offset, self._span)
            take = min(length, self._span - inside)
            if slot not in self.slots:
                return None
            try:
                data = self._disk(slot).read(inside, take)
            except (Qcow2Error, OSError):
                return None
            if len(data) < take:
                return None
            pieces.append(data)
            offset += take
            length -= take
        return b"".join(pieces)

    def takes(self, blocks: int) -> bool:
        """Whether a file system of so many blocks can still be looked at; they are counted then."""
        if not 0 < blocks <= min(FILE_SYSTEM_BLOCKS, self._blocks.left):
            return False
        self._blocks.spend(blocks)
        return True

    def empty_map(self, start: int, block: int, blocks: int) -> VolumeMap | None:
        """Return a map of which nothing is known yet; None for a size that nobody has, or where maps are too large."""
        return VolumeMap(start, block, np.full(blocks, UNKNOWN, np.int8)) if self.takes(blocks) else None

    def _disk(self, slot: int) -> Disk:
        if slot not in self._disks:
            if len(self._disks) >= _OPEN:
                self._disks.pop(next(iter(self._disks)))
            self._disks[slot] = self._reader.disk(self.slots[slot])
        return self._disks[slot]


def set_bits(volume: VolumeMap, first: int, bitmap: bytes) -> None:
    """Take what a bitmap, its lowest bit first, says about the blocks from ``first`` on."""
    bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little").astype(np.int8)
    room = volume.bits[first : first + len(bits)]
    room[:] = bits[: len(room)]


def forget(volume: VolumeMap, runs: Iterable[tuple[int, int]]) -> None:
    """Say nothing about runs (first block, count): allocated, and seldom written."""
    for first, count in runs:
        volume.bits[max(0, first) : max(0, first + count)] = UNKNOWN


def cluster_use(volumes: list[VolumeMap], slots: list[int], span: int, cluster: int) -> Bits:
    """Return (slots, clusters of a table) which clusters hold something that is in use."""
    per_slot = span // cluster
    use = np.full((len(slots), per_slot), UNKNOWN, np.int8)
    rows = sorted(range(len(slots)), key=slots.__getitem__)
    ordered = [slots[row] for row in rows]
    for volume in volumes:
        last = volume.start + len(volume.bits) * volume.block - 1
        first = bisect_left(ordered, volume.start // span)
        for row in rows[first : bisect_right(ordered, last // span)]:
            for column, value in _clusters(volume, slots[row] * span, span, cluster):
                part = use[row, column : column + len(value)]
                np.maximum(part, value, out=part)
    if cluster < _WRITTEN:  # what is free beside something that may be stored may be stored with it
        together = use.reshape(len(slots), -1, _WRITTEN // cluster)
        mixed = (together != FREE).any(axis=2, keepdims=True)
        together[mixed & (together == FREE)] = UNKNOWN
    return use


def _clusters(volume: VolumeMap, begin: int, span: int, cluster: int) -> Iterator[tuple[int, Bits]]:
    """Yield the first cluster of a range that a volume describes, and its bits for it and the next."""
    unit = min(cluster, volume.block)
    first, last = max(begin, volume.start), min(begin + span, volume.start + len(volume.bits) * volume.block)
    if first >= last:
        return
    places = np.arange(first, last, unit)
    bits = volume.bits[(places - volume.start) // volume.block]
    groups = (places - begin) // cluster
    column = int(groups[0])
    value = np.full(int(groups[-1]) - column + 1, UNKNOWN, np.int8)
    np.maximum.at(value, groups - column, bits)
    # A cluster of which one block is unknown and the others are free may be stored for that one.
    unknown = np.zeros(len(value), np.bool_)
    np.logical_or.at(unknown, groups - column, bits == UNKNOWN)
    value[(value == FREE) & unknown] = UNKNOWN
    yield column, value
