"""What a run of bytes looks like: how much of it is not zeros, its entropy, and the kind of file it begins."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

_SHORTEST_TEXT = 4  # bytes
_LINE_BREAKS = dict.fromkeys(map(ord, "\r\n\t"))  # not printable, and in every text
_WEAK = "boot sector"  # two bytes alone: one cluster of random bytes in 65,536 has them
NO_START = ("", _WEAK)  # what :func:`signature` returns for bytes that start no file for certain

# (offset, magic, name), most specific first. Names are what an examiner calls the thing.
SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"QEVM\0\0\0", "QEMU VM state"),
    (0, b"QFI\xfb", "QCOW2 image"),
    (0, b"KDMV", "VMDK image"),
    (0, b"vhdxfile", "VHDX image"),
    (0, b"conectix", "VHD image"),
    (0, b"QED\0", "QED image"),
    (64, b"\x7f\x10\xda\xbe", "VDI image"),
    (0, b"LUKS\xba\xbe", "LUKS header"),
    (512, b"LABELONE", "LVM label"),
    (512, b"EFI PART", "GPT"),
    (3, b"NTFS    ", "NTFS boot sector"),
    (3, b"EXFAT   ", "exFAT boot sector"),
    (3, b"-FVE-FS-", "BitLocker boot sector"),
    (82, b"FAT32   ", "FAT32 boot sector"),
    (54, b"FAT16   ", "FAT16 boot sector"),
    (0, b"XFSB", "XFS superblock"),
    (0x8001, b"CD001", "ISO 9660"),
    (0, b"FILE0\0", "NTFS file record"),
    (0, b"INDX(\0", "NTFS index"),
    (0, b"RCRD(\0", "NTFS log"),
    (0, b"\xc0\x3b\x39\x98", "ext journal block"),
    (0, b"regf", "Windows registry"),
    (0, b"hbin", "Windows registry"),
    (0, b"ElfFile\0", "Windows event log"),
    (0, b"ElfChnk\0", "Windows event log"),
    (0, b"LPKSHHRH", "systemd journal"),
    (0, b"SQLite format 3\0", "SQLite database"),
    (0, b"\x7fELF", "ELF"),
    (0, b"%PDF-", "PDF"),
    (0, b"PK\x03\x04", "ZIP"),
    (0, b"PK\x05\x06", "ZIP"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"GIF8", "GIF"),
    (0, b"\x1f\x8b\x08", "gzip"),
    (0, b"\xfd7zXZ\0", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"BZh", "bzip2"),
    (0, b"7z\xbc\xaf\x27\x1c", "7-Zip"),
    (0, b"Rar!\x1a\x07", "RAR"),
    (257, b"ustar", "tar"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "OLE document"),
    (0, b"hsqs", "SquashFS"),
    (4, b"ftyp", "MP4"),
    (0, b"-----BEGIN ", "PEM"),
    (0, b"#!/", "script"),
)
LONGEST = max(offset + len(magic) for offset, magic, _ in SIGNATURES)


class Content(NamedTuple):
    """Facts about bytes: how many are not zero, bits of entropy per byte, a signature or ``""``."""

    nonzero: int
    entropy: float
    signature: str


def describe(data: bytes) -> Content:
    """Return the facts about ``data``; signatures are looked for at its start."""
    import numpy as np  # here: triage of a clean header never gets so far

    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    return Content(len(data) - int(counts[0]), entropy_of(counts), signature(data))


def histograms(data: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return how often each byte value occurs in each group of rows of bytes: ``(groups, 256)``.

    ``groups`` is the number of each row's group, from 0 on and rising. In groups of many rows bytes are counted in pairs.
    """
    import numpy as np

    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    if len(starts) > len(data) // 8 + 1:
        places = groups[:, None] * 256 + data
        return np.bincount(places.reshape(-1), minlength=len(starts) * 256).reshape(-1, 256)
    found = np.empty((len(starts), 256), np.intp)
    for group, rows in enumerate(np.split(data, starts[1:])):
        pairs = np.bincount(rows.reshape(-1).view(np.uint16), minlength=65536).reshape(256, 256)
        found[group] = pairs.sum(axis=0) + pairs.sum(axis=1)
    return found


