"""Volumes and files through dfVFS: XFS, APFS, LUKS, BitLocker. Imported only where dfVFS is wanted.

dfVFS opens everything by a path specification. A volume of ours is one of type FAKE whose file object is put
into the cache of a resolver context of its own, so nothing is registered with dfVFS and nothing of the
process is changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from dfvfs.helpers import source_scanner
from dfvfs.lib import definitions
from dfvfs.lib import errors as dfvfs_errors
from dfvfs.path import factory
from dfvfs.resolver import context, resolver
from dfvfs.resolver_helpers import manager as _helpers  # noqa: F401 - registers every kind of volume

from ..errors import Qcow2Error
from ..text import decoded
from .protocol import FileSystem, first_line
from .readers import Reader, ReaderOver
from .records import RESOURCE_FORK, SECOND, FileRecord, Span, Times, Volume
from .xfs_inodes import stored_times

_WINDOW = 64 << 10  # bytes read at once where a library asks for a few; a power of two
_MOST_IN_DOUBT = 1000  # files of which is reported that a time may be wrong
_FRACTIONS = {"10ms": 10_000_000, "1ms": 1_000_000, "1us": 1000, "100ns": 100, "1ns": 1}
_FAILURES = (OSError, ValueError, RuntimeError, KeyError, dfvfs_errors.Error)

_ENCRYPTED = {"BDE": "BitLocker", "LUKSDE": "LUKS", "FVDE": "FileVault"}
_LETTERS = {
    definitions.FILE_ENTRY_TYPE_FILE: "r",
    definitions.FILE_ENTRY_TYPE_DIRECTORY: "d",
    definitions.FILE_ENTRY_TYPE_LINK: "l",
    definitions.FILE_ENTRY_TYPE_BLOCK_DEVICE: "b",
    definitions.FILE_ENTRY_TYPE_CHARACTER_DEVICE: "c",
    definitions.FILE_ENTRY_TYPE_DEVICE: "c",
    definitions.FILE_ENTRY_TYPE_PIPE: "p",
    definitions.FILE_ENTRY_TYPE_SOCKET: "s",
    definitions.FILE_ENTRY_TYPE_WHITEOUT: "w",
}


class ReaderFile:
    """A volume as a file object of dfVFS. Small reads come from a window of the volume."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._offset = 0
        self._window = b""
        self._start = 0

    def read(self, size: int | None = None) -> bytes:
        """Return ``size`` bytes at the current offset, fewer only at the end; raises ``OSError``."""
        left = max(0, self._reader.size - self._offset)
        size = left if size is None or size < 0 else min(size, left)
        inside = self._offset - self._start
        if not 0 <= inside <= inside + size <= len(self._window):
            try:
                if size >= _WINDOW:
                    data = self._reader.read(self._offset, size)
                    self._offset += len(data)
                    return data
                self._start = self._offset & -_WINDOW
                self._window = self._reader.read(self._start, 2 * _WINDOW)
            except Qcow2Error as error:
                raise OSError(str(error)) from error
            inside = self._offset - self._start
        data = self._window[inside : inside + size]
        self._offset += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> None:
        """Move to an offset."""
        offset += {os.SEEK_SET: 0, os.SEEK_CUR: self._offset, os.SEEK_END: self._reader.size}[whence]
        if offset < 0:
            raise OSError("the offset is before the start")
        self._offset = offset

    def get_offset(self) -> int:
        """Return the current offset."""
        return self._offset

    tell = get_offset

    def get_size(self) -> int:
        """Return the size of the volume."""
        return self._reader.size


class DecryptedReader(ReaderOver):
    """A volume that dfVFS decrypts. ``payload`` is where its first byte is in the encrypted one."""

    def __init__(self, below: Reader, opened: Any, payload: int) -> None:
        super().__init__(below, int(opened.get_size()))
        self._below = below
        self._opened = opened
        self._payload = payload

    def read(self, offset: int, length: int) -> bytes:
        self._opened.seek(offset, os.SEEK_SET)
        return bytes(self._opened.read(max(0, min(length, self.size - offset))))

    def place(self, offset: int, length: int) -> Iterator[Span]:
        yield from self._below.place(self._payload + offset, length)


