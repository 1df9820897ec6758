"""L2 tables without an L1 table in the order of the guest's disk: content, file systems and order together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ..limits import FILE_SYSTEM_STARTS, L1_ENTRIES, PLACEMENT_TRIALS
from ..residue.structure_detection import Geometry
from .allocation import Expected, PlacedDisk, VolumeMap, cluster_use
from .content import TableReader, read_contents
from .evidence import EXACT, Votes
from .ext_volume import ext_expected, ext_map
from .geometry import U64
from .l1_tables import table_span
from .ntfs_volume import ntfs_expected, ntfs_map
from .partition_map import partition_map
from .placement import Placement, Unplaced, Use, in_file_order, place
from .positions import disk_size_of, file_system_starts
from .xfs_volume import xfs_map

_ROUNDS = 4  # what was found in one may lead to more in the next


class Arranged(NamedTuple):
    """L2 tables with a slot by evidence, the host offsets of the others, and all of them with those others in file order."""

    placements: tuple[Placement, ...]
    left: tuple[int, ...]
    in_file_order: tuple[Placement, ...]

    def ways(self, what: str) -> Iterator[tuple[str, tuple[Placement, ...], tuple[int, ...]]]:
        """Yield what a state is, its L2 tables and those without a place: the tables by evidence, then all in file order."""
        if self.placements:
            yield what, self.placements, self.left
        if len(self.in_file_order) > len(self.placements):
            yield f"{what}, tables without a known place in the order of the file", self.in_file_order, ()


def arranged(
    reader: TableReader,
    offsets: list[int],
    geometry: Geometry,
    known: Mapping[int, list[U64]],
    size: int | None,
    fixed: tuple[Placement, ...] = (),
) -> Arranged:
    """Return a slot for each L2 table for which there is evidence; ``size`` of the disk in bytes, None if not known.

    ``fixed`` are tables of known slot, which are returned too.
    """
    span = table_span(geometry)
    slots = -(-size // span) if size else L1_ENTRIES
    contents = read_contents(reader, offsets, size, [placed.offset for placed in fixed if not placed.slot])
    starts, known_starts = contents.starts, contents.are_starts_known
    tables = contents.unplaced(span, slots)
    if not size:
        slots = _slots_by_content(reader, tables, span) or len(offsets)

    def use_of(placed: Mapping[int, int]) -> Use | None:
        return _use(reader, geometry, placed, starts)

    more: dict[int, Votes] = {}  # by host offset: what file systems must have somewhere, found in a table
    for _ in range(_ROUNDS):
        found = place(
            tables, known, slots, geometry.cluster_size, fixed=fixed, ordered=False, are_starts_known=known_starts
        )
        disk = PlacedDisk(reader, {p.slot: p.offset for p in found.placements}, span)
        before = dict(more)
        for offset, votes in _expected_votes(reader, tables, disk, starts, span).items():
            more[offset] = _joined(more.get(offset, {}), votes)
        if more == before:
            break
        tables = [
            table._replace(votes=_joined(table.votes, more.get(table.offset, {})))
            for table in contents.unplaced(span, slots)
        ]
    placed = place(tables, known, slots, geometry.cluster_size, use_of, fixed=fixed, are_starts_known=known_starts)
    return Arranged(tuple(placed.placements), tuple(t.offset for t in placed.left), tuple(in_file_order(placed, slots)))


def use_by_file_systems(reader: TableReader, geometry: Geometry, placed: Mapping[int, int]) -> Use | None:
    """Return which clusters the file systems use, by the tables that are placed; None where none is found."""
    return _use(reader, geometry, placed, file_system_starts([reader.head(placed[0])] if 0 in placed else []))


def _use(reader: TableReader, geometry: Geometry, placed: Mapping[int, int], starts: tuple[int, ...]) -> Use | None:
    span = table_span(geometry)
    volumes = _volumes(PlacedDisk(reader, dict(placed), span), starts)
    return (lambda free: cluster_use(volumes, free, span, geometry.cluster_size)) if volumes else None


def _expected_votes(
    reader: TableReader, tables: list[Unplaced], disk: PlacedDisk, starts: tuple[int, ...], span: int
) -> dict[int, dict[int, dict[str, float]]]:
    """Return what file systems must have at some places, found in tables: the kinds and bits by host offset and slot.

    A clone of a file system has the same at the same distance from its own start. Unless what it must have there is known
    too, a table that has it may be of either.
    """
    waiting = PlacedDisk(reader, {at: table.offset for at, table in enumerate(tables)}, span)
    candidates = [at for at, table in enumerate(tables) if table.offset not in disk.slots.values()]
    expected = {start: list(_expected(disk, start)) for start in starts[:FILE_SYSTEM_STARTS]}
    asked = {(start, item.offset - start, item.what) for start, items in expected.items() for item in items}
    found: dict[int, dict[int, dict[str, float]]] = {}
    tried = 0
    for start, items in expected.items():
        for item in items:
            slot, inside = divmod(item.offset, span)
            if slot in disk.slots or inside + item.length > span:
                continue
            tried += len(candidates) * (1 + item.length // 512)
            if tried > PLACEMENT_TRIALS:
                return found
            alike = [
                (other - start) // span
                for other in starts[:FILE_SYSTEM_STARTS]
                if (other - start) % span == 0 and (other, item.offset - start, item.what) not in asked
            ]
            for at in candidates:
                data = waiting.read(at * span + inside, item.length)
                if data is not None and item.matches(data):
                    votes = found.setdefault(tables[at].offset, {})
                    for distance in (0, *alike):
                        if slot + distance not in disk.slots and slot + distance >= 0:
                            votes.setdefault(slot + distance, {})[item.what] = EXACT
    return found


def _joined(votes: Votes, more: Votes) -> Votes:
    return {slot: {**votes.get(slot, {}), **more.get(slot, {})} for slot in (*votes, *more)}


def _expected(disk: PlacedDisk, start: int) -> Iterator[Expected]:
    yield from ext_expected(disk, start)
    yield from ntfs_expected(disk, start)


def _slots_by_content(reader: TableReader, tables: list[Unplaced], span: int) -> int | None:
    """Return how many slots the disk has by its partition table or file system, None where nothing says so."""
    for table in tables:
        if table.votes and 0 not in table.votes:
            continue
        disk = PlacedDisk(reader, {0: table.offset}, span)
        implied = disk_size_of(lambda at, length, disk=disk: disk.read(at, length) or b"")  # type: ignore[misc]
        if implied is not None and 0 < implied[0] <= L1_ENTRIES * span:
            return max(-(-implied[0] // span), len(tables))
    return None


def _volumes(disk: PlacedDisk, starts: tuple[int, ...]) -> list[VolumeMap]:
    """Return what is known of the file systems that start at some of the places."""
    found = [
        ext_map(disk, start) or ntfs_map(disk, start) or xfs_map(disk, start) for start in starts[:FILE_SYSTEM_STARTS]
    ]
    return [volume for volume in (*found, partition_map(disk)) if volume is not None]
