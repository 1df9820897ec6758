"""The file objects: an image's active state, and one of its snapshots.

libyal reads in pieces of 64 bytes, nine out of ten of them next to the one before. So a file
object keeps the last window of the disk it read and slices it, and only a miss goes to the disk.
"""

from __future__ import annotations

import os
from typing import Any

from dfvfs.file_io import file_io
from dfvfs.lib import definitions
from dfvfs.lib import errors as dfvfs_errors

from qcow2_forensics import Locked, Qcow2Error

from .names import SnapshotKey, parse_encoding_method
from .opening import OpenedDisk, open_state, passwords_of

_WINDOW = 16 * 1024  # bytes read at once for a small read; aligned, a power of two

_Stock: Any = file_io.FileIO


class QCOWFile(_Stock):
    """File input/output (IO) object of the active state of a QCOW image."""

    def __init__(self, resolver_context: Any, path_spec: Any) -> None:
        super().__init__(resolver_context, path_spec)
        self._opened: OpenedDisk | None = None
        self._offset = 0
        self._size = 0
        self._window = b""
        self._window_offset = 0
        self._window_end = 0

    def _qcow_path_spec(self) -> Any:
        return self._path_spec

    def _snapshot(self) -> SnapshotKey | None:
        return None

    def _Open(self) -> None:  # noqa: N802
        if not self._path_spec.HasParent():
            raise dfvfs_errors.PathSpecError("Unsupported path specification without parent.")
        self._opened = open_state(self._qcow_path_spec(), self._resolver_context, self._snapshot())
        self._size = self._opened.disk.size

    def _Close(self) -> None:  # noqa: N802
        # The disk is shared and is closed when nobody holds it any more.
        self._opened = None
        self._window = b""
        self._window_end = 0

    @property
    def is_locked(self) -> bool:
        """Whether the image is encrypted and the key chain holds no password that fits."""
        return not self.unlock()

    def unlock(self) -> bool:
        """Try the password in the key chain; returns whether the content can be read."""
        opened = self._require_open()
        return opened.unlock(passwords_of(self._qcow_path_spec())) if opened.disk.is_locked else True

    def _require_open(self) -> OpenedDisk:
        if self._opened is None:
            raise OSError("Not opened.")
        return self._opened

    # The names and signatures below are those of dfVFS's file objects.

    def read(self, size: int | None = None) -> bytes:
        """Return ``size`` bytes at the current offset, fewer only at the end; raises OSError only."""
        offset = self._offset
        if size is not None:
            end = offset + size
            if self._window_offset <= offset <= end <= self._window_end:
                self._offset = end
                start = offset - self._window_offset
                return self._window[start : start + size]
        opened = self._require_open()
        remaining = self._size - offset
        if size is None or size > remaining:
            size = remaining
        elif size < 0:
            raise OSError(f"Invalid size: {size} value less than zero.")
        if size <= 0:
            return b""
        data = self._read_small(opened, offset, size) if size < _WINDOW else None
        if data is None:
            data = self._read_disk(opened, offset, size)
        self._offset = offset + size
        return data

    def _read_small(self, opened: OpenedDisk, offset: int, size: int) -> bytes | None:
        """Move the window over a small read; None when it spans two windows or cannot be filled."""
        start = offset & -_WINDOW
        if offset + size > start + _WINDOW:
            return None
        try:
            window = opened.disk.read(start, _WINDOW)
        except (OSError, Qcow2Error):
            return None  # something in the window cannot be read; perhaps not what is asked for
        if len(window) < offset - start + size:
            return None
        self._window = window
        self._window_offset = start
        self._window_end = start + len(window)
        return window[offset - start : offset - start + size]

    def _read_disk(self, opened: OpenedDisk, offset: int, size: int) -> bytes:
        try:
            try:
                data = opened.disk.read(offset, size)
            except Locked:
                if not self.unlock():
                    raise
                data = opened.disk.read(offset, size)
        except (OSError, Qcow2Error) as error:
            opened.note_failure(error)
            if isinstance(error, OSError):
                raise
            raise OSError(str(error)) from error
        if len(data) != size:
            raise OSError(f"The disk gave {len(data)} of {size} bytes at offset {offset:#x}.")
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> None:
        """Move to an offset; past the end is allowed, before the start is an OSError."""
        if self._opened is None:
            raise OSError("Not opened.")
        if whence == os.SEEK_CUR:
            offset += self._offset
        elif whence == os.SEEK_END:
            offset += self._size
        elif whence != os.SEEK_SET:
            raise OSError("Unsupported whence.")
        if offset < 0:
            raise OSError("Invalid offset value less than zero.")
        self._offset = offset

    def get_offset(self) -> int:
        """Return the current offset."""
        self._require_open()
        return self._offset

    def get_size(self) -> int:
        """Return the size of the disk in bytes."""
        self._require_open()
        return self._size


class QCOWSnapshotFile(QCOWFile):
    """File input/output (IO) object of one internal snapshot: ENCODED_STREAM over QCOW."""

    def _qcow_path_spec(self) -> Any:
        return self._path_spec.parent

    def _snapshot(self) -> SnapshotKey | None:
        key = parse_encoding_method(self._path_spec.encoding_method)
        if key is None:
            raise dfvfs_errors.PathSpecError("Unsupported encoding method of a QCOW snapshot.")
        parent = self._path_spec.parent
        if parent is None or parent.type_indicator != definitions.TYPE_INDICATOR_QCOW:
            raise dfvfs_errors.PathSpecError("Unsupported QCOW snapshot without a QCOW parent.")
        return key
