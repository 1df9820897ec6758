"""What positions in file systems count from: partitions, and the volumes inside them.

::

    partition ─┬─ file system
               ├─ extended partition ─── logical partitions, each after a table of its own
               ├─ member of a mirror ─── its data, from an offset on
               └─ physical volume ────── logical volumes, in segments that need not be in order

What is inside is read through the L2 tables that are placed already.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from typing import NamedTuple

from ..errors import LimitExceeded, Qcow2Error
from ..format import lvm
from ..format.header import SECTOR
from ..format.lvm import Segment
from ..limits import FILE_SYSTEM_STARTS, LVM_SEGMENTS, PARTITIONS_LOOKED_AT, Budget, MiB
from .allocation import PlacedDisk
from .structures import (
    PartitionRange,
    holds_file_system,
    implied_sizes,
    logical_partition,
    lvm_label,
    partitions,
    raid_member,
)

ReadGuest = Callable[[int, int], bytes]  # offset in the guest range of one table, length; fewer where nothing is

_STARTS = (0, 63 * SECTOR, MiB)  # where file systems start besides what a partition table names
_UNBOUNDED = 1 << 62
_HEAD = 4096
_RAID_AT = (
    0,
    4096,
)  # superblocks of versions 1.1 and 1.2; before that of 1.0, at the end, the data starts with the member
_MIRROR = 1


class Holds(Enum):
    """What is known to be at the start of a volume."""

    NOTHING_KNOWN = 0
    FILE_SYSTEM = 1
    LOGICAL_PARTITIONS = 2
    LOGICAL_VOLUMES = 3
    MIRRORED_DATA = 4


CONTAINERS = (Holds.LOGICAL_VOLUMES, Holds.MIRRORED_DATA)


class VolumeBytes(NamedTuple):
    """Bytes of the disk that follow each other in a volume, in rising segments; ``length`` is None where it is not known.

    ``holds_volumes`` says that a partition table calls it a part of LVM or of a RAID.
    """

    segments: tuple[Segment, ...]
    length: int | None
    holds: Holds = Holds.NOTHING_KNOWN
    holds_volumes: bool = False

    @classmethod
    def at(cls, start: int, length: int | None = None) -> VolumeBytes:
        """Return the volume from a place on the disk on."""
        return cls((Segment(0, _UNBOUNDED if length is None else length, start),), length)

    def runs(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield (offset on the disk, length) of a range, up to the first byte that has no place."""
        while length > 0:
            index = bisect_right(self.segments, offset, key=lambda segment: segment.start) - 1
            start, stored, below = self.segments[index]
            take = min(length, start + stored - offset)
            if index < 0 or take <= 0:
                return
            yield below + offset - start, take
            offset += take
            length -= take

    def place(self, offset: int, length: int = 1) -> int | None:
        """Return where on the disk a range is that is in one piece there, None for any other."""
        for at, stored in self.runs(offset, length):
            return at if stored == length else None
        return None

    def is_sized(self, size: int) -> bool:
        """Whether it has the size, which is rounded down to a MiB at most, that the label of a container states."""
        return self.length is not None and 0 <= self.length - size < MiB

    def labelled(self, labels: Iterable[tuple[Holds, int]]) -> VolumeBytes:
        """Return it as what a label says, of some (kind, size), that was found on the disk and is that of a volume of its size."""
        kinds = {kind for kind, size in labels if self.is_sized(size)}
        return self._replace(holds=kinds.pop()) if len(kinds) == 1 else self

    def part(self, segments: Iterable[Segment]) -> Iterator[Segment]:
        """Yield segments of what is in this volume as segments of the disk."""
        for start, length, below in segments:
            done = 0
            for at, stored in self.runs(below, length):
                yield Segment(start + done, stored, at)
                done += stored


class Volumes(NamedTuple):
    """The volumes of a disk. ``are_all`` says whether everything was read that may hold further ones."""

    found: tuple[VolumeBytes, ...]
    are_all: bool


