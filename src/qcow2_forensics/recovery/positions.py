"""Where on the disk a cluster belongs, by file-system structures that record their own position.

::

    structure             records                        says where it is
    GPT header            MyLBA, checked by its CRC      absolutely
    MBR                   nothing: it is the first sector
    ext superblock copy   s_block_group_nr               from the start of its file system
    XFS AGF, AGI          the number of its group        from the start of its file system
    XFS inode             its number                     from the start of its file system
    NTFS boot sector      the size of the volume: it is the first sector, or its copy after the volume
    NTFS file record      its number in the MFT          from the start of its file system, by the runs of the MFT
    Btrfs superblock      bytenr                         from the start of its file system
    LVM2 label            its sector                     from the start of its physical volume
    LVM2 metadata area    where it starts                from the start of its physical volume
    RAID superblock       where it starts                from the start of the member
    logical partition     where the next table is        from the start of the extended partition

A position counted from the start of a file system needs that start (see ``volumes``). The modulus is large (the guest bytes under one L2 table), so a wrong start does
not fit by chance.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from ..format.header import SECTOR
from ..limits import PARTITIONS_LOOKED_AT, MiB
from .ntfs_volume import data_runs, with_fixups
from .slot_evidence import position_bits
from .structures import (
    LogicalPartition,
    ext_geometry,
    gpt_is_whole,
    is_ext,
    is_ntfs,
    logical_partition,
    lvm_area,
    lvm_label,
    partitions,
    raid_member,
)
from .volumes import Holds, VolumeBytes

ABSOLUTE = "GPT header"  # the structure that counts from the start of the disk
_RECORDS = (1024, 2048, 4096)  # sizes of an NTFS file record
_NTFS_VOLUMES = 8  # that are kept: copies of a boot sector, or of the record of an MFT, say the same
_MFT_RUNS = 128  # of each that are kept
_ONE_RUN = 1 << 40  # clusters
_MAGICS = [
    int.from_bytes(magic, "big")
    for magic in (b"EFI ", b"FILE", b"XAGF", b"XAGI", b"XFSB", b"LABE", b"\xfc\x4e\x2b\xa9")
]
_AREA = int.from_bytes(b" LVM", "big")  # after a checksum
_TABLE_GAP = 2 * MiB  # at most between a logical partition and the table of the next one
_DISK = VolumeBytes.at(0)
_COUNT_FROM = {
    Holds.FILE_SYSTEM: (Holds.FILE_SYSTEM, Holds.NOTHING_KNOWN),
    Holds.LOGICAL_PARTITIONS: (Holds.LOGICAL_PARTITIONS,),
    Holds.LOGICAL_VOLUMES: (Holds.LOGICAL_VOLUMES, Holds.NOTHING_KNOWN),
    Holds.MIRRORED_DATA: (Holds.MIRRORED_DATA, Holds.NOTHING_KNOWN),
}


class Position(NamedTuple):
    """A structure at ``seen``, counted from the start of an unplaced table, that belongs at ``belongs``.

    ``absolute`` positions count from the start of the disk, others from the start of a volume with such a thing
    ``inside``, which has ``size`` bytes at least, 0 where nothing says so.
    """

    seen: int
    belongs: int
    absolute: bool
    what: str
    inside: Holds = Holds.FILE_SYSTEM
    size: int = 0


class FileSystems(NamedTuple):
    """Geometry that positions are computed with, by superblocks found anywhere."""

    ext: set[tuple[int, int, int]]  # block size, blocks per group, first data block
    xfs: set[tuple[int, int, int, int, int]]  # block size, blocks per allocation group, and how inodes are numbered
    ntfs: set[tuple[int, int, int]]  # start of the MFT, size of a record and of a cluster in bytes
    mft: set[tuple[tuple[int, int], ...]]  # runs of an MFT, (first cluster, count) each, by its own record
    logical: set[LogicalPartition]  # of an extended partition


def empty() -> FileSystems:
    """Return that no file system is known yet."""
    return FileSystems(set(), set(), set(), set(), set())


def note_file_systems(known: FileSystems, sectors: bytes) -> None:
    """Add what superblocks in some bytes, which start on a sector, say about their file systems."""
    for at in sectors_with_structures(sectors):
        head = sectors[at : at + SECTOR]
        if head[:4] == b"XFSB":
            block, blocks = int.from_bytes(head[4:8], "big"), int.from_bytes(head[84:88], "big")
            if block in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536) and blocks:
                known.xfs.add((block, blocks, int.from_bytes(head[104:106], "big"), head[123], head[124]))
        elif is_ntfs(head):
            geometry = _ntfs_geometry(head)
            if geometry is not None and len(known.ntfs) < _NTFS_VOLUMES:
                known.ntfs.add(geometry)
        elif head[:4] == b"FILE" and head[0x2C:0x30] == bytes(4):
            size = int.from_bytes(head[0x1C:0x20], "little")
            runs = tuple(data_runs(with_fixups(sectors[at : at + size]))) if size in _RECORDS else ()
            if runs and len(known.mft) < _NTFS_VOLUMES:
                known.mft.add(runs[:_MFT_RUNS])
        elif is_ext(head):
            known.ext.add(ext_geometry(head))
        elif (table := logical_partition(head)) is not None and len(known.logical) < PARTITIONS_LOOKED_AT:
            known.logical.add(table)


def _ntfs_geometry(boot: bytes) -> tuple[int, int, int] | None:
    cluster = int.from_bytes(boot[11:13], "little") * boot[13]
    mft = int.from_bytes(boot[48:56], "little")
    size = int.from_bytes(boot[64:65], "little", signed=True)
    record = 1 << -size if -31 < size < 0 else size * cluster
    return (mft * cluster, record, cluster) if cluster and record in _RECORDS else None


def sectors_with_structures(data: bytes) -> list[int]:
    """Return where in ``data`` the sectors are that start like a structure that records its position."""
    whole = len(data) // SECTOR * SECTOR
    rows = np.frombuffer(data, np.uint8, count=whole).reshape(-1, SECTOR)
    magic = np.ascontiguousarray(rows[:, :4]).view(">u4")[:, 0]
    found = np.isin(magic, _MAGICS) | (magic >> 16 == 0x494E)  # "IN": an XFS inode
    found |= (rows[:, 0x38] == 0x53) & (rows[:, 0x39] == 0xEF)
    found |= (rows[:, 0x40] == ord("_")) & (rows[:, 0x41] == ord("B")) & (rows[:, 0x42] == ord("H"))
    found |= np.ascontiguousarray(rows[:, 4:8]).view(">u4")[:, 0] == _AREA
    found |= (rows[:, 510] == 0x55) & (rows[:, 511] == 0xAA) & ((rows[:, 446:510:16] & 0x7F) == 0).all(axis=1)
    found |= (rows[:, 3] == ord("N")) & (rows[:, 4] == ord("T")) & (rows[:, 5] == ord("F"))
    return [int(row) * SECTOR for row in np.flatnonzero(found)]


def positions(known: FileSystems, seen: int, data: bytes) -> Iterator[Position]:
    """Yield what structures in ``data`` say about where it belongs; ``data`` is at ``seen`` in its table."""
    for at in sectors_with_structures(data):
        head = data[at : at + SECTOR]
        place = seen + at
        magic = head[:4]
        if magic == b"EFI " and head[:8] == b"EFI PART" and gpt_is_whole(head):
            yield Position(place, int.from_bytes(head[24:32], "little") * SECTOR, True, ABSOLUTE)
        elif magic == b"FILE":
            number = int.from_bytes(head[0x2C:0x30], "little")
            yield from (Position(place, at_, False, "NTFS file record") for at_ in _record_places(known, number))
        elif is_ntfs(head):
            last = int.from_bytes(head[40:48], "little") * int.from_bytes(head[11:13], "little")
            for belongs in (0, last):
                yield Position(place, belongs, False, "NTFS boot sector", size=last)
        elif magic in (b"XAGF", b"XAGI"):
            number = int.from_bytes(head[8:12], "big")
            for block, blocks, *_ in known.xfs:
                sector = 1 if magic == b"XAGF" else 2
                yield Position(place, number * blocks * block + sector * SECTOR, False, "XFS allocation group")
        elif magic[:2] == b"IN" and head[4] == 3:
            yield from (Position(place, at_, False, "XFS inode") for at_ in _inode_places(known, head))
        elif is_ext(head):
            size, blocks, first = ext_geometry(head)
            group = int.from_bytes(head[0x5A:0x5C], "little")
            belongs = (first + group * blocks) * size if group else 1024
            yield Position(place, belongs, False, "ext superblock")
        elif head[0x40:0x48] == b"_BHRfS_M":
            yield Position(place, int.from_bytes(head[0x30:0x38], "little"), False, "Btrfs superblock")
        else:
            yield from _of_volumes(known, place, head)


def _of_volumes(known: FileSystems, place: int, head: bytes) -> Iterator[Position]:
    """Yield what a sector says that leads to the volumes inside a partition."""
    if (label := lvm_label(head)) is not None:
        yield Position(place, label.place, False, "LVM2 label", Holds.LOGICAL_VOLUMES, label.size)
    elif (area := lvm_area(head)) is not None:
        yield Position(place, area, False, "LVM2 metadata area", Holds.LOGICAL_VOLUMES)
    elif (member := raid_member(head)) is not None:
        size = member.data + member.data_size
        yield Position(place, member.superblock, False, "RAID superblock", Holds.MIRRORED_DATA, size)
    elif (table := logical_partition(head)) is not None:
        for belongs in _table_places(known, table):
            yield Position(place, belongs, False, "table of a logical partition", Holds.LOGICAL_PARTITIONS)
    elif not place and partitions(head):
        yield Position(0, 0, True, "partition table")


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


def _table_places(known: FileSystems, table: LogicalPartition) -> Iterator[int]:
    """Yield where the table of a logical partition is: its partition ends where the next table is, and the last has none."""
    places = {0} | {other.next for other in known.logical if other.next}
    if not table.next:
        yield max(places) * SECTOR
        return
    for place in places:
        if 0 <= (table.next - place - table.first - table.length) * SECTOR < _TABLE_GAP:
            yield place * SECTOR


def _inode_places(known: FileSystems, head: bytes) -> Iterator[int]:
    number = int.from_bytes(head[152:160], "big")
    for block, blocks, inode_size, per_block_bits, group_bits in known.xfs:
        group, rest = divmod(number, 1 << per_block_bits + group_bits)
        within, slot = divmod(rest, 1 << per_block_bits)
        if within < blocks:
            yield (group * blocks + within) * block + slot * inode_size


def slots(
    found: Iterable[Position], volumes: Sequence[VolumeBytes], span: int, count: int
) -> dict[int, dict[str, float]]:
    """Return which L1 slots (below ``count``) some structures of one table agree with, and which structures."""
    votes: dict[int, dict[str, float]] = {}
    candidates: dict[tuple[bool, Holds, int], Sequence[VolumeBytes]] = {}
    for position in found:
        asked = position.absolute, position.inside, position.size
        if asked not in candidates:
            candidates[asked] = _candidates(position, volumes)
        for volume in candidates[asked]:
            at = volume.place(position.belongs, SECTOR)
            index, rest = divmod((at or 0) - position.seen, span)
            if at is not None and rest == 0 and 0 <= index < count:
                votes.setdefault(index, {})[position.what] = position_bits(span)
    return votes


def _candidates(position: Position, volumes: Sequence[VolumeBytes]) -> Sequence[VolumeBytes]:
    """Return the volumes that a structure may count from.

    A file system is never larger than its volume. The label of what holds volumes says how large its own is, to the MiB.
    """
    if position.absolute:
        return (_DISK,)
    fitting = [
        volume
        for volume in volumes
        if volume.holds in _COUNT_FROM[position.inside] and (volume.length is None or volume.length >= position.size)
    ]
    if position.size and position.inside is not Holds.FILE_SYSTEM:
        own = [volume for volume in fitting if volume.is_sized(position.size)]
        return own or fitting
    return fitting
