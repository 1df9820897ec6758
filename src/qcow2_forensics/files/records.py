"""Names in a file system as plain data: what one looks like, where its bytes are, how old it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

SECOND = 1_000_000_000  # nanoseconds, in which all times are
NTFS_FILE_NAME = 48  # the attribute that holds a name and times of its own
RESOURCE_FORK = "rsrc"  # the stream of HFS+ and APFS, by the name that dfVFS gives it


class Span(NamedTuple):
    """Bytes of the disk."""

    offset: int
    length: int


Place = tuple[int, str]  # what stays of a volume between two states: its offset, and its name inside that


@dataclass(frozen=True, slots=True)
class Volume:
    """Where a file system is and what it is.

    ``number`` counts partitions from 1, 0 is the whole disk; ``offset`` is in bytes of the disk.
    ``inside`` leads from the partition to a volume nested in it (``/vg0/root``). ``backend`` is the
    library that reads it.
    """

    number: int
    offset: int
    description: str
    kind: str
    inside: str = ""
    backend: str = ""

    @property
    def prefix(self) -> str:
        """What goes before paths: ``/p1``, nothing for the whole disk."""
        return (f"/p{self.number}" if self.number else "") + self.inside

    @property
    def place(self) -> Place:
        """What identifies the volume in every state of its disk."""
        return self.offset, self.inside


class Times(NamedTuple):
    """Nanoseconds of the epoch, 0 for none: content, access, metadata, creation."""

    modified: int = 0
    accessed: int = 0
    changed: int = 0
    created: int = 0


_NO_TIMES = Times()


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One name (or one data stream of it) in one state; text is as stored, not escaped.

    ``allocated`` is about the name, ``in_use`` about the metadata it points to: a deleted name
    whose metadata is in use again says nothing about the old file. ``spans`` are the disk bytes of
    the content; ``resident`` content is inside the metadata instead, which is in the bytes ``metadata``
    where they are known, and ``sparse`` content is nowhere.
    ``has_metadata`` is False where nothing but the name is left.
    """

    volume: Volume
    path: str
    inode: int
    name_type: str
    allocated: bool
    has_metadata: bool = False
    type: str = "-"
    in_use: bool = False
    size: int = 0
    mode: int = 0
    uid: int = 0
    gid: int = 0
    times: Times = _NO_TIMES
    sequence: int = 0
    link: str = ""
    attribute: tuple[int, int] | None = None
    stream: str = ""
    spans: tuple[Span, ...] = ()
    resident: bool = False
    metadata: tuple[Span, ...] = ()
    sparse: bool = False

    @property
    def full_path(self) -> str:
        """The path with its stream, and its partition in front."""
        return f"{self.volume.prefix}{self.path}{f':{self.stream}' if self.stream else ''}"

    @property
    def virtual(self) -> bool:
        """Whether The Sleuth Kit made the entry up (``$OrphanFiles``, ``$MBR``)."""
        return self.name_type in "vV"

    @property
    def is_kept(self) -> bool:
        """Whether it is the name of a file in use, and not made up."""
        return self.allocated and not self.virtual

    @property
    def is_deleted(self) -> bool:
        """Whether it is a name that was deleted, and not made up."""
        return not self.allocated and not self.virtual

    @property
    def of_name(self) -> bool:
        """Whether the times are those that NTFS keeps with the name, not those of the file."""
        return self.attribute is not None and self.attribute[0] == NTFS_FILE_NAME

    @property
    def address(self) -> str:
        """The inode as The Sleuth Kit's tools take it: ``17``, or ``64-128-2`` on NTFS."""
        return str(self.inode) if self.attribute is None else f"{self.inode}-{self.attribute[0]}-{self.attribute[1]}"
