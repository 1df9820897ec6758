"""Backing files in other formats: recognised always, read through an optional library.

VMDK and VHD/VHDX are read with libyal's libvmdk and libvhdi where installed (the ``formats``
extra); anything else is :class:`Unsupported` by name, never raw bytes by mistake.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import threading
from collections.abc import Iterator
from typing import Any

from ..errors import FormatError, ReadError, Unsupported, reason
from ..format.header import MAGIC
from ..format.other_files import format_of
from ..format.source import Source, close_source, source_name
from ..limits import KiB, MiB
from ..text import cut
from .chain_layers import Extent
from .foreign_map import foreign_map
from .mapping import Kind
from .stream import SourceStream

_PROBE_BYTES = 512
# A VMDK that only names the files with the data. Its first comment can be missing: QEMU looks for the version.
_DESCRIPTOR = re.compile(rb"# Disk DescriptorFile|(?:#[^\n]*\n| +\r?\n)*version=[123]\r?\n")
_NO_PARENT = 0xFFFFFFFF  # a VMDK's parent identifier
_VHD_DIFFERENTIAL = 4
_VMDK_ZEROED_GRAINS = 4  # of the flags: an entry of 1 is a grain of zeros, not one stored in the second sector
_VHDX_HEADERS = (64 * KiB, 128 * KiB)  # two copies, the one with the higher sequence number counts
_READ_BYTES = 16 * MiB  # per call of a library: they count in 32 bits
_LIBRARIES = {"vmdk": "pyvmdk", "vhdx": "pyvhdi", "vpc": "pyvhdi"}


def probe(source: Source) -> str:
    """Return QEMU's name of the format ``source`` is of, by its first 512 bytes; ``raw`` when nothing matches.

    What QEMU takes for another format is never raw here. A few heads that QEMU finds incomplete, and then
    reads as raw, count as their format here: they are not plainly raw.
    """
    head = source.read(0, _PROBE_BYTES)
    if head[:4] == MAGIC:
        return "qcow" if head[4:8] == b"\0\0\0\1" else "qcow2"
    known = format_of(head)
    if known:
        return known
    if _DESCRIPTOR.match(head):
        return "vmdk"
    if source_name(source).endswith(".dmg"):  # QEMU goes by the name here: the mark is at the end of the file
        return "dmg"
    return "raw"


def open_foreign(kind: str, source: Source) -> ForeignDisk:
    """Open a backing file of another format; raises :class:`Unsupported` naming it."""
    library = _LIBRARIES.get(kind)
    if library is None:
        raise Unsupported(f"a backing file of format {cut(kind)}")
    try:
        module = importlib.import_module(library)
    except ImportError:
        raise Unsupported(
            f"a backing file of format {kind} without {library}; pip install 'qcow2-forensics[formats]'"
        ) from None
    return ForeignDisk(kind, source, module)


def _has_log(source: Source) -> bool:
    """Whether a VHDX has a log that its writer has not replayed; libvhdi does not look at it."""
    heads = [head for head in (source.read(at, 64) for at in _VHDX_HEADERS) if head[:4] == b"head"]
    current = max(heads, key=lambda head: int.from_bytes(head[8:16], "little"), default=b"")
    return any(current[48:64])


class ForeignDisk:
    """A backing disk read by a libyal library, under a lock: its handles have a position."""

    depth = 1

    def __init__(self, kind: str, source: Source, module: Any) -> None:
        self.source = source
        self.name = source_name(source)
        self._kind = kind
        self._lock = threading.Lock()
        self._handle = module.handle() if kind == "vmdk" else module.file()
        try:
            self._handle.open_file_object(SourceStream(source))
            why = self._needs_more(source)
            if why:
                raise Unsupported(f"{cut(self.name)}, a backing file of format {kind} {why}")
            if kind == "vmdk":
                self._handle.open_extent_data_files_as_file_objects([SourceStream(source)])
            self.size = int(self._handle.get_media_size())
            self._map = foreign_map(kind, source, self.size)
        except (OSError, ValueError, MemoryError, AttributeError) as error:
            raise FormatError(f"{cut(self.name)} cannot be read as {kind}: {reason(error, 200)}") from None

    def _needs_more(self, source: Source) -> str:
        """Return why this file alone, or what its library makes of it, is not the whole disk; empty when it is.

        The library is never left to open what the file names: those names are evidence too.
        """
        if self._kind == "vmdk":
            if _DESCRIPTOR.match(source.read(0, _PROBE_BYTES)) or self._handle.get_number_of_extents() != 1:
                return "whose data is in other files"
            if source.read(0, 4) == b"KDMV" and source.read(8, 1)[0] & _VMDK_ZEROED_GRAINS:
                return "with zeroed grains, for which its library takes other bytes of the file"
            parent = self._handle.get_parent_content_identifier()
            return "" if parent in (None, _NO_PARENT) else "that is a difference to a parent"
        if self._kind == "vhdx" and _has_log(source):
            return "whose log was not replayed: it may hold newer tables than the rest of the file"
        differs = self._handle.get_disk_type() == _VHD_DIFFERENTIAL or self._handle.get_parent_identifier()
        return "that is a difference to a parent" if differs else ""

    def read(self, offset: int, length: int, /) -> bytes:
        """Return ``length`` bytes, fewer only at the end."""
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        pieces = []
        with self._lock:
            while length > 0:
                try:
                    data = bytes(self._handle.read_buffer_at_offset(min(length, _READ_BYTES), offset))
                except (OSError, ValueError, MemoryError) as error:
                    why = f"{cut(self.name)} ({self._kind}): {reason(error, 200)}"
                    raise ReadError(why, offset=offset, length=length) from None
                if not data:
                    raise ReadError(f"{cut(self.name)} ended early", offset=offset, length=length)
                pieces.append(data)
                offset += len(data)
                length -= len(data)
        return b"".join(pieces)

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """Yield the range as the file's allocation table has it, or as one piece of data."""
        end = self.size if length is None else min(self.size, offset + length)
        if offset >= end:
            return
        if self._map is None:
            yield Extent(offset, end - offset, Kind.DATA, None, 0)
            return
        for run in self._map.runs(offset, end - offset):
            yield Extent(*run[:4], 0)

    def close(self) -> None:
        """Close handle and file; closing twice is fine."""
        with self._lock, contextlib.suppress(OSError):  # that it is closed already
            self._handle.close()
        close_source(self.source)
