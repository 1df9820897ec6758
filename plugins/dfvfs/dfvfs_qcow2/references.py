"""Backing and data files, resolved in the file system that holds the image.

On the operating system's own file system a name is followed inside the image's folder only, links
resolved; one that leads elsewhere means the file of the same name beside the image, because
evidence is usually copied away from where it was used. Inside a container (a file system in an
image, an archive) absolute names and ``..`` are what they were on that system, but nothing leads
above the container's root, let alone to the examiner's machine.
"""

from __future__ import annotations

import ntpath
import os
import re
from typing import Any

from dfvfs.lib import errors as dfvfs_errors
from dfvfs.path import factory
from dfvfs.resolver import resolver as dfvfs_resolver
from dfvfs.vfs import root_only_file_system

from qcow2_forensics.errors import ForbiddenReference, MissingFile, Qcow2Error
from qcow2_forensics.format.source import FileSource, Source
from qcow2_forensics.reader.resolver import Resolver, Role, parse_reference
from qcow2_forensics.text import printable

from .sources import FileObjectSource

_DRIVE = re.compile(r"[A-Za-z]:[\\/]")  # an absolute name written by QEMU on Windows
_LINKS = 8  # symbolic links followed for one name inside a container


class PathSpecResolver(Resolver):
    """Opens backing and data files of an image that dfVFS opened; :attr:`opened` lists them."""

    def __init__(self, resolver_context: Any, top: Source) -> None:
        folders = []
        if isinstance(top, FileSource):
            folders.append(os.path.dirname(os.path.realpath(top.path)))
        super().__init__(folders=folders)
        self._context = resolver_context
        self.opened: list[Source] = []

    def open(self, name: str, role: Role, parent: Source, top: Source) -> tuple[Source, str | None]:
        """Return the file ``name`` in ``parent`` means, and the driver the name itself fixes."""
        if hasattr(parent, "path_spec"):  # also behind what keeps a deleted snapshot from foreign bytes
            source, driver = self._open_inside(name, role, parent)
        else:
            # A Windows name can only mean the file of that name beside the image here.
            local = ntpath.basename(name) if os.name != "nt" and _DRIVE.match(name) else name
            source, driver = super().open(local, role, parent, top)
        self.opened.append(source)
        return source, driver

    def _open_inside(self, name: str, role: Role, parent: Any) -> tuple[Source, str | None]:
        path, driver = (name, None) if _DRIVE.match(name) else parse_reference(name, role)
        path_spec = parent.path_spec
        location = getattr(path_spec, "location", None)
        if not location:
            raise ForbiddenReference(name, "the image is not in a file system that could hold the file")
        try:
            file_system = dfvfs_resolver.Resolver.OpenFileSystem(path_spec, resolver_context=self._context)
            if isinstance(file_system, root_only_file_system.RootOnlyFileSystem):
                # A compressed file, for one: whatever is asked for there is that file again.
                raise ForbiddenReference(name, "the image is not in a file system that could hold the file")
            place = _join(file_system, location, path)
            found = _regular_file(file_system, _sibling(path_spec, place), name)
            if found is None:
                raise MissingFile(role, name, [place])
            return FileObjectSource(found, self._context), driver
        except Qcow2Error:
            raise
        except (OSError, KeyError, ValueError, NotImplementedError, dfvfs_errors.Error) as error:
            raise ForbiddenReference(name, f"it cannot be opened: {printable(str(error), 200)}") from error


def _join(file_system: Any, location: str, path: str) -> str:
    """Return the location ``path`` means beside ``location``, never above the root."""
    separator = file_system.PATH_SEPARATOR
    absolute = path.startswith(("/", separator))
    drive = _DRIVE.match(path)
    if drive:
        absolute, path = True, path[drive.end() :].replace("\\", "/")
    parts = [] if absolute else list(file_system.SplitPath(location))[:-1]
    for part in re.split(r"[/\\]" if separator == "\\" else "/", path):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return str(file_system.JoinPath(parts))


def _sibling(path_spec: Any, location: str) -> Any:
    # Location and parent only: an inode copied from the child would be the child again.
    parent = {"parent": path_spec.parent} if path_spec.parent is not None else {}
    return factory.Factory.NewPathSpec(path_spec.type_indicator, location=location, **parent)


def _regular_file(file_system: Any, path_spec: Any, name: str) -> Any:
    """Return the path specification of the regular file, links followed; None when it is missing."""
    file_entry = file_system.GetFileEntryByPathSpec(path_spec)
    for _ in range(_LINKS):
        if file_entry is None:
            return None
        if not file_entry.IsLink():
            break
        file_entry = file_entry.GetLinkedFileEntry()
    if file_entry is None:
        return None
    if not file_entry.IsFile():
        raise ForbiddenReference(name, "it is not a regular file")
    return file_entry.path_spec