def entropy_of(counts: np.ndarray) -> float:
    """Return bits per byte from how often each byte value occurs."""
    return float(entropies(counts.reshape(1, -1))[0])


def entropies(counts: np.ndarray) -> np.ndarray:
    """Return the same for each row."""
    import numpy as np

    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    bits: np.ndarray = np.abs((shares * np.log2(shares, where=shares > 0, out=np.zeros_like(shares))).sum(axis=1))
    return bits


def signatures(data: np.ndarray) -> dict[int, str]:
    """Return what :func:`signature` returns for rows of bytes; rows without a signature are left out."""
    import numpy as np

    found = np.full(len(data), -1)
    for number, (offset, magic, _) in reversed([*enumerate(SIGNATURES)]):
        found[_rows_with(data, offset, magic)] = number
    weak = _rows_with(data, 0, b"MZ") | _rows_with(data, 0x438, b"\x53\xef") | _rows_with(data, 510, b"\x55\xaa")
    names = {row: SIGNATURES[number][2] for row, number in enumerate(found.tolist()) if number >= 0}
    names.update((row, signature(data[row, :LONGEST].tobytes())) for row in np.flatnonzero(weak).tolist())
    return {row: name for row, name in names.items() if name}


def _rows_with(data: np.ndarray, offset: int, magic: bytes) -> np.ndarray:
    import numpy as np

    place = data[:, offset : offset + len(magic)]
    if place.shape[1] < len(magic):
        return np.zeros(len(data), np.bool_)
    found: np.ndarray = (place == np.frombuffer(magic, np.uint8)).all(axis=1)
    return found


def signature(data: bytes) -> str:
    """Return the name of the kind of file that ``data`` begins, empty when nothing matches."""
    head = data[:LONGEST]
    if head[:2] == b"MZ" and (at := int.from_bytes(head[60:64], "little")) and head[at : at + 4] == b"PE\0\0":
        return "PE"
    if head[0x438:0x43A] == b"\x53\xef" and int.from_bytes(head[0x418:0x41C], "little") <= 6:
        return "ext superblock"  # 16 magic bits alone are weak; its block size must be sane too
    for offset, magic, name in SIGNATURES:
        if head[offset : offset + len(magic)] == magic:
            return name
    if head[510:512] == b"\x55\xaa":
        return _boot_sector(head)
    return ""


def starts_file(data: bytes) -> bool:
    """Whether ``data`` starts as a file of a known kind, by more than two bytes of it."""
    return signature(data) not in NO_START


def _boot_sector(head: bytes) -> str:
    # Weak on its own: the four partition entries must have a legal boot flag, one of them a type.
    entries = [head[at : at + 16] for at in range(446, 510, 16)]
    if all(entry[0] in (0, 0x80) for entry in entries) and any(entry[4] for entry in entries):
        return "MBR"
    return _WEAK


def preview(data: bytes) -> str:
    """Return the first sixteen bytes in hexadecimal, for evidence."""
    return data[:16].hex(" ")


class TextCheck:
    """Whether bytes, given a part at a time, are printable ASCII or UTF-8 of at least 4 bytes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._printable = True
        self._length = 0

    def add(self, part: bytes) -> None:
        """Take in the next bytes; once they are no text, nothing more is looked at."""
        if self._printable:
            self._length += len(part)
            self._printable = self._is_printable(part, final=False)

    @property
    def is_text(self) -> bool:
        """Whether everything so far is text."""
        return self._printable and self._length >= _SHORTEST_TEXT and self._is_printable(b"", final=True)

    def _is_printable(self, part: bytes, *, final: bool) -> bool:
        try:
            return self._decoder.decode(part, final).translate(_LINE_BREAKS).isprintable()
        except UnicodeDecodeError:
            return False


def is_text(data: bytes) -> bool:
    """Whether the bytes, trailing NULs aside, are printable ASCII or UTF-8 of at least 4 bytes."""
    check = TextCheck()
    check.add(data.rstrip(b"\0"))
    return check.is_text
