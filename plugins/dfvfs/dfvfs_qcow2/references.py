"""Backing and data files, resolved in the file system that holds the image.

On the operating system's own file system names are followed as everywhere (see the core's resolver).
Inside a container (a file system in an image, an archive) absolute names and ``..`` are what they were
on that system, but nothing leads above the container's root, let alone to the examiner's machine.
An image in a logical volume has its backing image in another volume of the group, by the volume's name.
"""

from __future__ import annotations

import re
from typing import Any

from dfvfs.lib import definitions
from dfvfs.lib import errors as dfvfs_errors
from dfvfs.path import factory
from dfvfs.resolver import resolver as dfvfs_resolver
from dfvfs.vfs import root_only_file_system

from qcow2_forensics import (
    ALONE_VARIABLE,
    BACKING_VARIABLE,
    ForbiddenReference,
    MissingFile,
    Qcow2Error,
    Remedies,
    Resolver,
    Role,
    Source,
    base_name,
    folders_from_environment,
    json_options,
    parse_reference,
    reason,
)
from qcow2_forensics.text import printable

from .sources import FileObjectSource

_DRIVE = re.compile(r"[A-Za-z]:[\\/]")  # an absolute name written by QEMU on Windows
_LINKS = 8  # symbolic links followed for one name inside a container


_REMEDIES = Remedies(
    f"{BACKING_VARIABLE}=FOLDER (plaso: --qcow_backing_dir)", "", f"{ALONE_VARIABLE}=1 (plaso: --qcow_no_backing)"
)


class PathSpecResolver(Resolver):
    """Opens backing and data files of an image that dfVFS opened; :attr:`opened` lists them."""

    def __init__(self, resolver_context: Any) -> None:
        super().__init__(folders=folders_from_environment(), remedies=_REMEDIES)
        self._context = resolver_context
        self.opened: list[Source] = []

    def open(self, name: str, role: Role, parent: Source, top: Source) -> tuple[Source, str | None]:
        """Return the file ``name`` in ``parent`` means, and the driver the name itself fixes."""
        if not hasattr(parent, "path_spec"):
            source, driver = super().open(name, role, parent, top)
        else:
            try:  # also behind what keeps a deleted snapshot from foreign bytes
                source, driver = self._open_inside(name, role, parent)
            except (ForbiddenReference, MissingFile) as error:
                stand_in = self.stand_in(name, role, parent, top)  # in a folder the caller named
                if stand_in is None:
                    raise self.with_remedy(error, role, parent) from error.__cause__
                source, driver = stand_in, None
        self.opened.append(source)
        return source, driver

    def _open_volume(self, name: str, role: Role, path_spec: Any) -> tuple[Source, str | None]:
        """Return the logical volume of the same group that a name like ``/dev/vg0/base`` means."""
        path, driver = _device_reference(name, role)
        device = path.rsplit("/", 1)[-1]
        try:
            file_system = dfvfs_resolver.Resolver.OpenFileSystem(path_spec, resolver_context=self._context)
            volumes = list(file_system.GetRootFileEntry().sub_file_entries)
            named = [entry for entry in volumes if entry.GetLVMLogicalVolume().name == device]
            named = named or [entry for entry in volumes if _is_volume(entry.GetLVMLogicalVolume().name, device)]
            if len(named) != 1:
                known = [printable(entry.GetLVMLogicalVolume().name) for entry in volumes]
                raise MissingFile(role, name, [f"logical volume {volume}" for volume in known])
            return FileObjectSource(named[0].path_spec, self._context), driver
        except Qcow2Error:
            raise
        except (OSError, KeyError, ValueError, dfvfs_errors.Error) as error:
            raise ForbiddenReference(name, f"it cannot be opened: {reason(error, 200)}") from error

    def _open_inside(self, name: str, role: Role, parent: Any) -> tuple[Source, str | None]:
        path, driver = name, None
        if parent.path_spec.type_indicator == definitions.TYPE_INDICATOR_LVM:
            return self._open_volume(name, role, parent.path_spec)
        if not _DRIVE.match(name):
            reference = parse_reference(name, role)
            path, driver = reference.path, reference.driver
        path_spec = parent.path_spec
        location = getattr(path_spec, "location", None)
        if not location:
            raise ForbiddenReference(name, "the image is not in a file system that could hold the file")
        try:
            file_system = dfvfs_resolver.Resolver.OpenFileSystem(path_spec, resolver_context=self._context)
            if isinstance(file_system, root_only_file_system.RootOnlyFileSystem):
                # A compressed file, for one: whatever is asked for there is that file again.
                raise ForbiddenReference(name, "the image is not in a file system that could hold the file")
            place, beside = _join(file_system, location, path), _join(file_system, location, base_name(name, role))
            found = _regular_file(file_system, _sibling(path_spec, place), name)
            stands_for = ""
            if found is None and base_name(name, role) and beside != location:
                found, stands_for = _regular_file(file_system, _sibling(path_spec, beside), name), name
            if found is None:
                raise MissingFile(role, name, dict.fromkeys([place, beside]))
            source = FileObjectSource(found, self._context)
            source.stands_for = stands_for
            return source, driver
        except Qcow2Error:
            raise
        except (OSError, KeyError, ValueError, NotImplementedError, dfvfs_errors.Error) as error:
            raise ForbiddenReference(name, f"it cannot be opened: {reason(error, 200)}") from error


def _device_reference(name: str, role: Role) -> tuple[str, str | None]:
    """Return the device a name means, and the driver it fixes: ``host_device`` is one, where there are volumes."""
    if name.startswith("host_device:"):
        return name.removeprefix("host_device:"), "raw"
    if name.startswith("json:") and role == "backing":
        options = dict(json_options(name))
        driver, path = options.get("driver"), options.get("file.filename")
        rest = set(options) - {"driver", "file.driver", "file.filename"}
        if (
            options.get("file.driver") == "host_device"
            and not rest
            and isinstance(path, str)
            and isinstance(driver, str)
        ):
            return path, driver
    reference = parse_reference(name, role)
    return reference.path, reference.driver


def _is_volume(logical: str, device: str) -> bool:
    """Whether the last part of a device's name is that of a logical volume, as LVM or as the device mapper writes it."""
    return device == logical or device.endswith(f"-{logical.replace('-', '--')}")


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
