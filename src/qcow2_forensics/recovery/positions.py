"""Where on the disk a cluster belongs, by file-system structures that record their own position.

::

    structure             records                        says where it is
    GPT header            MyLBA, checked by its CRC      absolutely
    ext superblock copy   s_block_group_nr               from the start of its file system
    XFS AGF, AGI          the number of its group        from the start of its file system
    XFS inode             its number                     from the start of its file system
    NTFS boot sector      the size of the volume: it is the first sector, or its copy after the volume
    NTFS file record      its number in the MFT          from the start of its file system, by the runs of the MFT
    Btrfs superblock      bytenr                         from the start of its file system

A position counted from the start of a file system needs that start: it is taken from the partition
table, or is 0. The modulus is large (the guest bytes under one L2 table), so a wrong start does
not fit by chance.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from ..format.header import SECTOR
from ..limits import PARTITIONS_LOOKED_AT, MiB
from .evidence import position_bits
from .ntfs_volume import data_runs, with_fixups

_STARTS = (0, 63 * SECTOR, MiB)  # where file systems start besides what a partition table names
ABSOLUTE = "GPT header"  # the structure that counts from the start of the disk
_RECORDS = (1024, 2048, 4096)  # sizes of an NTFS file record
_NTFS_VOLUMES = 8  # that are kept: copies of a boot sector, or of the record of an MFT, say the same
_MFT_RUNS = 128  # of each that are kept
_ONE_RUN = 1 << 40  # clusters
_MAGICS = [int.from_bytes(magic, "big") for magic in (b"EFI ", b"FILE", b"XAGF", b"XAGI", b"XFSB")]

ReadGuest = Callable[[int, int], bytes]  # offset in the guest range of one table, length; fewer where nothing is


class Position(NamedTuple):
    """A structure at ``seen``, counted from the start of an unplaced table, that belongs at ``belongs``.

    ``absolute`` positions count from the start of the disk, others from the start of a file system.
    """

    seen: int
    belongs: int
    absolute: bool
    what: str


class FileSystems(NamedTuple):
    """Geometry that positions are computed with, by superblocks found anywhere."""

    ext: set[tuple[int, int, int]]  # block size, blocks per group, first data block
    xfs: set[tuple[int, int, int, int, int]]  # block size, blocks per allocation group, and how inodes are numbered
    ntfs: set[tuple[int, int, int]]  # start of the MFT, size of a record and of a cluster in bytes
    mft: set[tuple[tuple[int, int], ...]]  # runs of an MFT, (first cluster, count) each, by its own record


def empty() -> FileSystems:
    """Return that no file system is known yet."""
    return FileSystems(set(), set(), set(), set())


def note_file_systems(known: FileSystems, sectors: bytes) -> None:
    """Add what superblocks in some bytes, which start on a sector, say about their file systems."""
    for at in sectors_with_structures(sectors):
        head = sectors[at : at + SECTOR]
        if head[:4] == b"XFSB":
            block, blocks = int.from_bytes(head[4:8], "big"), int.from_bytes(head[84:88], "big")
            if block in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536) and blocks:
                known.xfs.add((block, blocks, int.from_bytes(head[104:106], "big"), head[123], head[124]))
        elif head[3:11] == b"NTFS    " and head[510:512] == b"\x55\xaa":
            geometry = _ntfs_geometry(head)
            if geometry is not None and len(known.ntfs) < _NTFS_VOLUMES:
                known.ntfs.add(geometry)
        elif head[:4] == b"FILE" and head[0x2C:0x30] == bytes(4):
            size = int.from_bytes(head[0x1C:0x20], "little")
            runs = tuple(data_runs(with_fixups(sectors[at : at + size]))) if size in _RECORDS else ()
            if runs and len(known.mft) < _NTFS_VOLUMES:
                known.mft.add(runs[:_MFT_RUNS])
        elif head[0x38:0x3A] == b"\x53\xef" and _is_ext(head):
            known.ext.add(_ext_geometry(head))


def _ntfs_geometry(boot: bytes) -> tuple[int, int, int] | None:
    cluster = int.from_bytes(boot[11:13], "little") * boot[13]
    mft = int.from_bytes(boot[48:56], "little")
    size = int.from_bytes(boot[64:65], "little", signed=True)
    record = 1 << -size if -31 < size < 0 else size * cluster
    return (mft * cluster, record, cluster) if cluster and record in _RECORDS else None


def _is_ext(block: bytes) -> bool:
    log, blocks = int.from_bytes(block[0x18:0x1C], "little"), int.from_bytes(block[4:8], "little")
    return log <= 6 and blocks > 0 and int.from_bytes(block[0x20:0x24], "little") > 0


def _ext_geometry(block: bytes) -> tuple[int, int, int]:
    size = 1024 << int.from_bytes(block[0x18:0x1C], "little")
    return size, int.from_bytes(block[0x20:0x24], "little"), int.from_bytes(block[0x14:0x18], "little")


def sectors_with_structures(data: bytes) -> list[int]:
    """Return where in ``data`` the sectors are that start like a structure that records its position."""
    whole = len(data) // SECTOR * SECTOR
    rows = np.frombuffer(data, np.uint8, count=whole).reshape(-1, SECTOR)
    magic = np.ascontiguousarray(rows[:, :4]).view(">u4")[:, 0]
    found = np.isin(magic, _MAGICS) | (magic >> 16 == 0x494E)  # "IN": an XFS inode
    found |= (rows[:, 0x38] == 0x53) & (rows[:, 0x39] == 0xEF)
    found |= (rows[:, 0x40] == ord("_")) & (rows[:, 0x41] == ord("B")) & (rows[:, 0x42] == ord("H"))
    found |= (rows[:, 3] == ord("N")) & (rows[:, 4] == ord("T")) & (rows[:, 5] == ord("F"))
    return [int(row) * SECTOR for row in np.flatnonzero(found)]


def positions(known: FileSystems, seen: int, data: bytes) -> Iterator[Position]:
    """Yield what structures in ``data`` say about where it belongs; ``data`` is at ``seen`` in its table."""
    for at in sectors_with_structures(data):
        head = data[at : at + SECTOR]
        place = seen + at
        magic = head[:4]
        if magic == b"EFI " and head[:8] == b"EFI PART" and _gpt_is_whole(head):
            yield Position(place, int.from_bytes(head[24:32], "little") * SECTOR, True, ABSOLUTE)
        elif magic == b"FILE":
            number = int.from_bytes(head[0x2C:0x30], "little")
            yield from (Position(place, at_, False, "NTFS file record") for at_ in _record_places(known, number))
        elif head[3:11] == b"NTFS    " and head[510:512] == b"\x55\xaa":
            yield Position(place, 0, False, "NTFS boot sector")
            last = int.from_bytes(head[40:48], "little") * int.from_bytes(head[11:13], "little")
            yield Position(place, last, False, "NTFS boot sector")
        elif magic in (b"XAGF", b"XAGI"):
            number = int.from_bytes(head[8:12], "big")
            for block, blocks, *_ in known.xfs:
                sector = 1 if magic == b"XAGF" else 2
                yield Position(place, number * blocks * block + sector * SECTOR, False, "XFS allocation group")
        elif magic[:2] == b"IN" and head[4] == 3:
            yield from (Position(place, at_, False, "XFS inode") for at_ in _inode_places(known, head))
        elif head[0x38:0x3A] == b"\x53\xef" and _is_ext(head):
            size, blocks, first = _ext_geometry(head)
            group = int.from_bytes(head[0x5A:0x5C], "little")
            belongs = (first + group * blocks) * size if group else 1024
            yield Position(place, belongs, False, "ext superblock")
        elif head[0x40:0x48] == b"_BHRfS_M":
            yield Position(place, int.from_bytes(head[0x30:0x38], "little"), False, "Btrfs superblock")


def _record_places(known: FileSystems, number: int) -> set[int]:
    """Return where the file record with a number is; with an MFT of unknown runs, where it is if that is one run."""
    found: set[int] = set()
    for start, record, cluster in known.ntfs:
        layouts = [runs for runs in known.mft if runs[0][0] * cluster == start]
        for runs in layouts or [((start // cluster, _ONE_RUN),)]:
            ends = _ends(runs)
            vcn, inside = divmod(number * record, cluster)
            at = bisect_right(ends, vcn)
            if at < len(ends):
                lcn, count = runs[at]
                found.add((lcn + vcn - (ends[at] - count)) * cluster + inside)
    return found


@lru_cache(maxsize=2 * _NTFS_VOLUMES)
def _ends(runs: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """Return how many clusters of a file there are up to the end of each of its runs."""
    return tuple(accumulate(count for _, count in runs))


def _inode_places(known: FileSystems, head: bytes) -> Iterator[int]:
    number = int.from_bytes(head[152:160], "big")
    for block, blocks, inode_size, per_block_bits, group_bits in known.xfs:
        group, rest = divmod(number, 1 << per_block_bits + group_bits)
        within, slot = divmod(rest, 1 << per_block_bits)
        if within < blocks:
            yield (group * blocks + within) * block + slot * inode_size


def _gpt_is_whole(head: bytes) -> bool:
    length = int.from_bytes(head[12:16], "little")
    if not 92 <= length <= SECTOR:
        return False
    return zlib.crc32(head[:16] + bytes(4) + head[20:length]) == int.from_bytes(head[16:20], "little")


def file_system_starts(heads: Iterable[bytes]) -> tuple[int, ...]:
    """Return guest offsets at which file systems may start, by the first sectors under each table.

    One of them is the start of the disk: a partition table says it all, and without one a file system that
    starts there is alone. Where neither is found the usual places are all possible.
    """
    whole = False
    for head in heads:
        if starts := partitions(head):
            return starts
        whole = whole or head[:4] == b"XFSB" or head[3:11] == b"NTFS    "
        block = head[1024 : 1024 + SECTOR]
        whole = whole or (block[0x38:0x3A] == b"\x53\xef" and _is_ext(block) and not any(block[0x5A:0x5C]))
    return (0,) if whole else _STARTS


def are_known(heads: Iterable[bytes], size: int | None) -> bool:
    """Whether it is known where file systems start: by a partition table, or by one as large as the disk of ``size`` bytes.

    Where the table of the start of the disk is lost, a file system may start anywhere.
    """
    for head in heads:
        if partitions(head):
            return True
        implied = disk_size_of(lambda at, length, head=head: head[at : at + length])  # type: ignore[misc]
        if size and implied is not None and 0 <= size - implied[0] < MiB:
            return True
    return False


def partitions(head: bytes) -> tuple[int, ...]:
    """Return where the partitions of a partition table in the first sectors of a disk start."""
    if head[510:512] != b"\x55\xaa" or head[3:11] == b"NTFS    ":
        return ()
    header, table = head[SECTOR : 2 * SECTOR], head[2 * SECTOR :]
    starts: set[int] = set()
    if header[:8] == b"EFI PART":
        size, count = int.from_bytes(header[84:88], "little"), int.from_bytes(header[80:84], "little")
        if 128 <= size <= 4096:
            for at in range(0, min(min(count, PARTITIONS_LOOKED_AT) * size, len(table) - size + 1), size):
                if any(table[at : at + 16]):
                    starts.add(int.from_bytes(table[at + 32 : at + 40], "little") * SECTOR)
        return tuple(sorted(starts))
    for at in range(446, 510, 16):
        status, kind, first, length = (
            head[at],
            head[at + 4],
            *(int.from_bytes(head[p : p + 4], "little") for p in (at + 8, at + 12)),
        )
        if status not in (0, 0x80):
            return ()
        if kind and first and length:
            starts.add(first * SECTOR)
    return tuple(sorted(starts))


def slots(found: Iterable[Position], starts: Iterable[int], span: int, count: int) -> dict[int, dict[str, float]]:
    """Return which L1 slots (below ``count``) some structures of one table agree with, and which structures."""
    votes: dict[int, dict[str, float]] = {}
    for position in found:
        for start in (0,) if position.absolute else starts:
            index, rest = divmod(start + position.belongs - position.seen, span)
            if rest == 0 and 0 <= index < count:
                votes.setdefault(index, {})[position.what] = position_bits(span)
    return votes


def disk_size_of(read: ReadGuest) -> tuple[int, str] | None:
    """Return the size in bytes that the partition table or the file system on a disk implies, and what implies it."""
    first = read(0, 34 * SECTOR)
    if len(first) < 4 * SECTOR:
        return None
    if first[SECTOR : SECTOR + 8] == b"EFI PART" and _gpt_is_whole(first[SECTOR : 2 * SECTOR]):
        return (int.from_bytes(first[SECTOR + 32 : SECTOR + 40], "little") + 1) * SECTOR, "the GPT's backup header"
    sizes = []
    if first[0x438:0x43A] == b"\x53\xef" and _is_ext(first[1024:1536]):
        block = first[1024:1536]
        blocks = int.from_bytes(block[4:8], "little") + (int.from_bytes(block[0x150:0x154], "little") << 32)
        sizes.append((blocks * _ext_geometry(block)[0], "the ext file system"))
    elif first[:4] == b"XFSB":
        sizes.append((int.from_bytes(first[8:16], "big") * int.from_bytes(first[4:8], "big"), "the XFS file system"))
    elif first[3:11] == b"NTFS    ":
        sectors = int.from_bytes(first[40:48], "little") + 1
        sizes.append((sectors * int.from_bytes(first[11:13], "little"), "the NTFS file system"))
    elif first[510:512] == b"\x55\xaa":
        for at in range(446, 510, 16):
            start, length = (int.from_bytes(first[at + n : at + n + 4], "little") for n in (8, 12))
            if first[at + 4]:
                sizes.append(((start + length) * SECTOR, "the end of the last partition"))
    return max(sizes, default=None)