class Scanned:
    """What dfVFS finds in a volume: ``unlocked``, ``locked`` (the kind of encryption), or file systems."""

    def __init__(self, reader: Reader, passphrases: Sequence[bytes] = ()) -> None:
        self._reader = reader
        self.unlocked: Reader | None = None
        self.locked = ""
        self.specs: list[Any] = []
        self.problem = ""
        try:
            self._scan(passphrases)
        except _FAILURES as error:
            self.problem = first_line(error)

    def _begin(self) -> tuple[Any, source_scanner.SourceScanner]:
        """Return the path specification of the volume in a new context, and a scanner in it."""
        self._context = context.Context()
        self._file = ReaderFile(self._reader)  # the cache of the context holds it weakly
        spec = factory.Factory.NewPathSpec(definitions.TYPE_INDICATOR_FAKE, location="/volume")
        self._context.CacheFileObject(spec, self._file)
        return spec, source_scanner.SourceScanner(resolver_context=self._context)

    def _scan(self, passphrases: Sequence[bytes]) -> None:
        volume, scanner = self._begin()
        spec = scanner.ScanForVolumeSystem(volume)
        kind = "" if spec is None else spec.type_indicator
        if kind in _ENCRYPTED:
            self.locked = _ENCRYPTED[kind]
            for passphrase in passphrases:
                self._begin()  # the libraries open with the first passphrase that a volume is given, or never
                if self._unlock(spec, passphrase):
                    break
        elif kind == definitions.TYPE_INDICATOR_APFS_CONTAINER:
            container = resolver.Resolver.OpenFileEntry(spec, resolver_context=self._context)
            for entry in container.sub_file_entries:
                found = scanner.ScanForFileSystem(entry.path_spec)
                self.specs += [] if found is None else [found]
        else:
            found = scanner.ScanForFileSystem(volume)
            self.specs += [] if found is None else [found]

    def _unlock(self, spec: Any, passphrase: bytes) -> bool:
        chain = resolver.Resolver.key_chain
        chain.SetCredential(spec, "password", decoded(passphrase))
        try:
            entry = resolver.Resolver.OpenFileEntry(spec, resolver_context=self._context)
            if not entry.Unlock():
                return False
            opened = resolver.Resolver.OpenFileObject(spec, resolver_context=self._context)
            self._keep = entry, opened
            self.unlocked = DecryptedReader(self._reader, opened, _payload(self._reader, self.locked))
        finally:
            chain.SetCredential(spec, "password", None)
        return True

    def file_systems(self, place: Callable[[], Volume]) -> Iterator[FileSystem]:
        """Yield the file systems; ``place`` is asked once for each what to call it and where it is."""
        for spec in self.specs:
            yield DfvfsFileSystem(self._reader, place(), spec, self._context, self._file)


def _payload(reader: Reader, kind: str) -> int:
    """Return where the encrypted bytes begin: after the header of LUKS1, at once in BitLocker."""
    return int.from_bytes(reader.read(104, 4), "big") * 512 if kind == "LUKS" else 0


