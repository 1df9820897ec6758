"""What a virtual disk holds, by its first bytes: an ordinary disk, or perhaps a memory dump."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcow2_forensics import Source

_FIRST = 128 * 1024  # up to the magic of btrfs
_SIGNATURES = (
    (512, b"EFI PART", "a GPT partition table"),
    (4096, b"EFI PART", "a GPT partition table"),
    (0x438, b"\x53\xef", "an ext2, ext3 or ext4 file system"),
    (3, b"NTFS    ", "an NTFS file system"),
    (3, b"EXFAT   ", "an exFAT file system"),
    (3, b"ReFS\0\0\0\0", "a ReFS file system"),
    (3, b"-FVE-FS-", "a BitLocker volume"),
    (54, b"FAT1", "a FAT file system"),
    (82, b"FAT32", "a FAT file system"),
    (0, b"XFSB", "an XFS file system"),
    (0, b"LUKS\xba\xbe", "a LUKS volume"),
    (512, b"LABELONE", "an LVM physical volume"),
    (0, b"LABELONE", "an LVM physical volume"),
    (4086, b"SWAPSPACE2", "a Linux swap area"),
    (0x10040, b"_BHRfS_M", "a Btrfs file system"),
    (32, b"NXSB", "an APFS container"),
    (1024, b"H+\0\4", "an HFS+ file system"),
    (1024, b"HX\0\5", "an HFSX file system"),
    (1024, b"\x10\x20\xf5\xf2", "an F2FS file system"),
    (0, b"hsqs", "a squashfs file system"),
    (0x8001, b"CD001", "an ISO 9660 file system"),
    (4096, b"\xfc\x4e\x2b\xa9", "a Linux RAID member"),
    (0x2018, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca", "a bcache device"),
)
_PARTITION = struct.Struct("<B3xB3xII")  # status, type, first sector, sectors


def ordinary_disk(disk: Source) -> str | None:
    """Return what an ordinary disk starts with, in words; None when this may be a memory dump.

    Raises what reading the disk raises.
    """
    first = disk.read(0, _FIRST)
    if not disk.size:
        return "nothing: its size is 0"
    for offset, magic, words in _SIGNATURES:
        if first[offset : offset + len(magic)] == magic:
            return words
    if _is_partition_table(first, disk.size):
        return "an MBR partition table"
    return "only zeros" if not any(first) and _is_empty(disk) else None


def _is_partition_table(first: bytes, size: int) -> bool:
    # Interrupt vectors in a memory dump may end in 55 AA as well, but describe no partitions.
    if first[510:512] != b"\x55\xaa":
        return False
    found = 0
    for number in range(4):
        status, kind, start, sectors = _PARTITION.unpack_from(first, 446 + 16 * number)
        if status not in (0, 0x80):
            return False
        if kind and sectors and 0 < start < size // 512 + 1:
            found += 1
    return found > 0


def _is_empty(disk: Source) -> bool:
    extents = getattr(disk, "extents", None)
    return extents is not None and all(extent.kind.name in ("ZERO", "HOLE") for extent in extents())
