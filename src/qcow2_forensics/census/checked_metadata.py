"""The metadata QEMU's check looks at, read as it reads it: past the end of the file come zeros.

The reader proper refuses a snapshot table or a bitmap it cannot trust; the check counts with
whatever is there. What makes it give up instead is collected as reasons.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ..format.bitmap_directory import BitmapFlag, read_bitmap_directory
from ..format.extensions import BITMAPS_EXTENSION, ExtensionType, parse_bitmaps_extension
from ..format.header import Crypt, padded
from ..format.header_rules import DISK, INT64_MAX, REFCOUNTS
from ..format.image import Image
from ..format.snapshot_table import SNAPSHOT_ENTRY_LENGTH, SnapshotEntry, Window, parse_snapshot_head


class Reason(NamedTuple):
    """Why QEMU's check would stop without counters, and the file offset of what stops it.

    ``header``: a rule about the header itself, so that QEMU would not even open the image;
    ``bitmap``: it is about the dirty bitmaps.
    """

    what: str
    offset: int | None
    header: bool = False
    bitmap: bool = False


class SnapshotL1(NamedTuple):
    """The L1 table of a snapshot table entry that the reader refuses and QEMU's check counts."""

    index: int  # type: ignore[assignment]  # as in SnapshotEntry
    offset: int
    l1_table_offset: int
    l1_size: int
    disk_size: int | None = None  # not known
    vm_state_size: int = 0


class BitmapPlace(NamedTuple):
    """A bitmap directory entry's table: host offset, entries, and the directory entry's offset."""

    entry_offset: int
    table_offset: int
    table_size: int
    in_use: bool


@dataclass
class MetadataLayout:
    """Where all metadata but the L2 tables is."""

    snapshots: list[SnapshotEntry | SnapshotL1] = field(default_factory=list)
    snapshot_table_length: int = 0
    short_extra: list[int] = field(default_factory=list)  # offsets of v3 entries without the extra data
    bitmap_directory: tuple[int, int] | None = None
    bitmaps: list[BitmapPlace] = field(default_factory=list)
    crypto: tuple[int, int] | None = None
    reasons: list[Reason] = field(default_factory=list)


# Header rules QEMU's check tolerates.
_TOLERATED = frozenset({"refcount_table_clusters"})


def read_layout(image: Image) -> MetadataLayout:
    """Return where the metadata is, and what would stop QEMU's check."""
    layout = MetadataLayout()
    for problem in image.header_problems:
        tolerated = problem.field in _TOLERATED and not problem.value
        if problem.blocks & {DISK, REFCOUNTS} and not tolerated:
            layout.reasons.append(Reason(problem.message, problem.offset, header=True))
    _snapshots(image, layout)
    if image.header.crypt_method == Crypt.LUKS and image.crypto_header:
        layout.crypto = image.crypto_header
    if image.bitmaps_current and image.header.version >= 3:
        _bitmaps(image, layout)
    return layout


def _snapshots(image: Image, layout: MetadataLayout) -> None:
    header, limits = image.header, image.limits
    start = header.snapshots_offset
    if header.nb_snapshots > limits.snapshots:
        layout.reasons.append(Reason("there are too many snapshots", header.offset_of("nb_snapshots")))
        return
    if start % header.cluster_size or start + header.nb_snapshots * SNAPSHOT_ENTRY_LENGTH > INT64_MAX:
        layout.reasons.append(
            Reason("the snapshot table is at an impossible offset", header.offset_of("snapshots_offset"))
        )
        return
    # What the reader parsed is taken over; QEMU's check goes on where the reader stops.
    whole = image.snapshots
    layout.snapshots += whole
    at = whole[-1].offset + whole[-1].length if whole else start
    if at - start > limits.snapshot_table_bytes:
        layout.reasons.append(Reason("the snapshot table is too large", at))
        layout.snapshot_table_length = at - start
        return
    window = Window(_ZeroTail(image))
    for index in range(len(whole), header.nb_snapshots):
        at = padded(at)
        head = parse_snapshot_head(window.read(at, SNAPSHOT_ENTRY_LENGTH))
        if head.extra_length > limits.snapshot_extra_bytes:
            layout.reasons.append(Reason(f"snapshot table entry {index} has too much extra data", at))
            break
        if header.version >= 3 and head.extra_length < 16:
            layout.short_extra.append(at)
        layout.snapshots.append(SnapshotL1(index, at, head.l1_table_offset, head.l1_size))
        at += head.total_length
        if at - start > limits.snapshot_table_bytes or at - start > 2**31 - 1:
            layout.reasons.append(Reason("the snapshot table is too large", at))
            break
    layout.snapshot_table_length = at - start


def _bitmaps(image: Image, layout: MetadataLayout) -> None:
    extension = image.extension(ExtensionType.BITMAPS)
    if extension is None:
        return
    if extension.length != BITMAPS_EXTENSION.size:
        layout.reasons.append(Reason("the bitmaps extension has a wrong size", extension.offset, bitmap=True))
        return
    facts = parse_bitmaps_extension(extension.data)
    layout.bitmap_directory = (facts.directory_offset, facts.directory_size)
    entries, problems = image.bitmaps, tuple(p for p in image.problems if p.code == "QCOW2-BITMAP-INVALID")
    if facts.directory_offset + facts.directory_size > image.file_size:  # QEMU reads zeros there
        entries, problems = read_bitmap_directory(_ZeroTail(image))
    in_use = int(BitmapFlag.IN_USE)
    layout.bitmaps += (
        BitmapPlace(entry.offset, entry.table_offset, entry.table_size, bool(entry.flags & in_use)) for entry in entries
    )
    layout.reasons += (Reason(problem.message, problem.offset, bitmap=True) for problem in problems)


class _ZeroTail:
    """An image as QEMU reads it: endless, with zeros past the end of the file."""

    def __init__(self, image: Image) -> None:
        self.header = image.header
        self.limits = image.limits
        self.file_size = INT64_MAX
        self.extension = image.extension
        self._read = image.read

    def read(self, offset: int, length: int) -> bytes:
        return self._read(offset, length).ljust(length, b"\0")
