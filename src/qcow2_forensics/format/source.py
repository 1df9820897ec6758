"""Positional read-only bytes: where every read ends.

A source has no seek position, so many threads and forked processes may share one. The only
contract is :class:`Source`; anything with ``read(offset, length)`` and ``size`` will do.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import threading
import weakref
from collections.abc import Iterator
from typing import BinaryIO, Protocol, Self, runtime_checkable

from ..errors import NotQcow2, ReadError, reason
from ..text import cut


class Closing:
    """What is closed at the end of a ``with`` block."""

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@runtime_checkable
class Source(Protocol):
    """Bytes by position. ``read`` is short only where the source ends.

    Threads may read at the same time. A source that cannot bear that (one over a file object of
    somebody else) sets ``single_threaded = True``: then only the thread that asked reads it.
    Our own classes set ``keeps_contract``: their answers are not checked again.
    """

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int, /) -> bytes: ...


_seeking = threading.Lock()


def _read_at(descriptor: int, length: int, offset: int) -> bytes:
    """Read at an offset, also where there is no ``pread``: on Windows."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, length, offset)
    with _seeking:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, length)


_open_files: weakref.WeakSet[FileSource] = weakref.WeakSet()
_remembered: list[set[tuple[int, int]]] = []  # device and inode of what was opened, for each block that asked for it


@contextlib.contextmanager
def remembering_sources() -> Iterator[None]:
    """Until the block ends, count each file that was opened in it as being read, also when it is closed again."""
    opened: set[tuple[int, int]] = set()
    _remembered.append(opened)
    try:
        yield
    finally:
        _remembered[:] = [item for item in _remembered if item is not opened]


def is_being_read(path: str | os.PathLike[str]) -> bool:
    """Whether this process has the file open as a source, or remembers that it had: evidence, which nothing may replace."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    wanted = (status.st_dev, status.st_ino)
    if any(wanted in opened for opened in _remembered):
        return True
    return any(source.identity == wanted and source.fileno() >= 0 for source in _open_files)


PathOrSource = str | os.PathLike[str] | Source | BinaryIO


class FileSource:
    """A regular file or block device, opened read-only and read with ``pread``.

    The size is taken once. A file that shrinks afterwards gives a :class:`ReadError`, never a
    short answer. ``regular_only`` refuses devices: names that come from evidence use it. A
    ``descriptor`` that is open already is taken over, and closed with the source.
    """

    keeps_contract = True

    def __init__(
        self, path: str | os.PathLike[str], *, regular_only: bool = False, descriptor: int | None = None
    ) -> None:
        self.path = os.fspath(path)
        self.name = os.fsdecode(self.path)
        self.folder: str | None = None  # where relative names in it start, if not beside ``path``: it was a link
        self.stands_for = ""  # the name in an image for which this file beside it was taken
        # O_NONBLOCK: opening a FIFO must not wait for a writer; regular files ignore it.
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
        flags |= getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
        self.fd = os.open(self.path, flags) if descriptor is None else descriptor
        with ClosedOnError(self):
            status = os.fstat(self.fd)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self.name)
            if not stat.S_ISREG(status.st_mode) and (regular_only or not stat.S_ISBLK(status.st_mode)):
                raise NotQcow2(f"{cut(self.name)} is not a regular file")
            self.identity = (status.st_dev, status.st_ino)
            self.mtime_ns = status.st_mtime_ns
            self.size = status.st_size if stat.S_ISREG(status.st_mode) else os.lseek(self.fd, 0, os.SEEK_END)
        _open_files.add(self)
        for opened in _remembered:
            opened.add(self.identity)

    def read(self, offset: int, length: int, /) -> bytes:
        """Return ``length`` bytes at ``offset``, fewer only at the end of the file."""
        try:
            data = os.pread(self.fd, length, offset)
        except AttributeError:
            return self._read_on(offset, max(0, min(length, self.size - offset)), b"")
        except OSError as error:
            raise self._failed(error, offset, length) from error
        except (OverflowError, MemoryError):  # more than a file can have: what there is, is the answer
            if offset + length <= self.size:
                raise
            return self.read(offset, self.size - offset) if offset < self.size else b""
        if len(data) == length or offset + len(data) >= self.size:
            return data
        return self._read_on(offset, min(length, self.size - offset), data)

    def read_into(self, offset: int, buffer: memoryview, /) -> int:
        """Fill ``buffer`` from ``offset`` and return how many bytes it took, fewer only at the end of the file."""
        try:
            done = os.preadv(self.fd, (buffer,), offset)
        except OSError as error:
            raise self._failed(error, offset, len(buffer)) from error
        while done < len(buffer) and offset + done < self.size:
            more = self.read(offset + done, len(buffer) - done)
            buffer[done : done + len(more)] = more
            done += len(more)
        return done

    def _failed(self, error: OSError, offset: int, length: int) -> ReadError:
        return ReadError(f"{cut(self.name)}: {error.strerror}", offset=offset, length=length)

    def _read_on(self, offset: int, length: int, data: bytes) -> bytes:
        """Return ``length`` bytes at ``offset``, of which ``data`` is there already."""
        # pread stops at about 2 GiB, and may stop early on network file systems.
        pieces = [data]
        done = len(data)
        while done < length:
            try:
                more = _read_at(self.fd, length - done, offset + done)
            except OSError as error:
                raise self._failed(error, offset, length) from error
            if not more:
                raise ReadError(f"{cut(self.name)} shrank while it was being read", offset=offset, length=length)
            pieces.append(more)
            done += len(more)
        return b"".join(pieces)

    def fileno(self) -> int:
        """Return the descriptor, -1 when it is closed; sparse-aware tools ask it for holes."""
        return self.fd

    def close(self) -> None:
        """Close the descriptor; closing twice is fine."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close()