class PlacedVolume(PlacedDisk):
    """The bytes of a volume, as far as L2 tables are placed."""

    def __init__(self, disk: PlacedDisk, volume: VolumeBytes) -> None:
        self._below = disk
        self._volume = volume

    @property
    def size(self) -> int:
        return self._volume.length or _UNBOUNDED

    def read(self, offset: int, length: int) -> bytes | None:
        """Return bytes of the volume, None where some have no place, or the disk has none."""
        pieces = []
        for at, stored in self._volume.runs(offset, length):
            data = self._below.read(at, stored)
            if data is None:
                return None
            pieces.append(data)
            length -= stored
        return None if length else b"".join(pieces)

    def takes(self, blocks: int) -> bool:
        """Whether a file system of so many blocks can still be looked at; they are counted then."""
        return self._below.takes(blocks)


class _Reader(NamedTuple):
    """A volume as the reader of LVM2 metadata wants it."""

    volume: PlacedVolume

    @property
    def size(self) -> int:
        return self.volume.size

    def read(self, offset: int, length: int) -> bytes:
        data = self.volume.read(offset, min(length, self.size - offset))
        if data is None:
            raise OSError(f"nothing is placed at {offset:#x} of the volume")
        return data


def first_volumes(heads: Iterable[bytes]) -> tuple[VolumeBytes, ...]:
    """Return the partitions of a disk, by the first sectors under each L2 table.

    One of them is the start of the disk: a partition table says it all, and without one a file system that
    starts there is alone. Where neither is found the usual places are all possible.
    """
    whole = False
    for head in heads:
        if found := partitions(head):
            return tuple(_of_partition(partition) for partition in found)
        whole = whole or holds_file_system(head) or _label_in(head)
    return tuple(VolumeBytes.at(start) for start in ((0,) if whole else _STARTS))


def _of_partition(partition: PartitionRange) -> VolumeBytes:
    volume = VolumeBytes.at(partition.start, partition.length)
    if partition.is_extended:
        return volume._replace(holds=Holds.LOGICAL_PARTITIONS)
    return volume._replace(holds_volumes=partition.holds_volumes)


def _label_in(head: bytes) -> bool:
    return any(lvm_label(head[at : at + SECTOR]) for at in range(0, 4 * SECTOR, SECTOR))


def are_known(heads: Iterable[bytes], size: int | None) -> bool:
    """Whether it is known where volumes start: by a partition table, or by one as large as the disk of ``size`` bytes.

    Where the table of the start of the disk is lost, a file system may start anywhere.
    """
    for head in heads:
        if partitions(head):
            return True
        implied = disk_size_of(lambda at, length, head=head: head[at : at + length])  # type: ignore[misc]
        if size and implied is not None and 0 <= size - implied[0] < MiB:
            return True
    return False


def disk_size_of(read: ReadGuest) -> tuple[int, str] | None:
    """Return the size in bytes that the partition table or the file system on a disk implies, and what implies it."""
    first = read(0, 34 * SECTOR)
    return max(implied_sizes(first), default=None) if len(first) >= 4 * SECTOR else None


# --- volumes inside others ------------------------------------------------------------------------


