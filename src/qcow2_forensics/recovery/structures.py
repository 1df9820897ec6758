"""What single sectors of a disk say by themselves: partition tables, superblocks, labels of volumes inside partitions."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import NamedTuple

from ..format.header import SECTOR
from ..limits import PARTITIONS_LOOKED_AT

EXTENDED_TYPES = (0x05, 0x0F, 0x85)
_HOLDING_TYPES = (0x8E, 0xFD)  # LVM, Linux RAID
_HOLDING_GUIDS = (
    bytes.fromhex("79d3d6e607f5c244a23c238f2a3df928"),  # LVM
    bytes.fromhex("0f889da1fc053b4da006743f0f84911e"),  # Linux RAID
)
_MD_MAGIC = b"\xfc\x4e\x2b\xa9"
MDA_MAGIC = b" LVM2 x[5A%r0N*>"


class PartitionRange(NamedTuple):
    """A partition in bytes. ``holds_volumes`` says that by its type there is no file system in it but LVM or a RAID member."""

    start: int
    length: int
    is_extended: bool = False
    holds_volumes: bool = False


class LogicalPartition(NamedTuple):
    """What a table of an extended partition says, in sectors: the partition from the table on, the next table from the first on."""

    first: int
    length: int
    next: int  # 0 for none


class Raid(NamedTuple):
    """Superblock (version 1) of a member of a Linux RAID, in bytes from the start of the member."""

    level: int
    superblock: int
    data: int
    data_size: int


class LvmLabel(NamedTuple):
    """Label of an LVM2 physical volume: where it is in the volume, and the size of that, in bytes."""

    place: int
    size: int


def little_endian(data: bytes, at: int, size: int) -> int:
    """Return a little-endian number."""
    return int.from_bytes(data[at : at + size], "little")


def partitions(head: bytes) -> tuple[PartitionRange, ...]:
    """Return the partitions of a partition table in the first sectors of a disk, by where they start."""
    if head[510:512] != b"\x55\xaa" or head[3:11] == b"NTFS    ":
        return ()
    header, table = head[SECTOR : 2 * SECTOR], head[2 * SECTOR :]
    found: set[PartitionRange] = set()
    if header[:8] == b"EFI PART":
        size, count = little_endian(header, 84, 4), little_endian(header, 80, 4)
        if 128 <= size <= 4096:
            for at in range(0, min(min(count, PARTITIONS_LOOKED_AT) * size, len(table) - size + 1), size):
                kind = table[at : at + 16]
                if any(kind):
                    first, last = little_endian(table, at + 32, 8), little_endian(table, at + 40, 8)
                    length = max(0, last + 1 - first) * SECTOR
                    found.add(PartitionRange(first * SECTOR, length, holds_volumes=kind in _HOLDING_GUIDS))
        return tuple(sorted(found))
    for at in range(446, 510, 16):
        kind_, first, length = head[at + 4], little_endian(head, at + 8, 4), little_endian(head, at + 12, 4)
        if head[at] not in (0, 0x80):
            return ()
        if kind_ and first and length:
            found.add(PartitionRange(first * SECTOR, length * SECTOR, kind_ in EXTENDED_TYPES, kind_ in _HOLDING_TYPES))
    return tuple(sorted(found))


def logical_partition(sector: bytes) -> LogicalPartition | None:
    """Return what a table of an extended partition says, None where the sector is none."""
    if sector[510:512] != b"\x55\xaa" or any(sector[:446]) or any(sector[478:510]):
        return None
    kind, first, length = sector[450], little_endian(sector, 454, 4), little_endian(sector, 458, 4)
    if not kind or kind == 0xEE or kind in EXTENDED_TYPES or not first or not length or sector[446] not in (0, 0x80):
        return None
    if not any(sector[462:478]):
        return LogicalPartition(first, length, 0)
    following = little_endian(sector, 470, 4)
    return LogicalPartition(first, length, following) if sector[466] in EXTENDED_TYPES and following else None


def raid_member(sector: bytes) -> Raid | None:
    """Return the superblock of a RAID member, None where there is none of version 1."""
    if sector[:4] != _MD_MAGIC or little_endian(sector, 4, 4) != 1:
        return None
    level, data, size, own = (
        little_endian(sector, at, length) for at, length in ((72, 4), (128, 8), (136, 8), (144, 8))
    )
    if max(data, size, own) >= 1 << 53:
        return None
    return Raid(level, own * SECTOR, data * SECTOR, size * SECTOR)


def lvm_label(sector: bytes) -> LvmLabel | None:
    """Return the label of a physical volume, None where there is none."""
    if sector[:8] != b"LABELONE" or sector[24:32] != b"LVM2 001":
        return None
    place, header = little_endian(sector, 8, 8), little_endian(sector, 20, 4)
    return (
        LvmLabel(place * SECTOR, little_endian(sector, header + 32, 8))
        if place < 4 and 32 <= header <= SECTOR - 40
        else None
    )


def lvm_area(sector: bytes) -> int | None:
    """Return where in its physical volume a metadata area says that it starts, None where the sector starts none."""
    return little_endian(sector, 24, 8) if sector[4:20] == MDA_MAGIC else None


def is_ext(block: bytes) -> bool:
    """Whether bytes are the superblock of an ext file system."""
    log, blocks = little_endian(block, 0x18, 4), little_endian(block, 4, 4)
    return block[0x38:0x3A] == b"\x53\xef" and log <= 6 and blocks > 0 and little_endian(block, 0x20, 4) > 0


def ext_geometry(block: bytes) -> tuple[int, int, int]:
    """Return the block size, blocks per group and first data block of an ext superblock."""
    return 1024 << little_endian(block, 0x18, 4), little_endian(block, 0x20, 4), little_endian(block, 0x14, 4)


def is_ntfs(sector: bytes) -> bool:
    """Whether a sector is an NTFS boot sector."""
    return sector[3:11] == b"NTFS    " and sector[510:512] == b"\x55\xaa"


def holds_file_system(head: bytes) -> bool:
    """Whether a volume whose first bytes these are, 2 KiB at least, starts with a file system of which positions are read."""
    block = head[1024 : 1024 + SECTOR]
    first = is_ext(block) and not any(block[0x5A:0x5C])
    return head[:4] == b"XFSB" or is_ntfs(head[:SECTOR]) or first


def gpt_is_whole(head: bytes) -> bool:
    """Whether the checksum of a GPT header is right."""
    length = little_endian(head, 12, 4)
    if not 92 <= length <= SECTOR:
        return False
    return zlib.crc32(head[:16] + bytes(4) + head[20:length]) == little_endian(head, 16, 4)


def implied_sizes(first: bytes) -> Iterator[tuple[int, str]]:
    """Yield the sizes of a disk that its first sectors imply, and what implies each."""
    block = first[1024:1536]
    if first[SECTOR : SECTOR + 8] == b"EFI PART" and gpt_is_whole(first[SECTOR : 2 * SECTOR]):
        yield (little_endian(first, SECTOR + 32, 8) + 1) * SECTOR, "the GPT's backup header"
    elif is_ext(block):
        blocks = little_endian(block, 4, 4) + (little_endian(block, 0x150, 4) << 32)
        yield blocks * ext_geometry(block)[0], "the ext file system"
    elif first[:4] == b"XFSB":
        yield int.from_bytes(first[8:16], "big") * int.from_bytes(first[4:8], "big"), "the XFS file system"
    elif first[3:11] == b"NTFS    ":
        yield (little_endian(first, 40, 8) + 1) * little_endian(first, 11, 2), "the NTFS file system"
    elif first[510:512] == b"\x55\xaa":
        for at in range(446, 510, 16):
            if first[at + 4]:
                yield (
                    (little_endian(first, at + 8, 4) + little_endian(first, at + 12, 4)) * SECTOR,
                    "the end of the last partition",
                )
    elif (label := lvm_label(first[SECTOR : 2 * SECTOR])) is not None:
        yield label.size, "the LVM2 physical volume"