class StreamSource:
    """A seekable binary file object, read under a lock because it has one position."""

    keeps_contract = True

    def __init__(self, stream: BinaryIO, name: str = "", *, size: int | None = None) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self.name = name or str(getattr(stream, "name", "") or "stream")
        self.size = stream.seek(0, io.SEEK_END) if size is None else size

    def read(self, offset: int, length: int, /) -> bytes:
        """Return ``length`` bytes at ``offset``, fewer only at the end."""
        wanted = min(length, self.size - offset)
        if wanted <= 0:
            return b""
        pieces: list[bytes] = []
        with self._lock:
            try:
                self._stream.seek(offset)
                while wanted > 0:
                    data = self._stream.read(wanted)
                    if not data:
                        break
                    pieces.append(data)
                    wanted -= len(data)
            except OSError as error:
                raise ReadError(f"{cut(self.name)}: {reason(error, 300)}", offset=offset, length=length) from error
        if wanted > 0:
            raise ReadError(f"{cut(self.name)} ended early", offset=offset, length=length)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class BytesSource:
    """Bytes in memory, for metadata already read and for tests."""

    keeps_contract = True

    def __init__(self, data: bytes, name: str = "bytes") -> None:
        self._data = data
        self.name = name
        self.size = len(data)

    def read(self, offset: int, length: int, /) -> bytes:
        return self._data[offset : offset + length]


class CheckedSource:
    """A source of somebody else's, held to the contract: an answer of another length is a ReadError.

    Everything else it has (a path, a name, a layer) shows through. The owner closes it, not we.
    """

    keeps_contract = True

    def __init__(self, source: Source) -> None:
        self._source = source
        self._read = source.read
        self.size = source.size

    def read(self, offset: int, length: int, /) -> bytes:
        data = self._read(offset, length)
        if len(data) != length and len(data) != max(0, min(length, self.size - offset)):
            why = f"{cut(source_name(self._source))} gave {len(data)} bytes"
            raise ReadError(why, offset=offset, length=length)
        return data

    @property
    def identity(self) -> object:
        """What is equal for two views of one source: its own identity, else the source itself."""
        return getattr(self._source, "identity", None) or id(self._source)

    def close(self) -> None:
        """Leave the source open: it is its owner's to close."""

    def __getattr__(self, name: str) -> object:
        if name == "_source":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self._source, name)


def as_source(origin: PathOrSource) -> Source:
    """Return a source over a path, a binary file object, or a source; a foreign one is checked."""
    if isinstance(origin, (str, os.PathLike)):
        return FileSource(origin)
    if hasattr(origin, "seek"):
        return StreamSource(origin)  # type: ignore[arg-type]
    return origin if getattr(type(origin), "keeps_contract", False) else CheckedSource(origin)


def close_source(source: object) -> None:
    """Close a source that can be closed."""
    close = getattr(source, "close", None)
    if close is not None:
        close()


class ClosedOnError:
    """Closes a source where a ``with`` block ends in an error: nobody else has it yet."""

    def __init__(self, source: object) -> None:
        self._source = source

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            close_source(self._source)


def source_name(source: object) -> str:
    """Return what to call a source in messages and evidence; not escaped."""
    return str(getattr(source, "name", "") or type(source).__name__)
