"""The files of one state: every name The Sleuth Kit finds, as plain records, and their bytes.

The walk follows ``fls -r``: the same entries, deleted ones and orphans included, one record per data
stream where NTFS has several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytsk3

from ..limits import FILE_BYTES, ORPHAN_INODES
from ..text import decoded
from .ntfs_records import RecordPlaces, name_times, record_size
from .orphans import orphans
from .partitions import partitions
from .protocol import FileSystem, NoFileSystem
from .records import RESOURCE_FORK, FileRecord, Span, Times, Volume
from .stored_times import StoredTimes

if TYPE_CHECKING:
    from .readers import Reader

# Letters as The Sleuth Kit prints them, by its enumeration values.
_NAME_LETTERS = "-pcdbrlshwvV"
_META_LETTERS = "-rdpcblhswvV"
_NTFS_DATA, _NTFS_INDEX = 128, 144
_NO_TIMES = Times()
_VIRTUAL_DIRECTORY = 11  # a name made up by The Sleuth Kit
_UNALLOCATED = 2  # flag of names and of metadata
_RESIDENT = 4  # flag of an attribute whose bytes are in the metadata
_NO_BLOCKS = 3  # flags of a run: filler or sparse


class SleuthKitFileSystem(FileSystem):
    """A file system that The Sleuth Kit reads; ``handle`` is its ``FS_Info``.

    ``reader`` is the volume, when the image is one and not the disk that the volume is on.
    """

    failures = (OSError, RuntimeError)  # the second is what pytsk3 makes of an exception from the image

    def __init__(
        self, image: pytsk3.Img_Info, volume: Volume, handle: pytsk3.FS_Info, reader: Reader | None = None
    ) -> None:
        # An image of pytsk3's own keeps no record.
        super().__init__(volume, getattr(image, "read_errors", ()), getattr(image, "unreadable", ()))
        self.image = image
        self.handle = handle
        self._reader = reader
        self._named: set[int] = set()  # inodes that names lead to
        self._block = int(handle.info.block_size)
        self._largest = max(FILE_BYTES, 4 * int(image.get_size()))
        self._ntfs = volume.kind == "ntfs"
        self._start = 0 if reader else volume.offset  # in the image
        self._records: RecordPlaces | None = None
        self._times = StoredTimes(image, self._start, volume.kind, partial(self.note_problem, "", deleted=True))
        # Where a run's address is no place on the disk.
        self._placed = volume.kind not in ("logical", "yaffs2")

    # --- listing -----------------------------------------------------------------------------

    def _listed(self) -> Iterator[FileRecord]:
        root = int(self.handle.info.root_inum)
        self._named = set()
        self._visits.enter(root, again=False)
        yield from self._walk(self._directory(root, "/"), "", (root,))

    def _directory(self, inode: int, path: str, *, deleted: bool = False) -> list[pytsk3.File]:
        try:
            return list(self.handle.open_dir(inode=inode))
        except (OSError, RuntimeError) as error:
            self.note_problem(path, error, deleted=deleted)
            return []

    def _orphans(self, inode: int, path: str) -> list[Any]:
        """Return the entries of a folder that The Sleuth Kit makes up, or what would be in it where that fails."""
        try:
            return list(self.handle.open_dir(inode=inode))
        except (OSError, RuntimeError) as error:
            if int(self.handle.info.last_inum) > ORPHAN_INODES:
                self.note_problem(path, error, deleted=True)
            return list(orphans(self.handle, self._named, ORPHAN_INODES))

    def _walk(
        self,
        entries: list[pytsk3.File],
        path: str,
        above: tuple[int, ...],
        *,
        orphans: bool = False,
        again: bool = False,
    ) -> Iterator[FileRecord]:
        for entry in entries:
            name = entry.info.name
            if name is None or name.name in (b".", b".."):
                continue
            inode = int(name.meta_addr)
            here = f"{path}/{decoded(name.name)}"
            held = entry if entry.info.meta is not None else self._metadata(name, here, orphans) or entry
            meta = held.info.meta
            self._visits.count(again)
            self._named.add(inode)
            yield from self._of_entry(name, held, here)
            if meta is None or not _is_directory(name, meta) or inode in above:
                continue
            if self._is_too_deep(here, above):
                continue
            if self._is_listed_enough(here, inode, again):
                if again:
                    return  # the names that follow are listed elsewhere
                continue
            made_up = int(name.type) == _VIRTUAL_DIRECTORY
            if made_up and self._visits.is_cut:  # The Sleuth Kit would walk every path to find what has none
                self.note_problem(here, OSError("not looked for, because folders are shared"))
                continue
            listed_again = self._visits.enter(inode, again)
            deleted = bool(int(name.flags) & _UNALLOCATED)
            below = self._orphans(inode, here) if made_up else self._directory(inode, here, deleted=deleted)
            yield from self._walk(below, here, (*above, inode), orphans=made_up, again=listed_again)

    def _metadata(self, name: Any, path: str, orphan: bool) -> pytsk3.File | None:
        """Return the metadata of a name that The Sleuth Kit does not give with it, None when it is not this file's.

        Names made up for orphans come without. So does a deleted name on NTFS whose record was freed,
        which counts its sequence number up by one: until the record is used again the file is still in it.
        """
        deleted = self._ntfs and bool(int(name.flags) & _UNALLOCATED) and int(name.meta_addr) > 0
        if not orphan and not deleted:
            return None
        try:
            held = self.handle.open_meta(inode=int(name.meta_addr))
        except (OSError, RuntimeError) as error:
            if orphan:
                self.note_problem(path, error, deleted=True)
            return None
        meta = held.info.meta
        if orphan or meta is None:
            return held
        freed = int(meta.flags) & _UNALLOCATED and int(meta.seq) == int(name.meta_seq) % 0xFFFF + 1
        return held if freed else None

    def _of_entry(self, name: Any, entry: pytsk3.File, path: str) -> Iterator[FileRecord]:
        meta = entry.info.meta
        if meta is None:
            yield self._record(name, None, path, None)
            return
        attributes = self._attributes(entry, path)
        times = self._times.of(entry, attributes)
        if not self._ntfs:
            content = next((item for item in attributes if int(item.info.type) in _CONTENT_TYPES), None)
            yield self._record(name, meta, path, content, times)
            for attribute in attributes:
                if int(attribute.info.type) == _RESOURCE_FORK and int(attribute.info.size):
                    yield self._record(name, meta, path, attribute, times)
            return
        streams = 0
        for attribute in attributes:
            kind = int(attribute.info.type)
            if kind in (_NTFS_DATA, _NTFS_INDEX):
                streams += 1
                record = self._record(name, meta, path, attribute, times)
                places = self._metadata_places(entry, record.inode, attributes) if record.resident else ()
                yield replace(record, metadata=places) if places else record
        if not streams:
            yield self._record(name, meta, path, None, times)
        for attribute, kept in name_times(entry, name, attributes):
            yield self._record(name, meta, path, attribute, kept)

    def _metadata_places(self, entry: pytsk3.File, inode: int, attributes: list[pytsk3.Attribute]) -> tuple[Span, ...]:
        """Return where the records of a file on NTFS are."""
        try:
            if self._records is None:
                table = next(item for item in self.handle.open_meta(inode=0) if int(item.info.type) == _NTFS_DATA)
                size = record_size(self.image.read(self._start, 512), self._block)
                self._records = RecordPlaces(self._spans(table, "/$MFT") or (), size)
            return tuple(self._records.of_file(entry, inode, attributes))
        except (OSError, RuntimeError, StopIteration) as error:
            self.note_problem("/$MFT", error)
            return ()

    def _attributes(self, entry: pytsk3.File, path: str) -> list[pytsk3.Attribute]:
        try:
            return list(entry)
        except (OSError, RuntimeError) as error:
            self.note_problem(path, error)
            return []

    def _record(self, name: Any, meta: Any, path: str, attribute: Any, times: Times = _NO_TIMES) -> FileRecord:
        fields: dict[str, Any] = {}
        if meta is not None:
            kind = _letter(_META_LETTERS, int(meta.type))
            fields = {
                "has_metadata": True,
                "type": kind,
                "in_use": not int(meta.flags) & _UNALLOCATED,
                "size": int(meta.size),
                "mode": int(meta.mode),
                "uid": int(meta.uid),
                "gid": int(meta.gid),
                "times": times,
                "sequence": int(meta.seq),
                "link": decoded(meta.link or b"") if kind == "l" else "",
            }
            if attribute is not None:
                fields |= self._content(attribute, path)
        return FileRecord(
            volume=self.volume,
            path=path,
            inode=int(name.meta_addr),
            name_type=_letter(_NAME_LETTERS, int(name.type)),
            allocated=not int(name.flags) & _UNALLOCATED,
            **fields,
        )

    def _content(self, attribute: Any, path: str) -> dict[str, Any]:
        """Return the fields of a record that are about the content in an attribute."""
        info = attribute.info
        resident = bool(int(info.flags) & _RESIDENT)
        spans = self._spans(attribute, path)
        sparse = self._placed and not resident and spans == ()
        fields: dict[str, Any] = {"resident": resident, "spans": spans or (), "sparse": sparse}
        number, stream = int(info.type), decoded(info.name or b"")
        if number == _RESOURCE_FORK:
            stream = RESOURCE_FORK
        elif not self._ntfs:
            return fields
        elif number == _NTFS_INDEX and stream == "$I30":
            stream = ""
        return {**fields, "attribute": (number, int(info.id)), "size": int(info.size), "stream": stream}

    def _spans(self, attribute: pytsk3.Attribute, path: str) -> tuple[Span, ...] | None:
        if int(attribute.info.flags) & _RESIDENT or not self._placed:
            return None
        try:
            runs = [(int(run.addr), int(run.len)) for run in attribute if not int(run.flags) & _NO_BLOCKS]
        except (OSError, RuntimeError) as error:
            self.note_problem(path, error)
            return None
        blocks = ((at * self._block, count * self._block) for at, count in runs)
        if self._reader is None:
            return tuple(Span(self.volume.offset + at, length) for at, length in blocks)
        return tuple(span for at, length in blocks for span in self._reader.place(at, length))

    # --- content -----------------------------------------------------------------------------

    def _opened(self, record: FileRecord) -> Callable[[int, int], bytes]:
        """Return what reads the content of a record.

        A file that claims to be several times larger than the disk is not read: it would be
        zeros, for hours.
        """
        if record.size > self._largest:
            raise OSError(f"its size, {record.size} bytes, is more than is read of a disk this large")
        handle = self.handle.open_meta(inode=record.inode)
        attribute = record.attribute or ()
        return lambda offset, length: bytes(handle.read_random(offset, length, *attribute))

    def read(self, path: str) -> bytes:
        """Return the content of one file by its path inside this file system. For small files."""
        handle = self.handle.open(path)
        return bytes(handle.read_random(0, int(handle.info.meta.size))) if int(handle.info.meta.size) else b""


def file_systems(image: pytsk3.Img_Info, name: str = "the disk") -> list[SleuthKitFileSystem]:
    """Return every file system of a state: one per partition that holds one, or the whole disk's.

    Raises :class:`NoFileSystem` naming the partitions that were looked at.
    """
    found: list[SleuthKitFileSystem] = []
    looked: list[str] = []

    def look_at(number: int, offset: int, description: str) -> None:
        handle = open_file_system(image, offset)
        if handle is not None:
            found.append(SleuthKitFileSystem(image, Volume(number, offset, description, kind_of(handle)), handle))

    for part in partitions(image):
        looked.append(str(part))
        look_at(part.number, part.offset, part.description)
    if not found:
        look_at(0, 0, "")
    if not found:
        raise NoFileSystem.found_in(name, looked, getattr(image, "read_errors", ()))
    return found


def open_file_system(image: pytsk3.Img_Info, offset: int) -> pytsk3.FS_Info | None:
    """Return the file system at an offset, None when The Sleuth Kit finds none there."""
    if offset >= image.get_size():
        return None
    try:
        return pytsk3.FS_Info(image, offset)
    except (OSError, RuntimeError):
        return None


_KIND_NAMES = (
    *("NTFS", "FAT12", "FAT16", "FAT32", "EXFAT", "FFS1", "FFS2", "EXT2", "EXT3", "EXT4"),
    *("HFS", "ISO9660", "APFS", "YAFFS2", "LOGICAL", "SWAP", "RAW"),
)
_RESOURCE_FORK = 4353  # of HFS+
_CONTENT_TYPES = frozenset((1, _NTFS_DATA, 4352))  # default, data, and that of HFS files


def kind_of(handle: pytsk3.FS_Info) -> str:
    """Return the kind of a file system: ``ntfs``, ``ext4``."""
    value = int(handle.info.ftype)
    for name in _KIND_NAMES:
        known = getattr(pytsk3, f"TSK_FS_TYPE_{name}", None)
        if known is not None and int(known) == value:
            return name.lower()
    return f"type {value}"


def _letter(letters: str, value: int) -> str:
    return letters[value] if 0 <= value < len(letters) else "-"


def _is_directory(name: Any, meta: Any) -> bool:
    """Whether ``fls -r`` would go into this entry."""
    if int(name.type) not in (0, 3, 11) or int(meta.type) not in (2, 11):
        return False
    return not int(name.flags) & _UNALLOCATED or bool(int(meta.flags) & _UNALLOCATED)
