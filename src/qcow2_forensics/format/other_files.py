"""What a file is that was taken for a QCOW image, or for a raw disk, by its first bytes."""

from __future__ import annotations

from typing import NamedTuple

_DISK = "a disk image of another format: convert a copy with qemu-img, or read it with its own tools"
_PACKED = "decompress it first"


class _Kind(NamedTuple):
    """A kind of file: the bytes at an offset, what it is, what to do with it, and QEMU's name of the format if it has one."""

    offset: int
    magic: bytes
    what: str
    todo: str = _DISK
    name: str = ""


_KINDS = (
    _Kind(0, b"\x1f\x8b", "compressed with gzip", _PACKED),
    _Kind(0, b"\xfd7zXZ\0", "compressed with xz", _PACKED),
    _Kind(0, b"BZh", "compressed with bzip2", _PACKED),
    _Kind(0, b"\x28\xb5\x2f\xfd", "compressed with zstd", _PACKED),
    _Kind(0, b"PK\x03\x04", "a ZIP archive", "unpack it first"),
    _Kind(0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it first"),
    _Kind(0, b"KDMV", "VMDK", name="vmdk"),
    _Kind(0, b"COWD", "VMDK", name="vmdk"),
    _Kind(0, b"# Disk DescriptorFile", "VMDK"),  # which of them QEMU takes for one, ``reader.foreign`` says
    _Kind(0, b"vhdxfile", "VHDX", name="vhdx"),
    _Kind(0, b"conectix", "VHD", name="vpc"),
    _Kind(64, b"\x7f\x10\xda\xbe", "VDI", name="vdi"),
    _Kind(0, b"QED\0", "QED", name="qed"),
    _Kind(0, b"WithoutFreeSpace", "Parallels", name="parallels"),
    _Kind(0, b"WithouFreSpacExt", "Parallels", name="parallels"),
    _Kind(0, b"Bochs Virtual HD Image", "Bochs", name="bochs"),
    _Kind(0, b"#!/bin/sh\n#V2.0 Format\n", "cloop", name="cloop"),
    _Kind(0, b"EVF\x09\x0d\x0a\xff\0", "an EWF (E01) image", "open what is inside it with libewf"),
    _Kind(0, b"LUKS\xba\xbe", "a LUKS volume", "there is no QCOW image around it", "luks"),
    _Kind(0, b"QEVM", "a QEMU memory stream, not a disk", "qcow2-forensics memory reads it"),
    _Kind(510, b"\x55\xaa", "a raw disk, it seems", "other tools read it directly"),
)


def _matching(head: bytes) -> list[_Kind]:
    return [kind for kind in _KINDS if head[kind.offset : kind.offset + len(kind.magic)] == kind.magic]


def described(head: bytes) -> str:
    """Return what a file is and what to do with it, by its first 512 bytes; the bytes that are missing otherwise."""
    found = _matching(head)
    return f"{found[0].what}; {found[0].todo}" if found else "it does not begin with the bytes 51 46 49 fb"


def format_of(head: bytes) -> str:
    """Return QEMU's name of the format that a file is of, by its first 512 bytes; empty where there is none."""
    return next((kind.name for kind in _matching(head) if kind.name), "")
