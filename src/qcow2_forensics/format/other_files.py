"""What a file is that was taken for a QCOW image: for the message that refuses it."""

from __future__ import annotations

_DISK = "a disk image of another format: convert a copy with qemu-img, or read it with its own tools"
_PACKED = "decompress it first"

# Offset, bytes there, what the file is, what to do with it.
_SIGNATURES = (
    (0, b"\x1f\x8b", "compressed with gzip", _PACKED),
    (0, b"\xfd7zXZ\0", "compressed with xz", _PACKED),
    (0, b"BZh", "compressed with bzip2", _PACKED),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", _PACKED),
    (0, b"PK\x03\x04", "a ZIP archive", "unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it first"),
    (0, b"KDMV", "VMDK", _DISK),
    (0, b"COWD", "VMDK", _DISK),
    (0, b"# Disk DescriptorFile", "VMDK", _DISK),
    (0, b"vhdxfile", "VHDX", _DISK),
    (0, b"conectix", "VHD", _DISK),
    (64, b"\x7f\x10\xda\xbe", "VDI", _DISK),
    (0, b"QED\0", "QED", _DISK),
    (0, b"EVF\x09\x0d\x0a\xff\0", "an EWF (E01) image", "open what is inside it with libewf"),
    (0, b"LUKS\xba\xbe", "a LUKS volume", "there is no QCOW image around it"),
    (0, b"QEVM", "a QEMU memory stream, not a disk", "qcow2-forensics memory reads it"),
    (510, b"\x55\xaa", "a raw disk, it seems", "other tools read it directly"),
)


def described(head: bytes) -> str:
    """Return what a file is and what to do with it, by its first 512 bytes; the bytes that are missing otherwise."""
    for offset, magic, what, todo in _SIGNATURES:
        if head[offset : offset + len(magic)] == magic:
            return f"{what}; {todo}"
    return "it does not begin with the bytes 51 46 49 fb"