def volumes_of(
    disk: PlacedDisk, first: Sequence[VolumeBytes], sections: dict[bytes, lvm.Section] | None = None
) -> Volumes:
    """Return volumes and those inside them, as far as tables are placed; crafted ones end with a number of volumes.

    ``sections`` keeps LVM2 metadata that was parsed.
    """
    found: list[VolumeBytes] = []
    are_all = True
    texts = lvm.Texts(sections)
    room = Budget.up_to("pieces of volumes inside volumes", LVM_SEGMENTS)
    pending = list(first)
    while pending:
        physical: list[tuple[lvm.PhysicalVolume, VolumeBytes]] = []
        while pending:
            volume = pending.pop(0)
            if len(found) == FILE_SYSTEM_STARTS:
                return Volumes(tuple(found), are_all=False)
            placed = PlacedVolume(disk, volume)
            if volume.holds is Holds.LOGICAL_PARTITIONS:
                inside = _logical_partitions(placed, volume)
                are_all &= None not in inside
                pending += [logical for logical in inside if logical is not None]
                found.append(volume)
                continue
            head = placed.read(0, min(_HEAD + SECTOR, placed.size)) or b""
            holds = Holds.FILE_SYSTEM if holds_file_system(head) else Holds.NOTHING_KNOWN if head else volume.holds
            raid = next(filter(None, (raid_member(head[at : at + SECTOR]) for at in _RAID_AT)), None)
            part = _physical(placed, texts) if _label_in(head) else None
            if part is not None:
                holds = Holds.LOGICAL_VOLUMES
                physical.append((part, volume))
            elif raid is not None and raid.data:
                holds = Holds.MIRRORED_DATA
                are_all &= raid.level == _MIRROR
                if raid.level == _MIRROR:
                    data = pieces_of(volume, [Segment(0, raid.data_size, raid.data)], room)
                    pending += [VolumeBytes(data, raid.data_size)] if data else []
            elif holds is Holds.FILE_SYSTEM:  # a label beside it is a former one
                pass
            elif _label_in(head):
                holds = Holds.LOGICAL_VOLUMES
                are_all = False
            elif volume.holds_volumes:  # its label is lost, or nobody reads it
                are_all = False
            found.append(volume._replace(holds=holds))
        inside_, are_read = _logical_volumes(physical, room)
        pending += inside_
        are_all &= are_read
    return Volumes(tuple(found), are_all)


def _logical_partitions(placed: PlacedVolume, volume: VolumeBytes) -> list[VolumeBytes | None]:
    """Return the logical partitions of an extended one, None in place of what is after a table that cannot be read."""
    found: list[VolumeBytes | None] = []
    at = 0
    for _ in range(PARTITIONS_LOOKED_AT):
        table = logical_partition(placed.read(at, SECTOR) or b"")
        if table is None:
            found.append(None)
            break
        start, length = at + table.first * SECTOR, table.length * SECTOR
        segments = tuple(volume.part([Segment(0, length, start)]))
        found.append(VolumeBytes(segments, length) if segments else None)
        if table.next * SECTOR <= at:
            break
        at = table.next * SECTOR
    return found


def _physical(placed: PlacedVolume, texts: lvm.Texts) -> lvm.PhysicalVolume | None:
    try:
        return lvm.physical_volume(_Reader(placed), texts)
    except (lvm.LvmError, Qcow2Error, OSError):
        return None


def pieces_of(volume: VolumeBytes, segments: Iterable[Segment], room: Budget) -> tuple[Segment, ...]:
    """Return segments of what is in a volume as segments of the disk, none where there is no room for them."""
    found = []
    try:
        for piece in volume.part(segments):
            room.spend(1)
            found.append(piece)
    except LimitExceeded:
        return ()
    return tuple(found)


def _logical_volumes(
    physical: Sequence[tuple[lvm.PhysicalVolume, VolumeBytes]], room: Budget
) -> tuple[list[VolumeBytes], bool]:
    """Return the logical volumes that are in one piece after another on some physical ones, and whether that is all."""
    below = {part.uuid: volume for part, volume in reversed(physical)}
    are_all = len(below) == len(physical)  # a clone has the same UUIDs
    found: list[VolumeBytes] = []
    try:
        for logical in lvm.logical_volumes(part for part, _ in physical):
            pieces = [pieces_of(below[uuid], [segment], room) for uuid, segment in logical.parts if not logical.why]
            is_read = bool(pieces) and all(pieces)
            are_all &= is_read
            if is_read:
                found.append(VolumeBytes(tuple(sorted(piece for some in pieces for piece in some)), logical.size))
    except (lvm.LvmError, LimitExceeded):
        are_all = False
    return found, are_all
