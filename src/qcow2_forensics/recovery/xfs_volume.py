"""The blocks that an XFS file system uses: all but the free extents in the B+trees of its allocation groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..limits import FILE_SYSTEM_GROUPS, FILE_SYSTEM_TREE_BLOCKS
from .allocation import FREE, UNKNOWN, USED, PlacedDisk, VolumeMap, forget

_HEADERS = {b"AB3B": 56, b"ABTB": 16}  # bytes before the records of a block, with and without checksums


class _Super(NamedTuple):
    start: int
    block: int
    blocks: int
    per_group: int
    groups: int
    group_bits: int
    sector: int
    log_start: int
    log_blocks: int


def xfs_map(disk: PlacedDisk, start: int) -> VolumeMap | None:
    """Return which blocks are in use of the XFS file system that starts at ``start``; None where there is none."""
    found = _superblock(disk, start)
    volume = None if found is None else disk.empty_map(start, found.block, found.blocks)
    if found is None or volume is None:
        return None
    for group in range(found.groups):
        first = group * found.per_group
        bits = volume.bits[first : first + found.per_group]
        bits[:] = USED
        for extent in _free_extents(disk, found, group):
            if extent is None:  # part of the tree is not placed: nothing is known of the group
                bits[:] = UNKNOWN
                break
            bits[extent[0] : sum(extent)] = FREE
    group, within = divmod(found.log_start, 1 << found.group_bits)
    forget(volume, [(group * found.per_group + within, found.log_blocks)])  # as much of the log as was written
    return volume


def _superblock(disk: PlacedDisk, start: int) -> _Super | None:
    data = disk.read(start, 512)
    if data is None or data[:4] != b"XFSB":
        return None
    found = _Super(
        start, _number(data, 4, 4), _number(data, 8, 8), _number(data, 84, 4), _number(data, 88, 4), data[124],
        _number(data, 102, 2), _number(data, 48, 8), _number(data, 96, 4),
    )  # fmt: skip
    sound = 512 <= found.block <= 65536 and 512 <= found.sector <= 32768 and found.per_group > 0
    return found if sound and 0 < found.groups <= FILE_SYSTEM_GROUPS and 0 < found.group_bits < 32 else None


def _free_extents(disk: PlacedDisk, found: _Super, group: int) -> Iterator[tuple[int, int] | None]:
    """Yield (first block in the group, count) of its free extents; None for a part that cannot be read or is no tree."""
    base = found.start + group * found.per_group * found.block
    head = disk.read(base + found.sector, 64)
    if head is None or head[:4] != b"XAGF" or _number(head, 8, 4) != group:
        yield None
        return
    level = _number(head, 28, 4)
    pending = [_number(head, 16, 4)]
    seen: set[int] = set()
    free = 0  # blocks in extents so far
    while pending:
        number = pending.pop()
        data = disk.read(base + number * found.block, found.block) if number not in seen else None
        header = _HEADERS.get(data[:4]) if data is not None else None
        seen.add(number)
        too_many = len(seen) + len(pending) > FILE_SYSTEM_TREE_BLOCKS
        if data is None or header is None or too_many or level > 8:
            yield None
            return
        count = _number(data, 6, 2)
        if not _number(data, 4, 2):
            for at in range(header, min(header + count * 8, len(data)), 8):
                length = _number(data, at + 4, 4)
                free += length
                if not length or free > found.per_group:  # extents of a tree never overlap
                    yield None
                    return
                yield _number(data, at, 4), length
            continue
        pointers = header + (found.block - header) // 12 * 8
        pending += [_number(data, at, 4) for at in range(pointers, min(pointers + count * 4, len(data)), 4)]


def _number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "big")
