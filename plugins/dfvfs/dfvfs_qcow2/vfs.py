"""The file system that holds one thing, the disk, and says whether it is locked."""

from __future__ import annotations

from typing import Any

from dfvfs.lib import definitions
from dfvfs.lib import errors as dfvfs_errors
from dfvfs.path import factory
from dfvfs.resolver import resolver
from dfvfs.vfs import root_only_file_entry, root_only_file_system

_StockFileEntry: Any = root_only_file_entry.RootOnlyFileEntry
_StockFileSystem: Any = root_only_file_system.RootOnlyFileSystem


class QCOWFileEntry(_StockFileEntry):
    """The only file entry of an image: its disk."""

    TYPE_INDICATOR = definitions.TYPE_INDICATOR_QCOW

    def __init__(
        self, resolver_context: Any, file_system: Any, path_spec: Any, is_root: bool = False, is_virtual: bool = False
    ) -> None:
        file_object = resolver.Resolver.OpenFileObject(path_spec, resolver_context=resolver_context)
        if file_object is None:
            raise dfvfs_errors.BackEndError("Missing QCOW image.")
        super().__init__(resolver_context, file_system, path_spec, is_root=is_root, is_virtual=is_virtual)
        self._qcow_file = file_object
        self.entry_type = definitions.FILE_ENTRY_TYPE_FILE

    @property
    def size(self) -> int:
        """Size of the disk in bytes."""
        size: int = self._qcow_file.get_size()
        return size

    def IsLocked(self) -> bool:  # noqa: N802
        """Whether the image is encrypted and no password in the key chain fits."""
        return bool(self._qcow_file.is_locked)

    def Unlock(self) -> bool:  # noqa: N802
        """Try the password in the key chain; True also for an image that is not encrypted."""
        return not self._qcow_file.is_locked


class QCOWFileSystem(_StockFileSystem):
    """File system of a QCOW image."""

    TYPE_INDICATOR = definitions.TYPE_INDICATOR_QCOW

    def GetFileEntryByPathSpec(self, path_spec: Any) -> QCOWFileEntry:  # noqa: N802
        """Return the file entry of the disk."""
        return QCOWFileEntry(self._resolver_context, self, path_spec, is_root=True, is_virtual=True)

    def GetRootFileEntry(self) -> QCOWFileEntry:  # noqa: N802
        """Return the file entry of the disk."""
        path_spec = factory.Factory.NewPathSpec(definitions.TYPE_INDICATOR_QCOW, parent=self._path_spec.parent)
        return self.GetFileEntryByPathSpec(path_spec)