class DfvfsFileSystem(FileSystem):
    """A file system that dfVFS reads: allocated names only."""

    failures = _FAILURES

    def __init__(self, reader: Reader, volume: Volume, spec: Any, resolver_context: Any, file: ReaderFile) -> None:
        super().__init__(volume, reader.errors, reader.unreadable)
        self._reader = reader
        self._context = resolver_context
        self._file = file
        self._root = spec
        self._times_in_doubt = 0
        self._system = resolver.Resolver.OpenFileSystem(spec, resolver_context=resolver_context)

    # --- listing -----------------------------------------------------------------------------

    def _listed(self) -> Iterator[FileRecord]:
        try:
            root = self._system.GetRootFileEntry()
        except _FAILURES as error:
            self.note_problem("/", error)
            return
        yield from self._walk(root, "", ())

    def _walk(self, folder: Any, path: str, above: tuple[int, ...], *, again: bool = False) -> Iterator[FileRecord]:
        if self._is_too_deep(path, above):
            return
        entries: Iterator[Any] = iter(folder.sub_file_entries)
        while True:
            try:
                entry = next(entries, None)
                if entry is None:
                    return
                record = self._record(entry, f"{path}/{entry.name}")
            except _FAILURES as error:
                self.note_problem(path or "/", error)
                return
            self._visits.count(again)
            yield record
            yield from self._other_streams(entry, record)
            if not entry.IsDirectory() or record.inode in above:
                continue
            if self._is_listed_enough(record.path, record.inode, again):
                if again:
                    return  # the names that follow are listed elsewhere
                continue
            listed_again = self._visits.enter(record.inode, again)
            yield from self._walk(entry, record.path, (*above, record.inode), again=listed_again)

    def _other_streams(self, entry: Any, record: FileRecord) -> Iterator[FileRecord]:
        """Yield a record for each stream that has a name: resource forks, alternate data streams."""
        try:
            names = [stream.name for stream in entry.data_streams if not stream.IsDefault()]
            if _resource_fork(entry) is not None:
                names.append(RESOURCE_FORK)
            for name in names:
                size = int(_stream(entry, name).get_size())
                yield replace(record, stream=name, size=size, spans=(), sparse=False, resident=False)
        except _FAILURES as error:
            self.note_problem(record.path, error)

    def _record(self, entry: Any, path: str) -> FileRecord:
        stat = entry.GetStatAttribute()
        letter = _LETTERS.get(entry.entry_type, "-")
        inode = int(getattr(stat, "inode_number", None) or getattr(entry.path_spec, "identifier", None) or 0)
        spans, sparse, resident = self._spans(entry, letter)
        times = Times(*(_time(entry, f"{name}_time") for name in ("modification", "access", "change", "creation")))
        if self.volume.kind == "xfs" and min(times) < 0:
            try:
                times = stored_times(self._reader, inode)
            except OSError as error:
                self._times_in_doubt += 1
                if self._times_in_doubt <= _MOST_IN_DOUBT:
                    more = ", and others" if self._times_in_doubt == _MOST_IN_DOUBT else ""
                    why = OSError(f"dates before 1970 may be two seconds early: {error}")
                    self.note_problem(f"{path}{more}", why, deleted=True)
        return FileRecord(
            volume=self.volume,
            path=path,
            inode=inode,
            name_type=letter,
            allocated=True,
            has_metadata=True,
            type=letter,
            in_use=True,
            size=int(entry.size or 0),
            mode=int(getattr(stat, "mode", None) or 0) & 0o7777,
            uid=_identifier(getattr(stat, "owner_identifier", None)),
            gid=_identifier(getattr(stat, "group_identifier", None)),
            times=times,
            link=str(entry.link or "") if letter == "l" else "",
            spans=spans,
            sparse=sparse,
            resident=resident,
        )

    def _spans(self, entry: Any, letter: str) -> tuple[tuple[Span, ...], bool, bool]:
        """Return where content is, and whether it is nowhere (holes only) or within the metadata."""
        if letter != "r" or not entry.size:
            return (), False, False
        extents = entry.GetExtents()
        stored = [item for item in extents if item.extent_type != definitions.EXTENT_TYPE_SPARSE]
        spans = tuple(span for item in stored for span in self._reader.place(int(item.offset), int(item.size)))
        return spans, bool(extents) and not stored, not extents

    # --- content -----------------------------------------------------------------------------

    def _opened(self, record: FileRecord) -> Callable[[int, int], bytes]:
        entry = self._entry(record)
        opened = _stream(entry, record.stream) if entry is not None else None
        if opened is None:
            raise OSError("it is not found again")
        opened.seek(0, os.SEEK_SET)
        return lambda _offset, length: bytes(opened.read(length))

    def _entry(self, record: FileRecord) -> Any:
        """Return the entry of a record: by its inode where the file system has them, else by its path."""
        known: dict[str, Any] = {"location": record.path}
        if self._root.type_indicator in ("APFS", "HFS"):
            known["identifier"] = record.inode
        elif self._root.type_indicator in ("XFS", "EXT"):
            known["inode"] = record.inode
        spec = factory.Factory.NewPathSpec(self._root.type_indicator, parent=self._root.parent, **known)
        return self._system.GetFileEntryByPathSpec(spec)


def _stream(entry: Any, name: str) -> Any:
    """Return a stream of a file, the one without a name by default, to be read."""
    fork = _resource_fork(entry) if name == RESOURCE_FORK else None
    return entry.GetFileObject(data_stream_name=name) if fork is None else fork


def _resource_fork(entry: Any) -> Any:
    """Return the resource fork of a file on APFS, which keeps it as an extended attribute; None where there is none."""
    if entry.type_indicator != definitions.TYPE_INDICATOR_APFS:
        return None
    return next((item for item in entry.attributes if item.name == "com.apple.ResourceFork"), None)


def _identifier(value: object) -> int:
    return int(value) if isinstance(value, int) else 0


def _time(entry: Any, name: str) -> int:
    value = getattr(entry, name, None)
    if value is None:
        return 0
    if type(value).__name__ in ("APFSTime", "PosixTimeInNanoseconds"):
        return int(value.timestamp or 0)
    seconds, fraction = value.CopyToPosixTimestampWithFractionOfSecond()
    return int(seconds or 0) * SECOND + int(fraction or 0) * _FRACTIONS.get(value.precision, 0)
