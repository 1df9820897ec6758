"""What the clusters under one L2 table hold: read to find out where on the disk the table belongs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from ..census.arrays import U64
from ..errors import Qcow2Error
from ..format.entries import COPIED
from ..format.header import SECTOR
from ..format.image import Image
from ..format.source import Source
from ..limits import PLACED_CONTENT_BYTES, PLACED_STRUCTURES, Budget, KiB, MiB
from ..reader.disk import Disk
from ..reader.mapping import Kind
from ..reader.opening import open_disk
from ..reader.runs import joined
from ..residue.structure_detection import Geometry
from .metered_source import MeteredSource
from .patched_source import PatchedSource
from .placement import Unplaced
from .positions import (
    Position,
    empty,
    note_file_systems,
    positions,
    sectors_with_structures,
    slots,
)
from .rebuilt_metadata import REBUILT_AT, new_header, with_l1
from .table_search import entries_of
from .volumes import CONTAINERS, Holds, VolumeBytes, Volumes, are_known, first_volumes

_STORED = (Kind.DATA, Kind.COMPRESSED)
_HEAD = 64 * SECTOR
_OPENING = 32 * KiB  # what a table of which nothing is read costs, in bytes read


class TableReader:
    """Reads what one L2 table maps, as the guest bytes from 0 on."""

    def __init__(self, source: Source, geometry: Geometry, image: Image | None, compression: int | None) -> None:
        self._budget = Budget("bytes read to place L2 tables", source.size)  # crafted tables share their clusters
        self._source = source
        self._content = source.unmetered if isinstance(source, MeteredSource) else source  # it has the budget above
        self.file_size = source.size
        self._geometry = geometry
        self._image = image
        self._compression = compression

    def over(self, source: Source) -> TableReader:
        """Return a reader of the same image over another source, as one with rebuilt tables."""
        return TableReader(source, self._geometry, self._image, self._compression)

    def disk(self, offset: int) -> Disk:
        """Return the disk that the L2 table at a host offset alone maps."""
        span = self._geometry.l2_span
        entry = (offset | COPIED).to_bytes(8, "big")
        if self._image is not None:
            patches = with_l1(span, entry)
        else:
            header = new_header(
                cluster_bits=self._geometry.cluster_bits,
                size=span,
                l1_size=1,
                extended_l2=self._geometry.extended_l2,
                compression_type=self._compression,
            )
            patches = (0, header), (REBUILT_AT, entry)
        return open_disk(PatchedSource(self._content, patches), follow=False)

    def entries(self, offset: int) -> U64:
        """Return the entries of the table."""
        return entries_of(self._source, offset, self._geometry)

    def head(self, offset: int) -> bytes:
        """Return the first bytes under a table, as far as a partition table goes; empty where they cannot be read."""
        try:
            self._budget.spend(_OPENING)
            with self.disk(offset) as disk:
                return disk.read(0, _HEAD)
        except (Qcow2Error, OSError):
            return b""

    def pieces(self, offset: int) -> Iterator[tuple[int, bytes]]:
        """Yield (offset under the table, bytes) of what is stored, at most 64 MiB spread over it; nothing unreadable."""
        try:
            self._budget.spend(_OPENING)
            with self.disk(offset) as disk:
                if disk.is_locked:
                    return
                stored = list(joined(((e.offset, e.length) for e in disk.extents() if e.kind in _STORED), _as_one))
                step = max(1, sum(length for _, length in stored) // PLACED_CONTENT_BYTES)
                for number, (at, length) in enumerate(_cut(stored)):
                    if number % step == 0:
                        self._budget.spend(length)
                        yield at, disk.read(at, length)
        except (Qcow2Error, OSError):
            return


def _as_one(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int] | None:
    """Return neighbouring ranges, (offset, length), as one: compressed clusters are extents of their own."""
    return (first[0], first[1] + second[1]) if sum(first) == second[0] else None


def _cut(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for offset, length in ranges:
        for at in range(offset, offset + length, MiB):
            yield at, min(MiB, offset + length - at)


class Contents(NamedTuple):
    """What is stored under some L2 tables, as far as it records its position.

    ``tables`` are (host offset, entries, positions); ``volumes`` are those in which file systems may start, and
    ``are_starts_known`` says whether a partition table or the size of the disk says so.
    """

    tables: list[tuple[int, U64, list[Position]]]
    volumes: tuple[VolumeBytes, ...]
    are_starts_known: bool

    def unplaced(self, span: int, count: int, volumes: Volumes) -> list[Unplaced]:
        """Return the tables with the slots, below ``count``, that they agree with.

        A slot is sure for what counts from the start of the disk, and for what counts from that of a volume whose start
        was read, where no other volume may be hidden.
        """
        are_known = self.are_starts_known and volumes.are_all
        seen = [volume for volume in volumes.found if are_known and volume.holds is not Holds.NOTHING_KNOWN]
        return [
            Unplaced(
                offset,
                entries,
                slots(found, volumes.found, span, count),
                frozenset(slots(found, seen, span, count)),
            )
            for offset, entries, found in self.tables
        ]


def read_contents(reader: TableReader, offsets: list[int], size: int | None, first: Iterable[int] = ()) -> Contents:
    """Return what is under L2 tables of a disk of ``size`` bytes, None where it is not known.

    ``first`` are tables of the start of the disk that are placed already.
    """
    known = empty()
    seen: dict[int, list[Any]] = {}
    heads: list[bytes] = [reader.head(offset) for offset in first]
    for offset in offsets:
        kept: list[tuple[int, bytes]] = []
        for at, data in reader.pieces(offset):
            note_file_systems(known, data)
            if at == 0:
                heads.append(data[:_HEAD])
            kept += _structures(at, data)
        seen[offset] = kept[:PLACED_STRUCTURES]
    tables = [
        (offset, reader.entries(offset), [p for at, data in seen[offset] for p in positions(known, at, data)])
        for offset in offsets
    ]
    labels = [(p.inside, p.size) for _, _, found in tables for p in found if p.inside in CONTAINERS and p.size]
    volumes = tuple(volume.labelled(labels) for volume in first_volumes(heads))
    return Contents(tables, volumes, are_known(heads, size))


def _structures(at: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    for place_ in sectors_with_structures(data):
        yield at + place_, data[place_ : place_ + SECTOR]
