"""The volumes of a disk, and the library that reads the files in each.

A partition may hold a file system, or further volumes::

    partition ─┬─ file system            The Sleuth Kit, for its deleted entries; else dfVFS
               ├─ LUKS, BitLocker ────── decrypted by dfVFS, and looked into again
               └─ LVM2 physical volume ─ its group's logical volumes, each looked into again

What nobody reads is returned too, named by its signature: it is never taken for free space. Nor is space
outside the partitions, where more is stored than partition tables: the table may be damaged, or a partition deleted.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import LimitExceeded, Qcow2Error
from ..format import lvm
from ..limits import BLANK_BYTES_READ, PARTITION_GAP, VOLUME_DEPTH, Budget, KiB
from ..reader.disk import Layer
from ..reader.runs import Kind
from ..text import printable
from .protocol import FileSystem, Log, NoFileSystem
from .readers import Reader, VolumeReader
from .records import Place, Span, Volume
from .signatures import HEAD, Signature, signature_of
from .spans import Spans
from .tolerant import TolerantReader

if TYPE_CHECKING:
    from .dfvfs_files import Scanned

_DFVFS_READS = frozenset(("XFS", "APFS", "LUKS", "BitLocker", "HFS+", "HFSX", "NTFS", "ext"))
_UNKNOWN = Signature("")


class Unread(NamedTuple):
    """A volume whose files nobody listed. ``volume.kind`` is by its signature, empty when that is unknown."""

    volume: Volume
    spans: tuple[Span, ...]
    why: str
    holds_files: bool = True
    blank: bool = False  # it holds nothing but zeros
    is_elsewhere: bool = False  # a part of it is on another disk, where it may change unseen

    @property
    def may_hold_files(self) -> bool:
        """Whether files may be in it that are not listed."""
        return self.holds_files and not self.blank


class GuestVolumes:
    """The file systems of one state, and the volumes that are not read.

    ``spans`` says where each file system is on the disk.
    """

    def __init__(
        self,
        systems: Sequence[FileSystem] = (),
        unread: Sequence[Unread] = (),
        spans: Mapping[Place, Sequence[Span]] | None = None,
        reader: TolerantReader | None = None,
    ) -> None:
        self.systems = list(systems)
        self.unread = list(unread)
        self.spans = dict(spans or {})
        self._reader = reader
        self._in_search = self._unreadable.total  # of the search for partitions and file systems

    @property
    def read_errors(self) -> Sequence[str]:
        """Why ranges could not be read so far, each reason once."""
        return self._reader.errors if self._reader is not None else ()

    @property
    def is_incomplete(self) -> bool:
        """Whether names that are in use may be missing, or whole volumes.

        The search also reads the end of the disk, for the copy of a partition table: that may fail.
        """
        volumes = [*(system.volume for system in self.systems), *(item.volume for item in self.unread)]
        starts = [(0, HEAD), *((volume.offset, HEAD) for volume in volumes)]
        unreadable = self._unreadable
        listing = any(system.is_incomplete for system in self.systems)
        return listing or unreadable.total > self._in_search or unreadable.overlap(starts) > 0

    @property
    def _unreadable(self) -> Spans:
        return Spans(self._reader.unreadable if self._reader is not None else ())


def need_back_end() -> None:
    """Raise ``Qcow2Error`` with what to install when no library that lists files is here."""
    if importlib.util.find_spec("pytsk3") is None:
        raise Qcow2Error("listing files needs pytsk3: pip install 'qcow2-forensics[tsk]'")


def open_volumes(disk: Layer, name: str, passphrases: Sequence[bytes] = ()) -> GuestVolumes:
    """Return what a disk holds; raises ``NoFileSystem`` when that is nothing at all.

    Ranges that cannot be read do not end a listing: they are zeros and their reasons are in
    ``read_errors``. ``passphrases`` are tried on encrypted volumes of the guest. ``name`` says in
    messages what disk this is.
    """
    need_back_end()
    from .partitions import partitions, table_spans
    from .tsk_image import ReaderImage

    reader = TolerantReader(disk, "zeros")
    texts = lvm.Texts()
    found = _Finder(reader, passphrases, texts)
    looked: list[str] = []
    image = ReaderImage(reader)
    for part in partitions(image):
        looked.append(str(part))
        found.look_at_partition(Volume(part.number, part.offset, part.description, ""), part.length)
    if looked:
        found.look_outside_partitions(table_spans(image))
    found.look_into_groups()
    if not found.systems and not any(item.volume.kind for item in found.unread):
        whole = _Finder(reader, passphrases, texts)
        whole.look_at_partition(Volume(0, 0, "", ""), reader.size)
        whole.look_into_groups()
        if whole.systems or any(item.volume.kind for item in whole.unread) or not looked:
            found = whole
    if not found.systems and all(item.blank for item in found.unread):
        raise NoFileSystem.found_in(name, looked, reader.errors)
    return GuestVolumes(found.systems, found.unread, found.spans, reader)


class _Physical(NamedTuple):
    """A physical volume of LVM2, and the volume of the disk that it is in."""

    found: lvm.PhysicalVolume
    reader: Reader
    volume: Volume
    depth: int


class _Finder:
    """Looks into volumes, and into what is inside them."""

    def __init__(self, reader: TolerantReader, passphrases: Sequence[bytes], texts: lvm.Texts) -> None:
        self._texts = texts
        self._blank = Budget.up_to("bytes of blank volumes", BLANK_BYTES_READ)
        self.systems: list[FileSystem] = []
        self.unread: list[Unread] = []
        self.spans: dict[Place, Sequence[Span]] = {}
        self._disk = reader
        self._partitions: list[tuple[int, int]] = []
        self._places: set[Place] = set()
        self._numbered: dict[Place, int] = {}  # the last number that was given to a place
        self._passphrases = passphrases
        self._physical: list[_Physical] = []

    def look_at_partition(self, volume: Volume, length: int) -> None:
        """Look into a partition, or the whole disk."""
        if volume.offset >= self._disk.size:
            self.unread.append(Unread(self._own_place(volume), (), "it begins past the end of the disk"))
            return
        if (volume.offset, length) in self._partitions:
            return  # a table that lists a partition twice
        self._partitions.append((volume.offset, length))
        self._look(VolumeReader.slice(self._disk, volume.offset, length), volume, 0)

    def look_outside_partitions(self, tables: Iterable[Span]) -> None:
        """Name what is stored in the gaps between partitions, where they are longer than any table needs."""
        ends = ((0, PARTITION_GAP), (max(0, self._disk.size - PARTITION_GAP), PARTITION_GAP))
        at = 0
        for start, length in Spans((*self._partitions, *tables, *ends)):
            if start - at > PARTITION_GAP:
                reader = VolumeReader.slice(self._disk, at, start - at)
                why = f"no partition covers {at:#x} to {start:#x} of the disk"
                self._not_read(reader, Volume(0, at, "", "", "/unpartitioned"), why, blank=self._is_blank(reader))
            at = start + length

    def _look(self, reader: Reader, volume: Volume, depth: int) -> None:
        """Find the file system of a volume, the volumes in it, or what it is."""
        head = reader.read(0, min(HEAD, reader.size))
        signature = signature_of(head) or _UNKNOWN
        if signature.name == "LVM2":
            self._physical_volume(reader, volume, depth)
        elif not self._by_sleuth_kit(reader, volume, depth):
            blank_start = not signature.name and head.count(0) == len(head)
            blank = blank_start and self._is_blank(reader)
            why = "it holds nothing but zeros" if blank else "its signature is not known"
            if Spans(self._disk.unreadable).overlap(reader.place(0, len(head))):
                why = "its start cannot be read"
            elif blank_start and not blank:
                why = "its start is blank"
            if not signature.holds_files:
                why = "it holds no files"
            elif signature.name in _DFVFS_READS and depth < VOLUME_DEPTH:
                why = self._by_dfvfs(reader, replace(volume, kind=signature.name), depth)
            elif signature.name:
                why = "no installed library reads it"
            if why:
                known = replace(volume, kind=signature.name)
                self._not_read(reader, known, why, holds_files=signature.holds_files, blank=blank)

    def _by_sleuth_kit(self, reader: Reader, volume: Volume, depth: int) -> bool:
        from .sleuthkit import SleuthKitFileSystem, kind_of, open_file_system
        from .tsk_image import ReaderImage
        from .unwritten import log_of

        # A partition is read from the disk at its offset: its file system may be larger than the table says.
        below: Reader = reader if depth else self._disk
        start = 0 if depth else volume.offset
        image: Any = ReaderImage(below)
        handle = open_file_system(image, start)
        if handle is None:
            return False
        log = log_of(handle, kind_of(handle), below, start)
        if log is not None and log.reader is not None:
            replayed: Any = ReaderImage(log.reader)
            opened = open_file_system(replayed, start)
            if opened is None:
                log = Log("its journal is not read: with it the file system cannot be opened", is_incomplete=True)
            else:
                image, handle = replayed, opened
        known = self._own_place(replace(volume, kind=kind_of(handle), backend="The Sleuth Kit"))
        self.spans[known.place] = tuple(reader.place(0, reader.size))
        system = SleuthKitFileSystem(image, known, handle, reader if depth else None)
        system.take_log(log)
        self.systems.append(system)
        blocks = int(handle.info.block_count) + (known.kind == "ntfs")  # whose second boot sector follows its clusters
        self._look_behind(reader, known, blocks * int(handle.info.block_size))
        return True

    def _by_dfvfs(self, reader: Reader, volume: Volume, depth: int) -> str:
        """Look into a volume with dfVFS; return why that gave nothing, or an empty text."""
        if importlib.util.find_spec("dfvfs") is None:
            return "reading it needs dfVFS: pip install 'qcow2-forensics[dfvfs]'"
        from .dfvfs_files import Scanned
        from .unwritten import log_by_signature

        scanned: Scanned = Scanned(reader, self._passphrases)
        if scanned.unlocked is not None:
            inside = f"{volume.inside}/{volume.kind.lower()}"
            self._look(scanned.unlocked, replace(volume, kind="", inside=inside), depth + 1)
            return ""
        if volume.kind == "LUKS" and reader.read(6, 2) == b"\0\2":
            return "it is LUKS2, which dfVFS does not open"
        if scanned.locked:
            given = "no given passphrase opens it" if self._passphrases else "it needs a passphrase"
            return f"it is encrypted and {given}"
        known = replace(volume, kind=volume.kind.lower(), backend="dfVFS")
        try:
            found = list(scanned.file_systems(lambda: self._own_place(known)))
        except OSError as error:
            return str(error)
        log = log_by_signature(volume.kind, reader) if found else None
        self.systems += found
        for system in found:
            system.take_log(log)
            self.spans[system.volume.place] = tuple(reader.place(0, reader.size))
        if found and volume.kind == "XFS":
            head = reader.read(0, 16)
            self._look_behind(reader, known, int.from_bytes(head[4:8], "big") * int.from_bytes(head[8:16], "big"))
        return "" if found else f"dfVFS cannot open it{f': {scanned.problem}' if scanned.problem else ''}"

    def _look_behind(self, reader: Reader, volume: Volume, end: int) -> None:
        """Name what is stored after the end of a file system that is smaller than its volume: it is not free space."""
        if reader.size - end <= PARTITION_GAP:
            return
        rest = VolumeReader.slice(reader, end, reader.size - end)
        if not self._is_blank(rest):
            behind = replace(volume, kind="", backend="", inside=f"{volume.inside}/behind")
            self._not_read(rest, behind, f"the file system ends at {end:#x} of {reader.size:#x} bytes of its volume")

    def _own_place(self, volume: Volume) -> Volume:
        """Return a volume under a name of its own: two groups may have one name, and a container several file systems."""
        named, number = volume, self._numbered.get(volume.place, 1)
        while named.place in self._places:
            number += 1
            named = replace(volume, inside=f"{volume.inside}~{number}")
        self._numbered[volume.place] = number
        self._places.add(named.place)
        return named

    def _is_blank(self, reader: Reader) -> bool:
        """Return whether a volume holds nothing but zeros; False where that is not known.

        It is not where something cannot be read, or the budget of the disk, whose volumes may share bytes, is used up.
        """
        disk = self._disk.disk
        spans = reader.place(0, reader.size)
        try:
            for extent in (extent for span in spans for extent in disk.extents(*span)):
                if extent.kind in (Kind.ZERO, Kind.HOLE):
                    self._blank.spend(KiB)
                    continue
                self._blank.spend(extent.length)
                end = extent.offset + extent.length
                for at in range(extent.offset, end, HEAD):
                    data = disk.read(at, min(HEAD, end - at))
                    if data.count(0) != len(data):
                        return False
        except (OSError, Qcow2Error):
            return False
        return True

    def _not_read(
        self, reader: Reader, volume: Volume, why: str, *, holds_files: bool = True, blank: bool = False
    ) -> None:
        spans = tuple(reader.place(0, reader.size))
        self.unread.append(Unread(self._own_place(volume), spans, printable(why), holds_files, blank))

    # --- LVM2 ---------------------------------------------------------------------------------

    def _physical_volume(self, reader: Reader, volume: Volume, depth: int) -> None:
        try:
            physical = lvm.physical_volume(reader, self._texts)
        except (lvm.LvmError, OSError, Qcow2Error) as error:
            self._not_read(reader, replace(volume, kind="LVM2"), str(error))
            return
        if physical is not None:
            self._physical.append(_Physical(physical, reader, volume, depth))

    def look_into_groups(self) -> None:
        """Look into the logical volumes of every physical volume found so far; call it last."""
        while self._physical:  # a logical volume may itself be a physical one
            physical, self._physical = self._physical, []
            known: dict[str, _Physical] = {}
            for item in physical:
                uuid = item.found.uuid
                if known.setdefault(uuid, item) is not item:  # a copy: LVM itself asks which one is meant
                    why = f"its identifier {uuid} is that of another physical volume of this disk"
                    self._not_read(item.reader, replace(item.volume, kind="LVM2"), why)
            try:
                for logical in lvm.logical_volumes(item.found for item in known.values()):
                    parts = [(known[uuid].reader, segment) for uuid, segment in logical.parts]
                    self._logical(logical, parts, known.get(logical.physical, physical[0]))
            except (lvm.LvmError, LimitExceeded) as error:
                for item in known.values():
                    self._not_read(item.reader, replace(item.volume, kind="LVM2"), str(error))

    def _logical(
        self, logical: lvm.LogicalVolume, parts: Sequence[tuple[Reader, lvm.Segment]], first: _Physical
    ) -> None:
        depth = first.depth + 1
        volume = replace(
            first.volume,
            inside=f"{first.volume.inside}/{logical.group}/{logical.name}",
            description=f"LVM2 logical volume {logical.name} of group {logical.group}",
        )
        if not logical.why and depth <= VOLUME_DEPTH:
            self._look(VolumeReader(parts), volume, depth)
            return
        spans = tuple(span for reader, segment in parts for span in reader.place(segment.below, segment.length))
        why = logical.why or f"it is nested more than {VOLUME_DEPTH} deep"
        known = self._own_place(replace(volume, kind="LVM2"))
        self.unread.append(Unread(known, spans, printable(why), is_elsewhere=logical.is_elsewhere))
