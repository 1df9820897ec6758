"""What a volume is, by its signatures."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

HEAD = 256 << 10  # bytes at the start of a volume that are looked at


class Signature(NamedTuple):
    """A kind of volume. ``holds_files`` is False for what no file can be in."""

    name: str
    holds_files: bool = True


def _at(offset: int, mark: bytes) -> Callable[[bytes], bool]:
    return lambda head: head[offset : offset + len(mark)] == mark


def _lvm2(head: bytes) -> bool:
    return any(_at(sector * 512, b"LABELONE")(head) for sector in range(4))


def _swap(head: bytes) -> bool:
    ends = (4096, 8192, 16384, 32768, 65536)
    return any(head[end - 10 : end] in (b"SWAPSPACE2", b"SWAP-SPACE") for end in ends)


def _zfs(head: bytes) -> bool:
    marks = (struct.pack("<Q", 0xBAB10C), struct.pack(">Q", 0xBAB10C))
    return any(head[at : at + 8] in marks for at in range(128 << 10, 256 << 10, 1024))


def _grub(head: bytes) -> bool:
    """Whether the first sector loads the rest of GRUB: its code differs by version, its messages do not."""
    return b"loading\0.\0\r\n\0Geom\0Read\0 Error\0" in head[:512]


_SIGNATURES: tuple[tuple[Signature, Callable[[bytes], bool]], ...] = (
    (Signature("LUKS"), _at(0, b"LUKS\xba\xbe")),
    (Signature("LVM2"), _lvm2),
    (Signature("BitLocker"), _at(3, b"-FVE-FS-")),
    (Signature("BitLocker"), _at(424, bytes.fromhex("3bd66749292ed84a8399f6a339e3d001"))),
    (Signature("XFS"), _at(0, b"XFSB")),
    (Signature("btrfs"), _at(0x10040, b"_BHRfS_M")),
    (Signature("f2fs"), _at(1024, b"\x10\x20\xf5\xf2")),
    (Signature("bcachefs"), _at(4120, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81"))),
    (Signature("bcachefs"), _at(4120, bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef"))),
    (Signature("APFS"), _at(32, b"NXSB")),
    (Signature("ReFS"), _at(3, b"ReFS\0")),
    (Signature("ZFS"), _zfs),
    (Signature("Linux RAID"), _at(4096, b"\xfc\x4e\x2b\xa9")),
    (Signature("Linux RAID"), _at(0, b"\xfc\x4e\x2b\xa9")),
    (Signature("JFS"), _at(0x8000, b"JFS1")),
    (Signature("ReiserFS"), _at(0x10034, b"ReIsEr")),
    (Signature("NILFS2"), _at(1030, b"\x34\x34")),
    (Signature("EROFS"), _at(1024, b"\xe2\xe1\xf5\xe0")),
    (Signature("squashfs"), _at(0, b"hsqs")),
    (Signature("VDO"), _at(0, b"dmvdo001")),
    (Signature("dm-verity"), _at(0, b"verity\0\0")),
    (Signature("NTFS"), _at(3, b"NTFS    ")),
    (Signature("exFAT"), _at(3, b"EXFAT   ")),
    (Signature("HFS+"), _at(1024, b"H+\0\x04")),
    (Signature("HFSX"), _at(1024, b"HX\0\x05")),
    (Signature("ext"), _at(1080, b"\x53\xef")),
    (Signature("swap", holds_files=False), _swap),
    (Signature("GRUB core image", holds_files=False), _grub),
)


def signature_of(head: bytes) -> Signature | None:
    """Return what the first :data:`HEAD` bytes of a volume say it is, None when nothing known."""
    return next((signature for signature, is_one in _SIGNATURES if is_one(head)), None)
