"""What the clusters under one L2 table hold: read to find out where on the disk the table belongs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import Qcow2Error
from ..format.entries import COPIED
from ..format.header import SECTOR
from ..format.image import Image
from ..format.source import Source
from ..limits import PLACED_CONTENT_BYTES, PLACED_STRUCTURES, Budget, MiB
from ..reader.disk import Disk
from ..reader.mapping import Kind
from ..reader.opening import open_disk
from ..residue.structure_detection import Geometry
from .geometry import U64
from .header import l1_fields, new_header
from .l1_tables import entries_of, table_span
from .patched_source import REBUILT_AT, PatchedSource
from .placement import Unplaced
from .positions import (
    empty,
    file_system_starts,
    note_file_systems,
    positions,
    sectors_with_structures,
    slots,
)


class TableReader:
    """Reads what one L2 table maps, as the guest bytes from 0 on."""

    def __init__(self, source: Source, geometry: Geometry, image: Image | None, compression: int | None) -> None:
        self._budget = Budget("bytes read to place L2 tables", source.size)  # crafted tables share their clusters
        self._source = source
        self._geometry = geometry
        self._image = image
        self._compression = compression

    def disk(self, offset: int) -> Disk:
        """Return the disk that the L2 table at a host offset alone maps."""
        span = table_span(self._geometry)
        entry = (offset | COPIED).to_bytes(8, "big")
        if self._image is not None:
            patches = [l1_fields(1), (24, span.to_bytes(8, "big")), (REBUILT_AT, entry)]
        else:
            header = new_header(
                cluster_bits=self._geometry.cluster_bits,
                size=span,
                l1_size=1,
                extended_l2=self._geometry.extended_l2,
                compression_type=self._compression,
            )
            patches = [(0, header), (REBUILT_AT, entry)]
        return open_disk(PatchedSource(self._source, patches), follow=False)

    def entries(self, offset: int) -> U64:
        """Return the entries of the table."""
        return entries_of(self._source, offset, self._geometry)

    def pieces(self, offset: int) -> Iterator[tuple[int, bytes]]:
        """Yield (offset under the table, bytes) of what is stored, at most 64 MiB spread over it; nothing unreadable."""
        try:
            with self.disk(offset) as disk:
                if disk.is_locked:
                    return
                stored = [e for e in disk.extents() if e.kind in (Kind.DATA, Kind.COMPRESSED)]
                step = max(1, sum(e.length for e in stored) // PLACED_CONTENT_BYTES)
                for number, extent in enumerate(_cut(stored)):
                    if number % step == 0:
                        self._budget.spend(extent[1])
                        yield extent[0], disk.read(*extent)
        except (Qcow2Error, OSError):
            return


def _cut(extents: list[Any]) -> Iterator[tuple[int, int]]:
    for extent in extents:
        for at in range(extent.offset, extent.offset + extent.length, MiB):
            yield at, min(MiB, extent.offset + extent.length - at)


def unplaced(reader: TableReader, offsets: list[int], span: int, slots_: int) -> Iterator[Unplaced]:
    """Yield L2 tables with the slots that their content agrees with."""
    known = empty()
    found: dict[int, list[Any]] = {}
    starts: set[int] = set(file_system_starts(bytes(1024)))
    for offset in offsets:
        kept: list[tuple[int, bytes]] = []
        for at, data in reader.pieces(offset):
            note_file_systems(known, data)
            if at == 0 and data[510:512] == b"\x55\xaa":
                starts.update(file_system_starts(data[: 64 * 512]))
            kept += _structures(at, data)
        found[offset] = kept[:PLACED_STRUCTURES]
    for offset in offsets:
        seen = [position for at, data in found[offset] for position in positions(known, at, data)]
        yield Unplaced(offset, reader.entries(offset), slots(seen, sorted(starts), span, slots_))


def _structures(at: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    for place_ in sectors_with_structures(data):
        yield at + place_, data[place_ : place_ + SECTOR]
