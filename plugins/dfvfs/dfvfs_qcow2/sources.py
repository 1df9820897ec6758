"""Files named by dfVFS path specifications as positional sources.

A file of the operating system is read with ``pread``: no position is shared with forked workers
or with anybody else who has the path specification open. Everything else is a private dfVFS file
object, read under a lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from dfvfs.lib import definitions
from dfvfs.lib import errors as dfvfs_errors

from qcow2_forensics import (
    FileSource,
    Qcow2Error,
    ReadError,
    Source,
    StreamSource,
    assuming,
    assumptions_from_environment,
    reason,
)
from qcow2_forensics.text import cut

from .names import outwards

_MAGIC = b"QFI\xfb"


class FileObjectSource(StreamSource):
    """A dfVFS file object as a source; ``path_spec`` says where it is."""

    single_threaded = True  # below this object dfVFS shares file systems, which have positions

    def __init__(self, path_spec: Any, resolver_context: Any) -> None:
        self.path_spec = path_spec
        self.identity = ("dfvfs", path_spec.comparable)
        self.stands_for = ""  # as of the core's FileSource
        # Not at import: this module is imported while dfvfs.resolver_helpers is being equipped.
        from dfvfs.resolver_helpers import manager

        # Not through the resolver's cache: an object from there has a position others move.
        helper = manager.ResolverHelperManager.GetHelper(path_spec.type_indicator)
        file_object = helper.NewFileObject(resolver_context, path_spec)
        file_object.Open()
        super().__init__(file_object, display_name(path_spec), size=int(file_object.get_size()))

    def read(self, offset: int, length: int, /) -> bytes:
        """Return ``length`` bytes at ``offset``, fewer only at the end."""
        try:
            return super().read(offset, length)
        except dfvfs_errors.BackEndError as error:
            why = f"{cut(self.name)}: {reason(error, 300)}"
            raise ReadError(why, offset=offset, length=length) from error


def open_source(path_spec: Any, resolver_context: Any) -> Source:
    """Open the file a path specification means; raises OSError or a dfVFS error."""
    location = getattr(path_spec, "location", None)
    is_os = path_spec.type_indicator == definitions.TYPE_INDICATOR_OS and not path_spec.HasParent()
    if is_os and location and hasattr(os, "pread"):
        try:
            return FileSource(location)
        except Qcow2Error:
            pass  # not a regular file nor a block device: dfVFS knows more kinds
    return FileObjectSource(path_spec, resolver_context)


def open_image_source(path_spec: Any, resolver_context: Any) -> tuple[Source, Source]:
    """Open the file of an image: as it is, and with the header fields that ``QCOW2_ASSUME`` states."""
    source = open_source(path_spec, resolver_context)
    return source, assuming(source, assumptions_from_environment())


def begins_as_image(opened: Callable[[], Any]) -> bool:
    """Whether what ``opened`` returns, a file object of dfVFS or None, begins with the magic; False where it fails."""
    try:
        file_object = opened()
        if file_object is None:
            return False
        file_object.seek(0)  # it is shared with whoever looked at the file before
        return bool(file_object.read(len(_MAGIC)) == _MAGIC)
    except (OSError, dfvfs_errors.Error):
        return False


def display_name(path_spec: Any) -> str:
    """Return the locations of a path specification from the outermost file inwards."""
    places = [str(spec.location) for spec in outwards(path_spec) if getattr(spec, "location", None)]
    return ":".join(reversed(places)) or "stream"
